"""Packed weights decoded to dense ones, bit for bit as torch does, by one read of the stored bytes
and one write: what many tokens, fp32 activations and training are multiplied with.

Legend: O rows, K columns, G groups; a *unit* is 16 neighbouring columns: field f of all bytes of a
chunk (bitpack.py). A program has BN rows and U units.
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
    """Codes of bytes 0 .. 3 of four words [BN, U, 4], with the plane of width v below."""
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
    """Codes [BN, U, 16] int32 of whole blocks; rows_ptr [BN, 1, 1]."""
    c = tl.zeros((BN, U, 4), tl.uint32)
    block, i = unit // 8, unit % 8
    c0, c1, c2, c3 = add_plane(c, c, c, c, rows_ptr, block, i, live, BITS, 8)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 4)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 2)
    c0, c1, c2, c3 = add_plane(c0, c1, c2, c3, rows_ptr, block, i, live, BITS, 1)
    return tl.reshape(joined(c0, c1, c2, c3), (BN, U, 16)).to(tl.int32)


@triton.jit
def tail_plane(codes, words_ptr, column, live, BITS: tl.constexpr, v: tl.constexpr):
    """Codes with the bits of the plane of width v below theirs, in a unit of 32 columns."""
    if BITS & v:
        byte = column % (4 * v)
        at = (BITS & ~(2 * v - 1)) + byte // 4
        word = tl.load(words_ptr + at, mask=live, other=0).to(tl.uint32, bitcast=True)
        field = word >> (byte % 4 * 8 + column // (4 * v) * v).to(tl.uint32)
        codes = (codes << v) | (field & ((1 << v) - 1)).to(tl.int32)
    return codes


@triton.jit
def tail_codes(words_ptr, column, live, BITS: tl.constexpr):
    """Codes [BN, 2, 16] of columns 0 .. 31 of a unit of 32; words_ptr [BN, 1, 1]."""
    codes = live.to(tl.int32) * 0
    codes = tail_plane(codes, words_ptr, column, live, BITS, 8)
    codes = tail_plane(codes, words_ptr, column, live, BITS, 4)
    codes = tail_plane(codes, words_ptr, column, live, BITS, 2)
    return tail_plane(codes, words_ptr, column, live, BITS, 1)


@triton.jit
def read(
    w_ptr, O, K, row_words, count,
    BITS: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """A program's codes [BN, U, 16], their columns [1, U, 16], rows [BN, 1, 1], valid rows, and
    which of them there are: of `count` whole blocks, or with TAIL (U = 2) what comes after them, in
    units of 32 columns.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)[:, None, None]
    safe = tl.minimum(row, O - 1).to(tl.int64)
    own = tl.arange(0, U)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    column = tl.program_id(1) * (U * 16) + own
    rows_ptr = w_ptr + safe * row_words
    if TAIL:
        words_ptr = rows_ptr + (count * (4 * BITS) + tl.program_id(1) * BITS)
        codes = tail_codes(words_ptr, own, (row < O) & (own < 32), BITS)
        column += count * 128
        live = (row < O) & (column < K)
    else:
        unit = tl.program_id(1) * U + tl.arange(0, U)
        inside = (row < O) & (unit < count * 8)[None, :, None]
        codes = codes_of(rows_ptr, unit, inside, BITS, BN, U)
        live = (row < O) & (column < count * 128)
    return codes, column, row, safe, live


