"""Finds the decoder blocks of a model, their linears, and which linears share an input.

No architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) of the text decoder. Only the linears inside its blocks are quantized.

    LLQError if the model has no `get_decoder()` with a `layers` list.
    """
    find: Any = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    if not isinstance(decoder, nn.Module) or not isinstance(
        getattr(decoder, "layers", None), nn.ModuleList
    ):
        raise LLQError(
            f"{type(model).__name__} is not a Llama-like model: "
            "its decoder has no list of blocks named 'layers'"
        )
    name = next(name for name, module in model.named_modules() if module is decoder)
    return name, decoder


def block_prefixes(model: nn.Module) -> list[str]:
    """Full module names of the decoder blocks: "model.layers.0", ..."""
    name, decoder = decoder_of(model)
    return [f"{name}.layers.{i}" if name else f"layers.{i}" for i in range(len(decoder.layers))]  # type: ignore[arg-type]


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are still dense, by name inside the block."""
    # `type(...) is`, because QuantLinear is an nn.Linear too.
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """All dense linears inside decoder blocks, by full module name."""
    return {
        f"{prefix}.{name}": linear
        for prefix in block_prefixes(model)
        for name, linear in block_linears(model.get_submodule(prefix)).items()
    }


def check_covered(model: nn.Module) -> None:
    """LLQError where more than a twentieth of the blocks' weights lies outside of linears, and
    would stay dense: fused experts above all.

    A model that is packed in its attention alone must not pass for a model of few bits.
    """
    linears, others = 0, {}
    for prefix in block_prefixes(model):
        block = model.get_submodule(prefix)
        own = {id(linear.weight) for linear in block_linears(block).values()}
        for name, parameter in block.named_parameters():
            if id(parameter) in own:
                linears += parameter.numel()
            elif parameter.ndim > 1:
                others[f"{prefix}.{name}"] = parameter.numel()
    dense = sum(others.values())
    if 20 * dense > dense + linears:
        largest = max(others, key=others.__getitem__)
        raise LLQError(
            f"{type(model).__name__} keeps {dense / (dense + linears):.0%} of its blocks' weights "
            f"outside of linears (such as {largest}), as mixtures of experts do; they would stay "
            "in full precision, so it is not quantized"
        )


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name` inside `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block or an attention module returned.

    A block returns a tensor in transformers 5, but a tuple in some architectures; attention returns
    a tuple.
    """
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@torch.no_grad()
def input_groups(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> list[list[str]]:
    """Linears grouped by the tensor they read, in the order of execution: [[q, k, v], [o], [gate,
    up], [down]].

    The block is run once, and linears that receive the same tensor object form a group. So no
    architecture needs a table.
    """
    # The list keeps the tensors alive: a freed one's identity could be reused.
    readers: list[tuple[Tensor, list[str]]] = []

    def sort_in(name: str, x: Tensor) -> None:
        group = next((names for tensor, names in readers if tensor is x), None)
        if group is None:
            readers.append((x, group := []))
        group.append(name)

    with watch_inputs(block_linears(block), sort_in):
        block(hidden, **kwargs)
    return [names for _, names in readers]


@contextmanager
def watch_inputs(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], Any]
) -> Iterator[None]:
    """Within the context, call see(name, x) with the input x of each module before it runs.

    x is the first positional argument. What `see` returns is ignored.
    """

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(name, args[0])

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name)))
        yield


class InputsOf:
    """Runs a block for the inputs of some of its modules, and no further than the last of them.

    see(name, x): called as by `watch_inputs`. The first run goes through the whole block and counts
    the calls; later ones stop after as many. A block whose weights accelerate moves always runs as
    a whole, because its hooks at the end put the weights back.
    """

    def __init__(
        self, block: nn.Module, modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], Any]
    ) -> None:
        self.block = block
        self.modules = modules
        self.see = see
        self.whole = any(hasattr(module, "_hf_hook") for module in block.modules())
        self.expected = 0  # calls of a run; 0: not known
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls = 0
        with watch_inputs(self.modules, self._see), suppress(_AllSeen):
            self.block(*args, **kwargs)
        self.expected = 0 if self.whole else self.calls

    def _see(self, name: str, x: Tensor) -> None:
        self.see(name, x)
        self.calls += 1
        if self.calls == self.expected:
            raise _AllSeen


class _AllSeen(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def forwards_replaced(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Within the context, each module runs another function in place of its forward pass."""
    own = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.forward
            if before is not None:  # accelerate puts one of its own there
                module.forward = before
