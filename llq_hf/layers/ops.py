"""A packed linear as one node of a graph, for torch.compile: whatever a method does with its
tensors breaks no graph.

A graph holds tensors, numbers and texts only: the operators are given the stored tensors, by which
they find what is kept of them, and the method by a text. Calls outside graphs go without them,
which saves 5 us each and more.

    linear    what graphs without gradients hold; in a graph it costs what calling a module does outside
    trained   the same with a derivative, which torch takes longer to call
    gradient  the derivative, of the input: torch decodes, as it does outside graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cached_tensors
from ..method import Method

_KNOWN: dict[str, Method] = {}  # in this process, by what stands for a method in a graph


def known(method: Method) -> str:
    """What stands for `method` in a graph: all that it is, in words."""
    text = repr(method)
    _KNOWN[text] = method
    return text


def node(
    x: Tensor,
    stored: Sequence[Tensor],
    names: str,
    bias: Tensor | None,
    method: str,
    out_features: int,
) -> Tensor:
    """`Method.linear`, to be traced. names: of the stored tensors, joined by commas; method: as
    `known` said.
    """
    trained = x.requires_grad and torch.is_grad_enabled()
    operator = torch.ops.llq.trained if trained else torch.ops.llq.linear
    y: Tensor = operator(x, stored, names, bias, method, out_features)
    return y


def _linear(
    x: Tensor,
    stored: Sequence[Tensor],
    names: str,
    bias: Tensor | None,
    method: str,
    out_features: int,
) -> Tensor:
    return (
        _KNOWN[method]
        .linear(x, cached_tensors(names.split(","), stored), bias, out_features)
        .contiguous()
    )


def _gradient(
    y_gradient: Tensor,
    x: Tensor,
    stored: Sequence[Tensor],
    names: str,
    method: str,
    out_features: int,
) -> Tensor:
    """Of x, by way of torch.func: inside an operator autograd records nothing."""
    packed = cached_tensors(names.split(","), stored)
    with torch.enable_grad():
        pull: Any = torch.func.vjp(
            lambda x: _KNOWN[method].linear(x, packed, None, out_features), x
        )[1]
    x_gradient: Tensor = pull(y_gradient)[0]
    return x_gradient.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, names, _, method, out_features = inputs
    ctx.save_for_backward(x, *stored)
    ctx.rest = names, method, out_features


def _backward(ctx: Any, y_gradient: Tensor) -> tuple[Any, ...]:
    x, *stored = ctx.saved_tensors
    x_gradient = torch.ops.llq.gradient(y_gradient, x, stored, *ctx.rest)
    bias_gradient = (
        y_gradient.reshape(-1, y_gradient.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    )
    return x_gradient, [None] * len(stored), None, bias_gradient, None, None


def _define(
    name: str, arguments: str, function: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> None:
    """shape: gives an empty tensor like the one that `function` puts out."""
    torch.library.define(
        f"llq::{name}", f"({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.impl(f"llq::{name}", "default", function)
    torch.library.register_fake(f"llq::{name}", shape)


_FORWARD = "Tensor x, Tensor[] stored, str names, Tensor? bias, str method, int out_features"
_BACKWARD = "Tensor y_gradient, Tensor x, Tensor[] stored, str names, str method, int out_features"
for _name in ("linear", "trained"):
    _define(_name, _FORWARD, _linear, lambda x, *rest: x.new_empty(*x.shape[:-1], rest[-1]))
_define("gradient", _BACKWARD, _gradient, lambda y_gradient, x, *rest: x.new_empty(x.shape))
torch.library.register_autograd("llq::trained", _backward, setup_context=_save)
