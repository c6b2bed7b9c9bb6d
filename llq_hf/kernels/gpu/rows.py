"""The rows of the Triton kernels for NVIDIA GPUs.

For at most 16 tokens, the codes are multiplied where they lie; for more, and for fp32 activations,
they are decoded to a dense weight first. Both read the stored tensors as they are;
`few.zero_points` and `decode.salient_list` name what is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..bitpack import BLOCK, UNIT
from ..rows import ALL, HALF, MANY, Kernel, Row
from ..views import (
    Division,
    Kronecker,
    LevelCodes,
    SalientCodes,
    Stored,
    TableCodes,
    TokenGrid,
    Transform,
    Turn,
    UniformCodes,
    View,
)
from . import decode, few, ready, turns

FEW = range(1, few.MOST + 1)
FEW_SALIENT = range(1, 5)  # the list is read once for each token
FEW_TURNS = range(1, 33)  # more tokens fill torch's own matrix products
INTEGER_SIZE = 8  # what CUDA's integer product wants the weight's sides to be multiples of


def _there(view: View) -> bool:
    """Whether the tensors lie on a GPU as kernels expect it."""
    return all(tensor.is_contiguous() and tensor.is_cuda for tensor in view.tensors)


def groups_fit(stored: Stored) -> bool:
    """Whether groups are whole blocks, or whole parts of whole blocks that are units of 32 columns;
    and whether their numbers are whole words.
    """
    size = stored.group_size
    parts = BLOCK % size == 0 and size % UNIT == 0 and stored.columns % BLOCK == 0
    words = stored.rows * stored.groups % 4 == 0
    return words and (stored.groups == 1 or size % BLOCK == 0 or parts)


def _uniform_few(stored: UniformCodes) -> bool:
    simple = len(stored.parts) == 1 and stored.parts[0].start == 0
    listed = stored.columns % BLOCK == 0 and len(stored.parts) <= few.PARTS
    whole = stored.columns % 8 == 0 and stored.columns >= BLOCK
    return _there(stored) and groups_fit(stored) and whole and (simple or listed)


def _centred(stored: UniformCodes) -> bool:
    sides = stored.columns % INTEGER_SIZE == 0 and stored.rows % INTEGER_SIZE == 0
    return _there(stored) and stored.centred and sides


def _levels_few(stored: LevelCodes) -> bool:
    whole = stored.columns % BLOCK == 0
    split = stored.mean is None or stored.whole_blocks
    halves = stored.scale.dtype == torch.float16
    return _there(stored) and groups_fit(stored) and whole and split and halves


def _salient_few(stored: SalientCodes) -> bool:
    whole = stored.columns % BLOCK == 0 and stored.scale.dtype == torch.float16
    return _short_rows(stored) and groups_fit(stored) and whole


def _short_rows(stored: SalientCodes) -> bool:
    return _there(stored) and stored.columns <= 1 << 16


def _table_few(stored: TableCodes) -> bool:
    whole = stored.bits == 4 and stored.columns % max(BLOCK, stored.group_size) == 0
    return _there(stored) and whole and groups_fit(stored)


def _turn(by: Turn) -> bool:
    return _there(by) and turns.fits(by)


def _table(stored: TableCodes) -> bool:
    return _there(stored) and stored.whole_blocks and stored.columns % UNIT == 0


def _row(
    view: type[Any],
    tokens: range,
    dtypes: tuple[torch.dtype, ...],
    available: Callable[[], bool],
    fits: Callable[[Any], bool],
    kernel: Kernel,
    differentiable: bool = False,
) -> Row:
    @wraps(kernel)
    def launched(x: Tensor, *args: Any, **more: Any) -> Any:
        with ready.device_of(x):
            return kernel(x, *args, **more)

    return Row(view, "cuda", tokens, dtypes, available, fits, launched, differentiable)


INT8 = (torch.int8,)
ROWS = (
    #    view          tokens       activations  needs        fits          kernel
    _row(UniformCodes, FEW, INT8, ready.few, _uniform_few, few.uniform_codes),
    _row(UniformCodes, MANY, INT8, ready.dense, _centred, decode.multiply_codes),
    _row(UniformCodes, FEW, HALF, ready.few, _uniform_few, few.uniform),
    _row(UniformCodes, MANY, ALL, ready.dense, _there, decode.multiply, True),
    _row(LevelCodes, FEW, HALF, ready.few, _levels_few, few.levels),
    _row(LevelCodes, MANY, ALL, ready.dense, _there, decode.multiply, True),
    _row(TableCodes, FEW, HALF, ready.few, _table_few, few.table),
    _row(TableCodes, MANY, ALL, ready.dense, _table, decode.multiply, True),
    _row(SalientCodes, FEW_SALIENT, HALF, ready.few, _salient_few, decode.multiply_salient),
    _row(SalientCodes, MANY, ALL, ready.dense, _short_rows, decode.multiply, True),
    _row(Transform, FEW_TURNS, ALL, ready.dense, _turn, turns.transform),
    _row(Kronecker, FEW_TURNS, ALL, ready.dense, _turn, turns.transform),
    _row(Division, MANY, ALL, ready.dense, _there, turns.divided),
    _row(TokenGrid, MANY, ALL, ready.dense, turns.fits_one_program, turns.tokens),
)
