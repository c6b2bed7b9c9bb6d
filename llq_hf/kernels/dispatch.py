"""The door to all kernels: which row of the table serves a call.

The door itself knows no device and no library. Two rules are its own: inside `reference` no kernel
serves, and where gradients are wanted only a differentiable one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bitsandbytes_rows, cpu_rows
from .gpu import ready, turns
from .gpu import rows as gpu_rows
from .gpu.feedback import BlockRounder, descend, round_backwards
from .rows import MANY, Kernel, Row
from .views import Stored, TokenGrid, Turn, UniformCodes, View

# The first row that fits serves.
TABLE: tuple[Row, ...] = (*cpu_rows.ROWS, *bitsandbytes_rows.ROWS, *gpu_rows.ROWS)

# All larger numbers of tokens are served alike, so they share one entry of a view's memo.
MOST = max(row.tokens.stop for row in TABLE if row.tokens != MANY)


def product(
    x: Tensor, stored: Stored | None, dense: Callable[[], Tensor], bias: Tensor | None = None
) -> Tensor:
    """F.linear(x, dense(), bias), y [..., O], by a kernel if one serves this call.

    stored: the packed weight; None: nothing that a kernel could read. dense: decodes the same
    weight, fp32 [O, I], by torch operations.

    The errors of kernels are relative to the norm of y. With fp32 activations they are 1e-5. With
    bf16 and fp16 ones they are below what rounding x and y to that dtype costs anyway.
    """
    kernel = choose(x, stored)
    if kernel is not None:
        return kernel(x, stored, bias)
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _DecodedTwice.apply(x, bias, dense)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, dense().to(x.dtype), bias)


class _DecodedTwice(torch.autograd.Function):
    """F.linear(x, dense(), bias). The backward pass decodes again: autograd would otherwise keep
    the decoded weights of all linears, which are as large as the dense model.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, dense: Callable[[], Tensor]) -> Tensor:
        return F.linear(x, dense().to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dense = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y_gradient,) = gradients
        x_gradient = y_gradient @ ctx.dense().to(y_gradient.dtype)
        bias_gradient = None
        if ctx.needs_input_grad[1]:
            bias_gradient = y_gradient.reshape(-1, y_gradient.shape[-1]).sum(0)
        return x_gradient, bias_gradient, None


def transformed(
    x: Tensor,
    by: Turn | None,
    slow: Callable[[], Tensor],
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """factor * (the transform `by` of x / divisor) in the dtype of x, by a kernel if one serves
    this call; otherwise the result of `slow`, which computes the same by torch operations.

    divisor: fp16 [n]; factor: fp32 [1].
    """
    kernel = choose(x, by)
    return slow() if kernel is None else kernel(x, by, divisor, factor)


def product_of_codes(
    codes: Tensor, stored: UniformCodes, step: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """y [T, O] in `dtype` of int8 codes [T, I] of activations, whose steps are fp32 [T, 1]; None if
    no kernel serves this call. It differs from the exact product by rounding in fp32 and to
    `dtype`.
    """
    kernel = choose(codes, stored)
    return None if kernel is None else kernel(codes, stored, bias, step, dtype)


def token_codes(
    x: Tensor, by: TokenGrid, divisor: Tensor | None, slow: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """int8 codes of x / divisor on the grid that each token gets for itself, and the fp32 steps
    [..., 1], by a kernel if one serves this call; otherwise the result of `slow`.
    """
    kernel = choose(x, by)
    if kernel is None:
        return slow()
    codes, step = kernel(x, by, divisor, values=False)
    return codes, step


def token_values(x: Tensor, by: TokenGrid, slow: Callable[[], Tensor]) -> Tensor:
    """x rounded to the grid that each token gets for itself, by a kernel if one serves this call;
    otherwise the result of `slow`.
    """
    kernel = choose(x, by)
    return slow() if kernel is None else kernel(x, by, None, values=True)


def divided(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor [n], computed in fp32, in the dtype of x: on a GPU, one launch and not three."""
    gradients = x.requires_grad and torch.is_grad_enabled()
    if x.is_cuda and not (gradients or reference.depth) and ready.dense():
        with ready.device_of(x):
            return turns.divided(x, divisor)
    return (x / divisor.float()).to(x.dtype)


def block_rounder(
    W_OI: Tensor, U_II: Tensor, bits: int, block: int, drift_II: Tensor | None
) -> BlockRounder | None:
    """What rounds blocks of columns of W_OI with error feedback, one launch a block; None where no
    kernel can. It serves inside `reference` too: codes that a GPU finds differ from another GPU's
    anyway, and from torch's on the same one only where two codes are equally near.
    """
    if W_OI.is_cuda and W_OI.dtype == torch.float32 and ready.dense():
        return BlockRounder(W_OI, U_II, bits, block, drift_II)
    return None


def backward_rounder(codes_OI: Tensor) -> Callable[..., None] | None:
    """What rounds a block of columns from last to first in one launch, `feedback.round_backwards`;
    None where no kernel can. It serves inside `reference` too, as `block_rounder` does.
    """
    fits = codes_OI.is_cuda and codes_OI.dtype == torch.float32 and codes_OI.is_contiguous()
    return round_backwards if fits and ready.dense() else None


def descender(values_IO: Tensor) -> Callable[..., None] | None:
    """What makes a pass of coordinate descent on uniform grids, one launch a block of columns,
    `feedback.descend`; None where no kernel can. It serves inside `reference` too.
    """
    fits = values_IO.is_cuda and values_IO.dtype == torch.float32
    return descend if fits and ready.dense() else None


def choose(x: Tensor, view: View | None) -> Kernel | None:
    """The kernel for activations `x` and this view; None: torch's own operations serve.

    x may be int8 codes of activations, for `product_of_codes`.
    """
    if view is None or reference.depth:
        return None
    call = (
        min(x.numel() // view.columns, MOST),
        x.dtype,
        x.device.type,
        x.requires_grad and torch.is_grad_enabled(),
    )
    if call not in view.memo:
        view.memo[call] = _first_fit(view, *call)
    kernel: Kernel | None = view.memo[call]
    return kernel


def _first_fit(
    view: View, tokens: int, dtype: torch.dtype, device: str, gradients: bool
) -> Kernel | None:
    for row in TABLE:
        meant = type(view) is row.view and device == row.device
        serves = tokens in row.tokens and dtype in row.dtypes
        allowed = row.differentiable or not gradients
        if meant and serves and allowed and row.available() and row.fits(view):
            return row.kernel
    return None


class reference(ContextDecorator):
    """Inside, torch decodes everything: what is computed during calibration must not depend on a
    compiler, a processor or a library.
    """

    depth = 0

    def __enter__(self) -> None:
        reference.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        reference.depth -= 1
