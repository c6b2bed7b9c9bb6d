"""Which kernel serves a product: a table of storages, devices, token counts and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bitpack import BLOCK
from .native import backend, digits, floats, integer_tiles, structs, tiles, turn
from .views import LevelCodes, SalientCodes, Stored, TableCodes, Turn, UniformCodes

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
FEW = range(1, 17)
FEW_LISTED = range(1, 9)
FEW_FLOATS = range(1, 5)
MANY = range(1, 1 << 62)


class Row(NamedTuple):
    """A kernel and what it serves."""

    stored: type[Stored]
    device: str
    tokens: range
    dtypes: tuple[torch.dtype, ...]
    when: Callable[[Stored], bool]
    kernel: Callable[[Tensor, Stored, Tensor | None], Tensor]


def _whole_blocks(stored: Stored) -> bool:
    return stored.whole_blocks


def _whole_rows(stored: Stored) -> bool:
    return stored.whole_blocks and stored.columns % BLOCK == 0


def _half_blocks(stored: Stored) -> bool:
    return isinstance(stored, UniformCodes) and stored.half_blocks


def _half_groups(stored: Stored) -> bool:
    return isinstance(stored, TableCodes) and stored.half_groups


def _centred_rows(stored: Stored) -> bool:
    return isinstance(stored, UniformCodes) and stored.centred


def _any(stored: Stored) -> bool:
    return True


# The first row that fits serves.
TABLE = (
    #   storage       device  tokens      activations  where          kernel
    Row(UniformCodes, "cpu", FEW, (*HALF, torch.int8), _half_blocks, digits),
    Row(UniformCodes, "cpu", MANY, (torch.int8,), _centred_rows, integer_tiles),
    Row(UniformCodes, "cpu", FEW_FLOATS, ALL, _any, floats),
    Row(UniformCodes, "cpu", MANY, ALL, _any, tiles),
    Row(LevelCodes, "cpu", FEW, HALF, _whole_blocks, digits),
    Row(LevelCodes, "cpu", FEW_FLOATS, ALL, _whole_blocks, floats),
    Row(LevelCodes, "cpu", MANY, ALL, _whole_blocks, tiles),
    Row(TableCodes, "cpu", FEW, HALF, _half_groups, digits),
    Row(TableCodes, "cpu", FEW_FLOATS, ALL, _whole_blocks, floats),
    Row(TableCodes, "cpu", MANY, ALL, _whole_blocks, tiles),
    Row(SalientCodes, "cpu", FEW_LISTED, HALF, _whole_rows, digits),
    Row(SalientCodes, "cpu", FEW_FLOATS, ALL, _whole_blocks, floats),
    Row(SalientCodes, "cpu", MANY, ALL, _whole_blocks, tiles),
)


def product(
    x: Tensor, stored: Stored | None, dense: Callable[[], Tensor], bias: Tensor | None = None
) -> Tensor:
    """y [..., O] = F.linear(x, dense(), bias), where `dense` gives the fp32 [O, I] that `stored`
    means.

    Errors of kernels are relative to the norm of y: 1e-5 with fp32 activations; with bf16 and fp16
    ones below what rounding x and y to that dtype costs anyway.
    """
    kernel = choose(x, stored)
    if kernel is None or stored is None:
        return F.linear(x, dense().to(x.dtype), bias)
    return kernel(x, stored, bias)


def choose(
    x: Tensor, stored: Stored | None
) -> Callable[[Tensor, Stored, Tensor | None], Tensor] | None:
    """The kernel for this call; None: torch's own operations. Of int8 activations y is fp32, and
    exact but for that.
    """
    if stored is None or not _native(x):
        return None
    call = (
        min(x.numel() // stored.columns, FEW.stop),
        x.dtype,
        x.device.type,
    )  # beyond a few all are many
    if call not in stored.memo:
        stored.memo[call] = _first_fit(stored, *call)
    kernel: Callable[[Tensor, Stored, Tensor | None], Tensor] | None = stored.memo[call]
    return kernel


def turned(
    x: Tensor,
    by: Turn | None,
    slow: Callable[[], Tensor],
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """factor * the transform of x / divisor in the dtype of x: what `slow` gives by torch's
    operations.

    divisor: fp16 [n]; factor: fp32 [1].
    """
    fits = by is not None and by.whole_vectors and x.device.type == "cpu" and x.dtype in ALL
    if by is None or not fits or not _native(x) or structs(by) is None:
        return slow()
    return turn(x, by, divisor, factor)


def _native(x: Tensor) -> bool:
    """Whether kernels may serve at all: there are some, calibration is not running, and nobody
    wants gradients.
    """
    return (
        not reference.depth
        and not (x.requires_grad and torch.is_grad_enabled())
        and backend() is not None
    )


def _first_fit(stored: Stored, tokens: int, dtype: torch.dtype, device: str) -> Any:
    for row in TABLE:
        fits = type(stored) is row.stored and device == row.device
        if fits and tokens in row.tokens and dtype in row.dtypes and row.when(stored):
            return row.kernel if structs(stored) is not None else None
    return None


class reference(ContextDecorator):
    """Inside, torch decodes everything: what calibration computes must not depend on a compiler or
    a processor.
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
