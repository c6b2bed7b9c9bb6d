"""Products of few tokens with packed weights on a GPU: what the few-token kernels are given.

Legend: O out_features, I in_features, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bitpack import BLOCK, unpack
from ..views import LevelCodes, Numbers, SalientCodes, Stored, TableCodes, UniformCodes

MOST = 16  # tokens of a call
PARTS = 3  # widths of a weight that one launch can read
STAGES = 4  # steps of a program whose data are on their way through shared memory
SHARED = 99 << 10  # bytes that a program may have on the smallest card (RTX 30 and 40)
MANY_ROWS = 8192


class Tile(NamedTuple):
    """What a program computes: `rows` of the weight, whose blocks its `splits` warps share."""

    rows: int
    splits: int


def tile(rows: int, tokens: int, bits: int, wide: bool = False) -> Tile:
    """The tile of a weight with so many rows and bits: enough programs for every multiprocessor,
    and enough blocks for every warp, within the shared memory of the smallest card.

    wide: a row of the product takes so many registers that a program can only have few. Measured on
    an H200 (tests/bench/gpu_check.py --only tiles).
    """
    if rows >= MANY_ROWS:
        return Tile(16 if wide else 32, 4)
    few_rows = wide or tokens <= 4 or ring_bytes(Tile(32, 8), bits) > SHARED
    return Tile(16, 8) if few_rows else Tile(32, 8)


def ring_bytes(used: Tile, bits: int) -> int:
    """Shared memory of a program: of each stage, row and warp, a block of codes and two words."""
    return STAGES * used.rows * used.splits * (BLOCK * bits // 8 + 8)


def uniform(x: Tensor, stored: UniformCodes, bias: Tensor | None) -> Tensor:
    """F.linear of at most `MOST` tokens with uniform codes."""
    return _uniform(x, stored, bias, None, x.dtype)


def uniform_codes(
    codes: Tensor, stored: UniformCodes, bias: Tensor | None, step: Tensor, dtype: torch.dtype
) -> Tensor:
    """y [M, O] in `dtype` of int8 codes [M, I] of activations and their steps [M, 1]. 16-bit floats
    hold such codes exactly.
    """
    return _uniform(codes, stored, bias, step, dtype)


def _uniform(
    x: Tensor, stored: UniformCodes, bias: Tensor | None, step: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from .uniform_few import uniform_few

    x_MI, y_MO = _activations(x, stored, dtype)
    bits, counts, starts, zero_steps, blocks = stored.once("parts", lambda: _parts(stored))
    zeros = zero_points(stored)
    scale, zero = stored.scale, stored.zero
    own_zero = zeros is not None
    scale_words = None
    if isinstance(scale, Tensor):
        scale_words = stored.once("scale", lambda: as_words(scale))
    small = stored.groups > 1 and stored.group_size < BLOCK // 2
    used = tile(stored.rows, len(x_MI), max(bits), wide=small)
    uniform_few[(-(-stored.rows // used.rows),)](
        x_MI,
        stored.weight,
        x_MI if scale_words is None else scale_words,
        zeros if own_zero else x_MI,
        x_MI if blocks is None else blocks,
        x_MI if bias is None else bias,
        x_MI if step is None else step,
        y_MO,
        *counts,
        *starts,
        *zero_steps,
        1.0 if scale_words is not None else scale,
        0.0 if own_zero else zero,
        len(x_MI),
        stored.rows,
        stored.columns,
        stored.groups,
        stored.weight.shape[1],
        BITS0=bits[0],
        BITS1=bits[1],
        BITS2=bits[2],
        GROUP=group_size(stored),
        SCALES=8 * scale.element_size() if isinstance(scale, Tensor) else 0,
        ZEROS=own_zero,
        LISTED=blocks is not None,
        STEPS=step is not None,
        UNITS=-(-(stored.columns % BLOCK) // 32),
        **_constants(x_MI, bias, used),
    )  # fmt: skip
    return y_MO.view(*x.shape[:-1], stored.rows)


def levels(x: Tensor, stored: LevelCodes, bias: Tensor | None) -> Tensor:
    """F.linear of at most `MOST` tokens with 2-bit codes of levels."""
    return _levels(x, stored, salient_columns(stored), bias, x.dtype)


def signs(x: Tensor, stored: SalientCodes) -> Tensor:
    """The product of at most `MOST` tokens with all weights as plain ones, fp32 [M, O]."""
    return _levels(x, stored, None, None, torch.float32)


def levels_kind(stored: LevelCodes | SalientCodes) -> tuple[int, int]:
    """Which formula of levels_few.py serves, and how many means a row and group have."""
    if isinstance(stored, SalientCodes):
        return 2, 1
    return (0, 0) if stored.mean is None else (1, stored.mean.shape[2])


def salient_columns(stored: LevelCodes) -> Tensor | None:
    """uint8 [I], 1 in salient columns; None if no column is."""
    bits = stored.salient
    if bits is None:
        return None
    return stored.once("salient", lambda: unpack(bits, 1, stored.columns))


def _levels(
    x: Tensor,
    stored: LevelCodes | SalientCodes,
    salient: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from .levels_few import levels_few

    x_MI, y_MO = _activations(x, stored, dtype)
    kind, means = levels_kind(stored)
    mean = stored.mean
    used = tile(stored.rows, len(x_MI), 2, wide=salient is not None)
    levels_few[(-(-stored.rows // used.rows),)](
        x_MI,
        stored.weight,
        stored.once("scale", lambda: as_words(stored.scale)),
        x_MI if mean is None else stored.once("mean", lambda: as_words(mean)),
        x_MI if salient is None else salient,
        x_MI if bias is None else bias,
        y_MO,
        len(x_MI),
        stored.rows,
        stored.columns,
        stored.groups,
        stored.weight.shape[1],
        KIND=kind,
        MEANS=means,
        GROUP=group_size(stored),
        **_constants(x_MI, bias, used),
    )
    return y_MO.view(*x.shape[:-1], stored.rows)


def table(x: Tensor, stored: TableCodes, bias: Tensor | None) -> Tensor:
    """F.linear of at most `MOST` tokens with 4-bit codes of a table, whose levels are rounded to
    the dtype of x.
    """
    from .table_few import table_few

    x_MI, y_MO = _activations(x, stored, x.dtype)
    used = tile(stored.rows, len(x_MI), stored.bits)
    scale, shift = stored.scale, stored.shift
    table_few[(-(-stored.rows // used.rows),)](
        x_MI,
        stored.weight,
        *numbers(scale, x_MI, as_words),
        x_MI if shift is None else as_words(shift.values),
        x_MI if shift is None else shift.step,
        x_MI if bias is None else bias,
        y_MO,
        len(x_MI),
        stored.rows,
        stored.columns,
        stored.groups,
        stored.columns // 8,
        LEVELS=stored.once(("levels", x.dtype), lambda: _patterns(stored.levels, x.dtype)),
        GROUP=stored.group_size,
        CODED=scale.map is not None,
        SHIFTED=shift is not None,
        **_constants(x_MI, bias, used),
    )
    return y_MO.view(*x.shape[:-1], stored.rows)


def _patterns(levels: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """The bits of the levels in a 16-bit dtype."""
    bits: list[int] = levels.to(dtype).view(torch.int16).int().bitwise_and(0xFFFF).tolist()
    return tuple(bits)


def numbers(
    given: Numbers, absent: Tensor, values: Callable[[Tensor], Tensor] = lambda codes: codes
) -> list[Tensor]:
    """values, map, step and mean, with some tensor in place of what is absent."""
    found = (values(given.values), given.map, given.step, given.mean)
    return [absent if part is None else part for part in found]


def as_words(numbers: Tensor) -> Tensor:
    """fp16 numbers and bytes as int32 words: a copy to shared memory has at least 4 bytes. fp32
    numbers stay.
    """
    return numbers if numbers.element_size() == 4 else numbers.flatten().view(torch.int32)


def group_size(stored: UniformCodes | LevelCodes | SalientCodes) -> int:
    """As kernels want it: 0 if rows have one group."""
    return 0 if stored.groups == 1 else stored.group_size


def _activations(x: Tensor, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, I] as kernels read it, and an empty y [M, O]."""
    x_MI = x.reshape(-1, stored.columns).contiguous()
    return x_MI, torch.empty(len(x_MI), stored.rows, dtype=dtype, device=x.device)