@triton.jit
def groups(safe, column, G, GROUP: tl.constexpr, U: tl.constexpr):
    """The place of each column's group: [BN, U, 1] where units lie in one, else [BN, U, 16]."""
    if GROUP == 0:
        return safe * G + tl.zeros((1, U, 1), tl.int32)
    elif GROUP % 16 == 0:
        first = tl.min(column, 2, keep_dims=True)
        return safe * G + tl.minimum(first // GROUP, G - 1)
    else:
        return safe * G + tl.minimum(column // GROUP, G - 1)


@triton.jit
def put(y_ptr, row, column, K, values, live, BN: tl.constexpr, U: tl.constexpr):
    """Write values [BN, U, 16] into y [O, K]."""
    values = tl.reshape(values.to(y_ptr.dtype.element_ty), (BN, U * 16))
    live = tl.reshape(live, (BN, U * 16))
    at = tl.reshape(row.to(tl.int64) * K + column, (BN, U * 16))
    tl.store(y_ptr + at, values, mask=live)


@triton.jit
def put_rows(y_ptr, first, K, values, O, last, BN: tl.constexpr, U: tl.constexpr):
    """The same for neighbouring columns from `first` on, up to `last`."""
    values = tl.reshape(values.to(y_ptr.dtype.element_ty), (BN, U * 16))
    row = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    column = (first + tl.arange(0, U * 16))[None, :]
    live = (row < O) & (column < last)
    tl.store(y_ptr + (row.to(tl.int64) * K + column), values, mask=live)


@triton.jit
def dense_uniform(
    w_ptr, scale_ptr, zero_ptr, blocks_ptr, y_ptr, O, K, G, count, row_words,
    scale_value, zero_value, zero_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr,
    LISTED: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y [O, K] of uniform codes: (code - zero) * scale."""
    codes, column, row, safe, live = read(w_ptr, O, K, row_words, count, BITS, TAIL, BN, U)
    if LISTED:
        block = tl.load(blocks_ptr + column // 128, mask=column < count * 128, other=0)
        column = block * 128 + column % 128
    at = groups(safe, column, G, GROUP, U)
    zero, scale = zero_value, scale_value
    if ZEROS:
        zero = tl.load(zero_ptr + at).to(tl.float32) * zero_step
    if SCALES:
        scale = tl.load(scale_ptr + at).to(tl.float32)
    values = (codes.to(tl.float32) - zero) * scale
    if LISTED or TAIL:
        put(y_ptr, row, column, K, values, live, BN, U)
    else:
        put_rows(y_ptr, tl.program_id(1) * (U * 16), K, values, O, count * 128, BN, U)


@triton.jit
def level_at(ptr, at, i: tl.constexpr, each: tl.constexpr):
    """Number i of the `each` levels that a row and group have, fp32."""
    return tl.load(ptr + at * each + i).to(tl.float32)


@triton.jit
def dense_levels(
    w_ptr, scale_ptr, mean_ptr, salient_ptr, y_ptr, O, K, G, row_words,
    KIND: tl.constexpr, MEANS: tl.constexpr, GROUP: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y [O, K] of 1- and 2-bit codes of levels; KIND 0 DUAL, 1 SPLIT, 2 SIGNS (levels_few.py)."""
    BITS: tl.constexpr = 1 if KIND == 2 else 2
    count = K // 128
    codes, column, row, safe, live = read(w_ptr, O, K, row_words, count, BITS, TAIL, BN, U)
    at = groups(safe, column, G, GROUP, U)
    first, second = codes >> 1, codes & 1
    if KIND == 0:
        values = second.to(tl.float32) * level_at(scale_ptr, at, 0, 2)
        values = values + first.to(tl.float32) * level_at(scale_ptr, at, 1, 2)
    elif KIND == 2:
        sign = second.to(tl.float32) * 2 - 1
        values = sign * level_at(scale_ptr, at, 0, 1) + level_at(mean_ptr, at, 0, 1)
    else:
        salient = tl.load(salient_ptr + column, mask=column < K, other=0) != 0
        a_low, a_mid = level_at(scale_ptr, at, 0, 4), level_at(scale_ptr, at, 1, 4)
        m_low, m_mid = level_at(mean_ptr, at, 0, MEANS), level_at(mean_ptr, at, 1, MEANS)
        low = tl.where(second > 0, m_low + a_low, m_low - a_low)
        mid = tl.where(second > 0, m_mid + a_mid, m_mid - a_mid)
        a1, a2 = level_at(scale_ptr, at, 2, 4), level_at(scale_ptr, at, 3, 4)
        if MEANS == 4:
            m1, m2 = level_at(mean_ptr, at, 2, MEANS), level_at(mean_ptr, at, 3, MEANS)
        else:
            m2 = level_at(mean_ptr, at, 2, MEANS)
            m1 = m2 * 0
        two = tl.where(first > 0, m1 + a1, m1 - a1) + tl.where(second > 0, m2 + a2, m2 - a2)
        values = tl.where(salient, two, tl.where(first > 0, mid, low))
    if TAIL:
        put(y_ptr, row, column, K, values, live, BN, U)
    else:
        put_rows(y_ptr, tl.program_id(1) * (U * 16), K, values, O, count * 128, BN, U)


@triton.jit
def number(values_ptr, map_ptr, step_ptr, mean_ptr, at, CODED: tl.constexpr, MEAN: tl.constexpr):
    """fp32 numbers, stored as they are or as codes (`Numbers` in views.py)."""
    value = tl.load(values_ptr + at)
    if CODED:
        found = tl.load(map_ptr + value.to(tl.int32)) * tl.load(step_ptr + at // 256)
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
    """y [O, K] of codes of a table: levels[code] * scale + shift. K: whole units of 32 columns."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)[:, None, None]
    safe = tl.minimum(row, O - 1).to(tl.int64)
    own = tl.arange(0, U)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    column = tl.program_id(1) * (U * 16) + own
    if BITS == 4:  # of two codes in a byte, the first lies in the high half
        at = safe * row_words + column // 8
        word = tl.load(w_ptr + at, mask=(row < O) & (column < K), other=0)
        shift = column % 8 // 2 * 8 + (1 - column % 2) * 4
        codes = ((word.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)) & 15).to(tl.int32)
    else:
        unit = tl.program_id(1) * U + tl.arange(0, U)
        inside = (row < O) & (unit < K // 16)[None, :, None]
        codes = codes_of(w_ptr + safe * row_words, unit, inside, BITS, BN, U)
    at = groups(safe, column, G, GROUP, U)
    scale = number(scale_ptr, map_ptr, step_ptr, mean_ptr, at, CODED, MEAN)
    values = tl.load(levels_ptr + codes) * scale
    if SHIFTED:
        values = values + number(shift_ptr, map_ptr, shift_step_ptr, mean_ptr, at, True, False)
    put_rows(y_ptr, tl.program_id(1) * (U * 16), K, values, O, K, BN, U)
