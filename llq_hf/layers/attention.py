"""Quantize queries, keys and values between the rotary embedding and the attention product.

transformers' attention modules look up their attention function at every call, by the name in their
config. `install` gives each module a config of its own, which reads everything from the model's
config except that name: it answers `llq_<name>`. The function of that name transforms q, k and v
and calls the function <name>. Masks are made by the model from its own config, so they keep the
form that <name> expects.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..common.errors import LLQError
from ..numerics.activations import Attention

_PREFIX = "llq_"


class _ConfigView:
    """The model's config with another name of the attention function. Later changes of the model's
    config show through.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # a copy in the making has no config yet
            raise AttributeError(name)
        value = getattr(self.config, name)
        if name != "_attn_implementation":
            return value
        _register(value)
        return _PREFIX + value

    def __deepcopy__(self, memo: dict[int, Any]) -> _ConfigView:
        return _ConfigView(self.config)


def install(root: nn.Module, attention: Attention) -> int:
    """Make every attention module inside `root` transform its queries, keys and values. Returns
    the number of such modules.

    LLQError if there is none: scores with 16-bit attention must not pass for quantized ones.
    """
    found = 0
    for module in root.modules():
        if hasattr(module, "q_proj") and hasattr(module, "config"):
            owner: Any = module
            if not isinstance(owner.config, _ConfigView):
                owner.config = _ConfigView(owner.config)
            owner.llq_attention = attention
            found += 1
    if not found:
        raise LLQError(
            f"{type(root).__name__} has no attention module with a q_proj: "
            "its attention stays 16 bits"
        )
    return found


def _register(name: str) -> None:
    """Make `llq_<name>` known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _PREFIX + name in ALL_ATTENTION_FUNCTIONS:
        return

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Any:
        attention = module.llq_attention
        assert isinstance(attention, Attention)
        # "eager" is not registered: each architecture defines its own beside its attention class.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        return inner(module, *attention.transform(query, key, value), mask, **options)

    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + name, function)
