"""Packed weights decoded to dense ones, bit for bit as torch does, by one read of the stored bytes
and one write: what many tokens, fp32 activations and training are multiplied with.

Legend: O rows, K columns, G groups; a *unit* is 16 neighbouring columns: field f of all bytes of a
chunk (bitpack.py). BN rows and U units of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def joined(v0, v1, v2, v3):
    """[.., 4] of four [..]."""
    return tl.join(tl.join(v0, v2), tl.join(v1, v3))


@triton.jit
def add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS: tl.constexpr, v: tl.constexpr):
    """Codes of bytes 0 .. 3 of four words [BN, U, 4], with the plane of width v below their bits."""
    if BITS & v:
        before: tl.constexpr = BITS & ~(2 * v - 1)
        per: tl.constexpr = 8 // v
        word = tl.arange(0, 4)
        at = block * (4 * BITS) + 4 * before + 4 * (i // per)
        words = tl.load(rows_ptr + (at[None, :, None] + word[None, None, :]), mask=live, other=0)
        words = words.to(tl.uint32, bitcast=True) >> (i % per * v)[None, :, None].to(tl.uint32)
        mask: tl.constexpr = (1 << v) - 1
        c0 = (c0 << v) | (words & mask)
        c1 = (c1 << v) | ((words >> 8) & mask)
        c2 = (c2 << v) | ((words >> 16) & mask)
        c3 = (c3 << v) | ((words >> 24) & mask)
    return c0, c1, c2, c3


@triton.jit
def codes_of(rows_ptr, unit, live, BITS: tl.constexpr, BN: tl.constexpr, U: tl.constexpr):
    """Codes [BN, 16 U] int32 of whole blocks; rows_ptr [BN, 1, 1]."""
    c = tl.zeros((BN, U, 4), tl.uint32)
    block, i = unit // 8, unit % 8
    c0, c1, c2, c3 = add_plane(c, c, c, c, rows_ptr, block, i, live, BITS, 8)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 4)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 2)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 1)
    return tl.reshape(joined(c0, c1, c2, c3), (BN, U * 16)).to(tl.int32)


@triton.jit
def tail_plane(codes, words_ptr, column, live, BITS: tl.constexpr, v: tl.constexpr):
    """Codes with the bits of the plane of width v below theirs, in a unit of 32 columns."""
    if BITS & v:
        byte = column % (4 * v)
        at = (BITS & ~(2 * v - 1)) + byte // 4
        word = tl.load(words_ptr + at[None, :], mask=live, other=0).to(tl.uint32, bitcast=True)
        field = word >> (byte % 4 * 8 + column // (4 * v) * v)[None, :].to(tl.uint32)
        codes = (codes << v) | (field & ((1 << v) - 1)).to(tl.int32)
    return codes


@triton.jit
def tail_codes(words_ptr, column, live, BITS: tl.constexpr):
    """Codes [BN, 32] of columns 0 .. 31 of a unit of 32; words_ptr [BN, 1]."""
    codes = live.to(tl.int32) * 0
    codes = tail_plane(codes, words_ptr, column, live, BITS, 8)
    codes = tail_plane(codes, words_ptr, column, live, BITS, 4)
    codes = tail_plane(codes, words_ptr, column, live, BITS, 2)
    return tail_plane(codes, words_ptr, column, live, BITS, 1)


@triton.jit
def put(y_ptr, rows, column, K, values, live):
    """Write values [BN, ..] into y [O, K]."""
    at = rows.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(y_ptr + at, values.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def uniform_values(
    codes, scale_ptr, zero_ptr, at, live, scale_value, zero_value, zero_step,
    SCALES: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """(code - zero) * scale in fp32; at: of each code's row and group."""
    zero, scale = zero_value, scale_value
    if ZEROS:
        zero = tl.load(zero_ptr + at, mask=live, other=0).to(tl.float32) * zero_step
    if SCALES:
        scale = tl.load(scale_ptr + at, mask=live, other=0).to(tl.float32)
    return (codes.to(tl.float32) - zero) * scale


