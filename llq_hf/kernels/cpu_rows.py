"""The rows of the compiled CPU kernels (native.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bitpack import BLOCK, SLOT
from .native import compiled, digits, floats, integer_tiles, structs, tiles, transform
from .rows import ALL, HALF, MANY, Kernel, Row
from .views import (
    LevelCodes,
    SalientCodes,
    Stored,
    TableCodes,
    Transform,
    UniformCodes,
    View,
)

FEW = range(1, 17)
FEW_SALIENT = range(1, 9)
FEW_FLOATS = range(1, 5)


def _any(stored: Stored) -> bool:
    return True


def _whole_blocks(stored: LevelCodes | TableCodes | SalientCodes) -> bool:
    return stored.whole_blocks


def _whole_rows(stored: SalientCodes) -> bool:
    return stored.whole_blocks and stored.columns % BLOCK == 0


def _whole_slots(stored: UniformCodes) -> bool:
    return stored.whole_slots


def _half_groups(stored: TableCodes) -> bool:
    return stored.half_groups


def _centred(stored: UniformCodes) -> bool:
    return stored.centred


def _whole_vectors(by: Transform) -> bool:
    return by.whole_vectors


def digits_of_codes(
    codes: Tensor, stored: UniformCodes, bias: Tensor | None, step: Tensor, dtype: torch.dtype
) -> Tensor:
    y = digits(codes, stored, None) * step
    return (y if bias is None else y + bias).to(dtype)


def tiles_of_codes(
    codes: Tensor, stored: UniformCodes, bias: Tensor | None, step: Tensor, dtype: torch.dtype
) -> Tensor:
    y = integer_tiles(codes, stored, None) * step
    return (y if bias is None else y + bias).to(dtype)


# What those functions ask for, in words.
NEEDS = {
    _any: "tensors that lie as C expects them",
    _whole_slots: f"groups of a multiple of {SLOT} columns",
    _whole_blocks: f"groups that are whole blocks of {BLOCK} columns (nf4: of 32)",
    _whole_rows: f"groups and rows that are whole blocks of {BLOCK} columns",
    _half_groups: f"4 bits, groups of a multiple of {BLOCK // 2} columns and rows of {BLOCK}",
    _centred: "one scale a row, and a zero in the middle",
    _whole_vectors: "a factor of a multiple of 16 columns",
}


def _row(
    view: type[View],
    tokens: range,
    dtypes: tuple[torch.dtype, ...],
    fits: Callable[[Any], bool],
    kernel: Kernel,
) -> Row:
    """A row that also asks whether the library is there and whether C can read the tensors."""
    return Row(
        view,
        "cpu",
        tokens,
        dtypes,
        compiled,
        lambda view: fits(view) and structs(view) is not None,
        kernel,
        needs=NEEDS[fits],
    )


ROWS = (
    #    view          tokens      activations          fits            kernel
    _row(UniformCodes, FEW, (torch.int8,), _whole_slots, digits_of_codes),
    _row(UniformCodes, MANY, (torch.int8,), _centred, tiles_of_codes),
    _row(UniformCodes, FEW, ALL, _whole_slots, digits),
    _row(UniformCodes, FEW_FLOATS, ALL, _any, floats),
    _row(UniformCodes, MANY, ALL, _any, tiles),
    _row(LevelCodes, FEW, HALF, _whole_blocks, digits),
    _row(LevelCodes, FEW_FLOATS, ALL, _whole_blocks, floats),
    _row(LevelCodes, MANY, ALL, _whole_blocks, tiles),
    _row(TableCodes, FEW, HALF, _half_groups, digits),
    _row(TableCodes, FEW_FLOATS, ALL, _whole_blocks, floats),
    _row(TableCodes, MANY, ALL, _whole_blocks, tiles),
    _row(SalientCodes, FEW_SALIENT, HALF, _whole_rows, digits),
    _row(SalientCodes, FEW_FLOATS, ALL, _whole_blocks, floats),
    _row(SalientCodes, MANY, ALL, _whole_blocks, tiles),
    _row(Transform, MANY, ALL, _whole_vectors, transform),
)
