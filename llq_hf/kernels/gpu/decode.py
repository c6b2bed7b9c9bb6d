"""Dense weights of packed ones on a GPU, and products with them.

Legend: O out_features, I in_features, T tokens, S salient weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bitpack import BLOCK, UNIT, unpack
from ..products import decoded_product, integer_product
from ..views import LevelCodes, SalientCodes, Stored, TableCodes, UniformCodes
from .few import group_size, levels_kind, numbers, salient_columns, zero_points

ROWS, UNITS = 8, 16  # of a program: rows, and units of 16 columns
ENTRIES = 128  # of a row's salient weights at a time, to decode them
FEW_ROWS, FEW_ENTRIES = 4, 256  # to multiply with them


def decoded(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], rounded to `dtype` from the fp32 that torch decodes; int8: uniform codes
    minus their zero point.
    """
    weight_OI = torch.empty(stored.rows, stored.columns, dtype=dtype, device=stored.weight.device)
    decoders: dict[type, Any] = {
        UniformCodes: _uniform,
        LevelCodes: _levels,
        SalientCodes: _salient,
        TableCodes: _table,
    }
    decoders[type(stored)](stored, weight_OI)
    return weight_OI


def multiply(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """F.linear with the decoded weight; differentiable."""
    return decoded_product(x, lambda dtype: decoded(stored, dtype), bias)


def multiply_codes(
    codes: Tensor, stored: UniformCodes, bias: Tensor | None, step: Tensor, dtype: torch.dtype
) -> Tensor:
    """y [T, O] in `dtype` of int8 codes [T, I] of activations and their steps [T, 1], with int32
    sums. Each row of the weight has one scale, and its zero is the middle code.
    """
    assert isinstance(stored.scale, Tensor)
    y_TO = integer_product(codes, decoded(stored, torch.int8)) * step
    y_TO *= stored.scale.float().T
    return (y_TO if bias is None else y_TO + bias).to(dtype)


def _grid(rows: int, pieces: int, of_a_program: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-pieces // of_a_program)


def _uniform(stored: UniformCodes, weight_OI: Tensor) -> None:
    from .dense import dense_uniform

    integers = weight_OI.dtype == torch.int8
    zeros, scale, zero = zero_points(stored), stored.scale, stored.zero
    own_scale = isinstance(scale, Tensor) and not integers
    for part in stored.parts:
        whole = part.columns // BLOCK
        words = stored.weight[:, part.start // 4 :]
        for tail, pieces in ((False, whole * 8), (True, -(-(part.columns % BLOCK) // UNIT))):
            if not pieces:
                continue
            dense_uniform[_grid(stored.rows, pieces, 1 if tail else UNITS)](
                words,
                scale if own_scale else words,
                words if zeros is None else zeros.view(torch.uint8),
                words if part.blocks is None else part.blocks,
                weight_OI,
                stored.rows,
                stored.columns,
                stored.groups,
                whole,
                words.stride(0),
                1.0 if own_scale or integers else scale,
                0.0 if zeros is not None else zero,
                part.zero_step,
                BITS=part.bits,
                GROUP=group_size(stored),
                SCALES=own_scale,
                ZEROS=zeros is not None,
                LISTED=part.blocks is not None,
                TAIL=tail,
                BN=ROWS,
                U=2 if tail else UNITS,
                enable_fp_fusion=False,
            )


def _levels(stored: LevelCodes | SalientCodes, weight_OI: Tensor) -> None:
    from .dense import dense_levels

    kind, means = levels_kind(stored)
    salient = salient_columns(stored) if isinstance(stored, LevelCodes) else None
    tail_units = -(-(stored.columns % BLOCK) // UNIT)
    for tail, pieces in ((False, stored.columns // BLOCK * 8), (True, tail_units)):
        if not pieces:
            continue
        dense_levels[_grid(stored.rows, pieces, 1 if tail else UNITS)](
            stored.weight,
            stored.scale,
            stored.weight if stored.mean is None else stored.mean,
            stored.weight if salient is None else salient,
            weight_OI,
            stored.rows,
            stored.columns,
            stored.groups,
            stored.weight.shape[1],
            KIND=kind,
            MEANS=means,
            GROUP=group_size(stored),
            TAIL=tail,
            BN=ROWS,
            U=2 if tail else UNITS,
            enable_fp_fusion=False,
        )


def _table(stored: TableCodes, weight_OI: Tensor) -> None:
    from .dense import dense_table

    scale, shift = stored.scale, stored.shift
    dense_table[_grid(stored.rows, -(-stored.columns // 16), UNITS)](
        stored.weight,
        stored.levels,
        *numbers(scale, stored.weight),
        stored.weight if shift is None else shift.values,
        stored.weight if shift is None else shift.step,
        weight_OI,
        stored.rows,
        stored.columns,
        stored.groups,
        stored.columns * stored.bits // 32,
        BITS=stored.bits,
        GROUP=stored.group_size,
        CODED=scale.map is not None,
        MEAN=scale.mean is not None,
        SHIFTED=shift is not None,
        BN=ROWS,
        U=UNITS,
        enable_fp_fusion=False,
    )


def _salient(stored: SalientCodes, weight_OI: Tensor) -> None:
    from .salient import put_salient

    _levels(stored, weight_OI)
    listed = salient_list(stored)
    put_salient[(-(-stored.rows // ROWS),)](
        *listed,
        stored.own_scale,
        stored.own_zero,
        weight_OI,
        stored.rows,
        stored.columns,
        BN=ROWS,
        E=ENTRIES,
        enable_fp_fusion=False,
    )


class SalientList(NamedTuple):
    """The salient weights by rows: the first entry of each row and the end [O + 1], and of each
    entry its column (its low 16 bits) and its 8-bit code [S]. 24 bits for each salient weight
    beside what the file stores.
    """

    first: Tensor
    column: Tensor
    code: Tensor


def salient_list(stored: SalientCodes) -> SalientList:
    """The list of a weight, made once from the stored positions."""
    return stored.once("list", lambda: _make_list(stored))


def _make_list(stored: SalientCodes) -> SalientList:
    ones_S = torch.nonzero_static(unpack(stored.high, 1, stored.unary), size=stored.count).flatten()
    at_S = (ones_S - torch.arange(stored.count, device=ones_S.device)) << stored.low_bits
    if stored.low is not None:
        at_S |= unpack(stored.low, stored.low_bits, stored.count)
    row_S = torch.div(at_S, stored.columns, rounding_mode="floor")
    signs_N = unpack(stored.weight, 1, stored.columns).flatten()
    code_S = unpack(stored.code, 7, stored.count) | signs_N[at_S] << 7
    first = torch.searchsorted(row_S, torch.arange(stored.rows + 1, device=row_S.device))
    column_S = (at_S - row_S * stored.columns).to(torch.int16)  # wraps around; read as unsigned
    return SalientList(first.int(), column_S, code_S.to(torch.uint8))


def multiply_salient(x: Tensor, stored: SalientCodes, bias: Tensor | None) -> Tensor:
    """F.linear of few tokens: all weights as plain ones, and what salient weights add."""
    from .few import signs
    from .salient import add_salient

    x_TI = x.reshape(-1, stored.columns).contiguous()
    plain_TO = signs(x_TI, stored)
    y_TO = torch.empty(len(x_TI), stored.rows, dtype=x.dtype, device=x.device)
    add_salient[(-(-stored.rows // FEW_ROWS), len(x_TI))](
        x_TI,
        *salient_list(stored),
        stored.scale,
        stored.mean,
        stored.own_scale,
        stored.own_zero,
        plain_TO,
        x_TI if bias is None else bias,
        y_TO,
        len(x_TI),
        stored.rows,
        stored.columns,
        stored.groups,
        GROUP=group_size(stored),
        BIAS=bias is not None,
        BN=FEW_ROWS,
        E=FEW_ENTRIES,
    )
    return y_TO.view(*x.shape[:-1], stored.rows)