@triton.jit
def dense_uniform(
    w_ptr, scale_ptr, zero_ptr, blocks_ptr, y_ptr, O, K, G, count, row_words,
    scale_value, zero_value, zero_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr,
    LISTED: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y [O, K] of uniform codes: the `count` whole blocks of a part, or with TAIL what comes after
    them, in units of 32 columns.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, O - 1).to(tl.int64)
    if TAIL:
        own = tl.arange(0, 32)
        column = count * 128 + tl.program_id(1) * 32 + own
        live = (rows < O)[:, None] & (column < K)[None, :]
        words_ptr = w_ptr + safe[:, None] * row_words + count * (4 * BITS) + tl.program_id(1) * BITS
        codes = tail_codes(words_ptr, own, (rows < O)[:, None] & (own < 32)[None, :], BITS)
    else:
        unit = tl.program_id(1) * U + tl.arange(0, U)
        inside = (rows < O)[:, None, None] & (unit < count * 8)[None, :, None]
        codes = codes_of(w_ptr + safe[:, None, None] * row_words, unit, inside, BITS, BN, U)
        column = tl.program_id(1) * (U * 16) + tl.arange(0, U * 16)
        live = (rows < O)[:, None] & (column < count * 128)[None, :]
        if LISTED:
            block = tl.load(blocks_ptr + column // 128, mask=column < count * 128, other=0)
            column = block * 128 + column % 128
    group = column * 0
    if GROUP:
        group = tl.minimum(column // GROUP, G - 1)
    at = safe[:, None] * G + group[None, :]
    values = uniform_values(
        codes, scale_ptr, zero_ptr, at, live, scale_value, zero_value, zero_step, SCALES, ZEROS
    )
    put(y_ptr, rows, column, K, values, live)


@triton.jit
def level_at(ptr, at, i: tl.constexpr, each: tl.constexpr, live):
    """Number i of the `each` levels that a row and group have, fp32."""
    return tl.load(ptr + at * each + i, mask=live, other=0).to(tl.float32)


@triton.jit
def dense_levels(
    w_ptr, scale_ptr, mean_ptr, salient_ptr, y_ptr, O, K, G, row_words,
    KIND: tl.constexpr, MEANS: tl.constexpr, GROUP: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y [O, K] of 1- and 2-bit codes of levels; KIND 0 DUAL, 1 SPLIT, 2 SIGNS (levels_few.py)."""
    BITS: tl.constexpr = 1 if KIND == 2 else 2
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, O - 1).to(tl.int64)
    count = K // 128
    if TAIL:
        own = tl.arange(0, 32)
        column = count * 128 + tl.program_id(1) * 32 + own
        live = (rows < O)[:, None] & (column < K)[None, :]
        words_ptr = w_ptr + safe[:, None] * row_words + count * (4 * BITS) + tl.program_id(1) * BITS
        codes = tail_codes(words_ptr, own, (rows < O)[:, None] & (own < 32)[None, :], BITS)
    else:
        unit = tl.program_id(1) * U + tl.arange(0, U)
        inside = (rows < O)[:, None, None] & (unit < count * 8)[None, :, None]
        codes = codes_of(w_ptr + safe[:, None, None] * row_words, unit, inside, BITS, BN, U)
        column = tl.program_id(1) * (U * 16) + tl.arange(0, U * 16)
        live = (rows < O)[:, None] & (column < count * 128)[None, :]
    group = column * 0
    if GROUP:
        group = tl.minimum(column // GROUP, G - 1)
    at = safe[:, None] * G + group[None, :]
    first, second = codes >> 1, codes & 1
    if KIND == 0:
        values = second.to(tl.float32) * level_at(scale_ptr, at, 0, 2, live)
        values = values + first.to(tl.float32) * level_at(scale_ptr, at, 1, 2, live)
    elif KIND == 2:
        sign = second.to(tl.float32) * 2 - 1
        values = sign * level_at(scale_ptr, at, 0, 1, live) + level_at(mean_ptr, at, 0, 1, live)
    else:
        salient = tl.load(salient_ptr + column, mask=column < K, other=0)[None, :] != 0
        scale = tl.where(first > 0, level_at(scale_ptr, at, 1, 4, live), level_at(scale_ptr, at, 0, 4, live))  # fmt: skip
        mean = tl.where(first > 0, level_at(mean_ptr, at, 1, MEANS, live), level_at(mean_ptr, at, 0, MEANS, live))  # fmt: skip
        plain = tl.where(second > 0, mean + scale, mean - scale)
        a1, a2 = level_at(scale_ptr, at, 2, 4, live), level_at(scale_ptr, at, 3, 4, live)
        if MEANS == 4:
            m1, m2 = level_at(mean_ptr, at, 2, MEANS, live), level_at(mean_ptr, at, 3, MEANS, live)
        else:
            m2 = level_at(mean_ptr, at, 2, MEANS, live)
            m1 = m2 * 0
        two = tl.where(first > 0, m1 + a1, m1 - a1) + tl.where(second > 0, m2 + a2, m2 - a2)
        values = tl.where(salient, two, plain)
    put(y_ptr, rows, column, K, values, live)


@triton.jit
def number(values_ptr, map_ptr, step_ptr, mean_ptr, at, live, CODED: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """fp32 numbers, stored as they are or as codes (`Numbers` in views.py)."""
    value = tl.load(values_ptr + at, mask=live, other=0)
    if CODED:
        found = tl.load(map_ptr + value.to(tl.int32)) * tl.load(step_ptr + at // 256, mask=live, other=0)  # fmt: skip
        if MEAN:
            found = found + tl.load(mean_ptr)
        return found
    else:
        return value


@triton.jit
def dense_table(
    w_ptr, levels_ptr, scale_ptr, map_ptr, step_ptr, mean_ptr, shift_ptr, shift_step_ptr, y_ptr,
    O, K, G, row_words,
    BITS: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr, MEAN: tl.constexpr,
    SHIFTED: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y [O, K] of codes of a table: levels[code] * scale + shift."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, O - 1).to(tl.int64)
    column = tl.program_id(1) * (U * 16) + tl.arange(0, U * 16)
    live = (rows < O)[:, None] & (column < K)[None, :]
    if BITS == 4:  # of two codes in a byte, the first lies in the high half
        at = safe[:, None] * row_words + (column // 8)[None, :]
        word = tl.load(w_ptr + at, mask=live, other=0).to(tl.uint32, bitcast=True)
        shift = column % 8 // 2 * 8 + (1 - column % 2) * 4
        codes = ((word >> shift[None, :].to(tl.uint32)) & 15).to(tl.int32)
    else:
        unit = tl.program_id(1) * U + tl.arange(0, U)
        inside = (rows < O)[:, None, None] & (unit < K // 16)[None, :, None]
        codes = codes_of(w_ptr + safe[:, None, None] * row_words, unit, inside, BITS, BN, U)
    at = safe[:, None] * G + (column // GROUP)[None, :]
    scale = number(scale_ptr, map_ptr, step_ptr, mean_ptr, at, live, CODED, MEAN)
    values = tl.load(levels_ptr + codes) * scale
    if SHIFTED:
        values = values + number(shift_ptr, map_ptr, shift_step_ptr, mean_ptr, at, live, True, False)  # fmt: skip
    put(y_ptr, rows, column, K, values, live)