def _constants(x_MI: Tensor, bias: Tensor | None, used: Tile) -> dict[str, Any]:
    return {
        "BIAS": bias is not None,
        "HALF": x_MI.dtype == torch.float16,
        "R": used.rows,
        "S": used.splits,
        "T": 8 if len(x_MI) <= 8 else 16,
        "num_warps": used.splits,
    }


def zero_points(stored: UniformCodes) -> Tensor | None:
    """The zero points as bytes, which a kernel can load, in int32 words [O G / 4]; None if one
    serves all. They take 8 bits a group more on the GPU than in the file.
    """
    if not isinstance(stored.zero, Tensor):
        return None
    packed, numbers = stored.zero, stored.rows * stored.groups
    return stored.once("zeros", lambda: as_words(unpack(packed, stored.zero_bits, numbers)))


class _Parts(NamedTuple):
    """Of `PARTS` parts: bits; blocks; first words, but the first part's; worths of a stored zero;
    and the numbers of all listed blocks.
    """

    bits: list[int]
    counts: list[int]
    starts: list[int]
    zero_steps: list[float]
    blocks: Tensor | None


def _parts(stored: UniformCodes) -> _Parts:
    none = PARTS - len(stored.parts)
    bits = [part.bits for part in stored.parts] + [0] * none
    counts = [part.columns // BLOCK for part in stored.parts] + [0] * none
    starts = [part.start // 4 for part in stored.parts[1:]] + [0] * none
    steps = [part.zero_step for part in stored.parts] + [1.0] * none
    blocks = None
    if stored.parts[0].blocks is not None:
        listed = [part.blocks for part in stored.parts if part.blocks is not None]
        blocks = torch.cat(listed)
    return _Parts(bits, counts, starts, steps, blocks)
