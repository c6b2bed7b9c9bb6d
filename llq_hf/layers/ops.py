"""Custom operators that make a packed linear one node under torch.compile, so that no method
causes a graph break.

A graph holds only tensors, numbers and strings. The operators therefore receive the stored tensors,
by which they find the CachedTensors, and a string that names the method. Calls outside graphs do
not use them, which saves at least 5 us each.

    linear    for graphs without gradients; costs as much as calling the module outside a graph
    trained   the same with a derivative; torch takes longer to call it
    gradient  the derivative with respect to the input; torch decodes, whatever kernels there are
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cached_tensors, reference
from ..method import Method

_METHODS: dict[str, Method] = {}  # of this process, by the string that stands for each in a graph


def register(method: Method) -> str:
    """Make `method` known to the operators. Returns the string that stands for it in a graph: its
    repr, which holds all its options.
    """
    text = repr(method)
    _METHODS[text] = method
    return text


def node(
    x: Tensor,
    stored: Sequence[Tensor],
    names: str,
    bias: Tensor | None,
    method: str,
    out_features: int,
) -> Tensor:
    """`Method.linear` as one traceable operator. names: of the stored tensors, joined by commas;
    method: the string from `register`.
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
        _METHODS[method]
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
    """The gradient of x [..., I]. By torch.func, as autograd records nothing inside an operator;
    by torch's operations, as torch.func cannot go through the kernels of every library.
    """
    packed = cached_tensors(names.split(","), stored)
    with torch.enable_grad(), reference():
        pull: Any = torch.func.vjp(
            lambda x: _METHODS[method].linear(x, packed, None, out_features), x
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
    """Register the operator llq::`name`. shape: returns an empty tensor like the one that
    `function` returns.
    """
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
