"""Adapters of peft on packed linears: which kinds work, and what merging does.

Most kinds add something to a linear's output, or change its input, and never look at its weight:
they work on packed linears, and train there. The others compute with the dense weight. On packed
codes that ends in errors about shapes, or without an error in wrong numbers (merged ROAD) or in
none (UNILORA rounds its scales to integers), so they are refused. Merging needs dense weights
whatever the kind, so the model is dequantized first.

`_startup` puts the functions of this file into peft's BaseTuner.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..common.errors import LLQError
from ..layers.linear import QuantLinear

# Kinds of adapters (`peft_type`) that compute the same on packed linears as on dequantized ones.
# tests/hosts/test_peft_tuners.py compares their logits; kinds that it does not know are refused.
WORKING = frozenset(
    {
        "ADALORA",
        "BEFT",
        "BOFT",
        "C3A",
        "FOURIERFT",
        "GRALORA",
        "IA3",
        "LILY",
        "LORA",
        "MISS",
        "OFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
# Values of `init_lora_weights` that do not begin with the dense weight.
WORKING_STARTS = (True, False, "gaussian")
CURE = "call model.dequantize() before you add it, which makes the model dense"


def checking_targets(original: Callable[..., Any]) -> Callable[..., Any]:
    """BaseTuner._check_target_module_compatiblity, which is called before a module is wrapped.

    It raises LLQError for packed linears where the adapter needs dense ones.
    """

    @wraps(original)
    def check(self: Any, peft_config: Any, model: nn.Module, target_name: str) -> None:
        kind = needs_dense(peft_config)
        if kind is not None and _is_packed(model, target_name):
            raise LLQError(
                f"{kind} computes with the dense weight of {target_name}, which is packed; {CURE}"
            )
        original(self, peft_config, model, target_name)

    return check


def needs_dense(peft_config: Any) -> str | None:
    """What in an adapter's config computes with dense weights, in words; None: nothing does."""
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    if kind not in WORKING:
        return f"an adapter of peft_type {kind}"
    if getattr(peft_config, "use_dora", False):
        return "DoRA (use_dora=True)"
    start = getattr(peft_config, "init_lora_weights", True)
    return None if start in WORKING_STARTS else f"an adapter with init_lora_weights={start!r}"


def _is_packed(model: nn.Module, target_name: str) -> bool:
    """Whether a module of this name (its last component) is a packed linear, wrapped or not."""
    names = (target_name, "base_layer")
    return any(
        isinstance(module, QuantLinear) and name.rpartition(".")[2] in names
        for name, module in model.named_modules()
    )


def merging_dense(original: Callable[..., Any]) -> Callable[..., Any]:
    """BaseTuner.merge_adapter or merge_and_unload, on a model that is dequantized first."""

    @wraps(original)
    def merge(self: Any, *args: Any, **options: Any) -> Any:
        if any(map(_wraps_packed, self.model.modules())):
            self._check_merge_allowed()
            _dequantize(self.model)
        return original(self, *args, **options)

    return merge


def _wraps_packed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), QuantLinear)


def _dequantize(model: Any) -> None:
    from .hf_quantizer import count_quantized, dequantize_linears  # not at each import of peft

    count = count_quantized(model)
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()
    else:
        dequantize_linears(model, model.dtype)
    warnings.warn(
        f"to merge the adapter, {count} packed linears were dequantized: the model is dense now",
        stacklevel=3,
    )
