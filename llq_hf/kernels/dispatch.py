"""The door to all kernels: which row of the table serves a call.

The door itself knows no device and no library. Two rules are its own: inside `reference` no kernel
serves, and where gradients are wanted only a differentiable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from . import bitsandbytes_rows, cpu_rows
from .cached import once
from .gpu import rows as gpu_rows
from .products import decoded_product
from .rows import MANY, Kernel, Row
from .views import Division, Stored, TokenGrid, Turn, UniformCodes, View

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
    return decoded_product(x, lambda dtype: dense().to(dtype), bias)


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


def divided(x: Tensor, packed: dict[str, Tensor], name: str) -> Tensor:
    """x / the stored tensor [n] of this name, computed in fp32, in the dtype of x."""
    by = once(packed, lambda: Division(packed[name]), f"division by {name}")
    kernel = choose(x, by)
    return (x / by.divisor.float()).to(x.dtype) if kernel is None else kernel(x, by)


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
    for heard in _LISTENING:
        heard.append(_explained(view, *call))
    return view.once(call, lambda: _first_fit(view, *call))


def _first_fit(
    view: View, tokens: int, dtype: torch.dtype, device: str, gradients: bool
) -> Kernel | None:
    for row in _meant(view, tokens, dtype, device, gradients):
        if row.available() and row.fits(view):
            return row.kernel
    return None


def _meant(
    view: View, tokens: int, dtype: torch.dtype, device: str, gradients: bool
) -> Iterator[Row]:
    """The rows for such calls, whether they can serve this view or not."""
    for row in TABLE:
        meant = type(view) is row.view and device == row.device
        serves = tokens in row.tokens and dtype in row.dtypes
        if meant and serves and (row.differentiable or not gradients):
            yield row


class Choice(NamedTuple):
    """Which kernel serves a call: its name, or "torch". passed: the rows before it that are for
    such calls, each with what it needs and the weight has not.
    """

    kernel: str
    passed: list[str]


_LISTENING: list[list[Choice]] = []


@contextmanager
def listening() -> Iterator[list[Choice]]:
    """Inside, the yielded list gets what each call of `choose` answered. For people: it is slow."""
    heard: list[Choice] = []
    _LISTENING.append(heard)
    try:
        yield heard
    finally:
        _LISTENING.remove(heard)


def _explained(view: View, tokens: int, dtype: torch.dtype, device: str, gradients: bool) -> Choice:
    passed: list[str] = []
    for row in _meant(view, tokens, dtype, device, gradients):
        if not row.available():
            passed.append(f"{row.name}: not available here")
        elif row.fits(view):
            return Choice(row.name, passed)
        else:
            passed.append(f"{row.name} needs {row.needs}")
    return Choice("torch", passed)


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
