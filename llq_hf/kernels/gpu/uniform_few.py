"""Few tokens times uniform codes, on tensor cores, straight from the stored planes.

Legend: O rows, K columns, G groups, M tokens; S, R, T, n as in fragments.py. A *part* is the codes
of one width (views.py): most weights have one, SliM-LLM's up to three.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import (
    along,
    before,
    below,
    column_sums,
    first_four,
    group_of,
    load_x,
    offset,
    plane_sums,
    product_layout,
    right,
    store,
    weight_layout,
    word_offsets,
    x_columns,
    x_layout,
)


@gluon.jit
def block_number(blocks_ptr, index, count, LISTED: gl.constexpr):
    """The number of the 128 columns that block `index` of a part belongs to; a valid one beyond."""
    safe = gl.minimum(index, count - 1)
    return gl.load(blocks_ptr + safe) if LISTED else safe


@gluon.jit
def load_words(rows_ptr, index, count, BITS: gl.constexpr, WIDTH: gl.constexpr, n: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """A block's plane of n = WIDTH bits, or nothing where the codes have no such plane."""
    if BITS & WIDTH:
        at = gl.minimum(index, count - 1) * (4 * BITS) + 4 * before(BITS, WIDTH)
        return gl.load(rows_ptr + at + word_offsets(n, layout)).to(gl.uint32, bitcast=True)
    else:
        return gl.full([1, 1, 1, 1], 0, gl.uint32, layout=layout)


@gluon.jit
def add_plane(sums, of_x, x_ptr, words, block, live, K, M, first, BITS: gl.constexpr, n: gl.constexpr, GROUP: gl.constexpr, CENTRE: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The part of one plane in the sums of group `first` of a block, and the sums of x."""
    layout: gl.constexpr = x_layout(n, T, S)
    x = load_x(x_ptr, block, live, K, M, n, T, layout, kind)
    if GROUP != 0 and GROUP < 128:
        x = gl.where(x_columns(n, layout) // GROUP == first, x, gl.zeros_like(x))
    b = right(x, n, T, S, mma)
    weights: gl.constexpr = weight_layout(n, R, S)
    sums = plane_sums(sums, words, b, n, below(BITS, n), R, S, mantissa, kind, weights, mma)
    if CENTRE:
        of_x = column_sums(b, T, S, mma, kind)
    return sums, of_x


@gluon.jit
def part_sums(
    total, x_ptr, w_ptr, scale_ptr, zero_ptr, blocks_ptr, count, zero_step, scale_value, zero_value,
    M, O, K, G, row_words,
    BITS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
    LISTED: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
    mantissa: gl.constexpr, kind: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """total + the products of a part's codes of `BITS` bits, [S, R, T] fp32.

    Words, scales and zeros are loaded two steps before they are needed, as memory takes about that
    long.
    """
    P8: gl.constexpr = first_four(weight_layout(8, R, S))
    P4: gl.constexpr = first_four(weight_layout(4, R, S))
    P2: gl.constexpr = first_four(weight_layout(2, R, S))
    P1: gl.constexpr = first_four(weight_layout(1, R, S))
    GROUPS: gl.constexpr = 1 if GROUP == 0 or GROUP >= 128 else 128 // GROUP
    NARROWEST: gl.constexpr = BITS & -BITS
    first_row = gl.program_id(0) * R
    base8 = w_ptr + gl.minimum(first_row + along(1, R, P8, 4), O - 1) * row_words
    base4 = w_ptr + gl.minimum(first_row + along(1, R, P4, 4), O - 1) * row_words
    base2 = w_ptr + gl.minimum(first_row + along(1, R, P2, 4), O - 1) * row_words
    base1 = w_ptr + gl.minimum(first_row + along(1, R, P1, 4), O - 1) * row_words
    split8 = along(0, S, P8, 4)
    split4 = along(0, S, P4, 4)
    split2 = along(0, S, P2, 4)
    split1 = along(0, S, P1, 4)
    split_x8 = along(0, S, x_layout(8, T, S), 6)
    split_x4 = along(0, S, x_layout(4, T, S), 6)
    split_x2 = along(0, S, x_layout(2, T, S), 6)
    split_x1 = along(0, S, x_layout(1, T, S), 6)
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    group_layout: gl.constexpr = gl.SliceLayout(1, sides)
    row_at = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, sides)), 0)
    row_at = gl.minimum(first_row + row_at, O - 1) * G
    split_s = gl.expand_dims(gl.arange(0, S, layout=group_layout), 1)

    steps = (count + S - 1) // S
    a8 = load_words(base8, split8, count, BITS, 8, 8, P8)
    a4 = load_words(base4, split4, count, BITS, 4, 4, P4)
    a2 = load_words(base2, split2, count, BITS, 2, 2, P2)
    a1 = load_words(base1, split1, count, BITS, 1, 1, P1)
    b8 = load_words(base8, S + split8, count, BITS, 8, 8, P8)
    b4 = load_words(base4, S + split4, count, BITS, 4, 4, P4)
    b2 = load_words(base2, S + split2, count, BITS, 2, 2, P2)
    b1 = load_words(base1, S + split1, count, BITS, 1, 1, P1)
    at_a = row_at + group_of(block_number(blocks_ptr, split_s, count, LISTED), GROUP)
    at_b = row_at + group_of(block_number(blocks_ptr, S + split_s, count, LISTED), GROUP)
    if GROUPS == 1 and SCALES:
        scale_a = gl.load(scale_ptr + at_a)
        scale_b = gl.load(scale_ptr + at_b)
    if GROUPS == 1 and ZEROS:
        zero_a = gl.load(zero_ptr + at_a)
        zero_b = gl.load(zero_ptr + at_b)
    for step in range(0, steps):
        ahead = (step + 2) * S
        c8 = load_words(base8, ahead + split8, count, BITS, 8, 8, P8)
        c4 = load_words(base4, ahead + split4, count, BITS, 4, 4, P4)
        c2 = load_words(base2, ahead + split2, count, BITS, 2, 2, P2)
        c1 = load_words(base1, ahead + split1, count, BITS, 1, 1, P1)
        at_c = row_at + group_of(block_number(blocks_ptr, ahead + split_s, count, LISTED), GROUP)
        if GROUPS == 1 and SCALES:
            scale_c = gl.load(scale_ptr + at_c)
        if GROUPS == 1 and ZEROS:
            zero_c = gl.load(zero_ptr + at_c)
        for group in gl.static_range(GROUPS):
            sums = gl.zeros([S, R, T], gl.float32, layout=mma)
            of_x = gl.zeros([S, 1, T], gl.float32, layout=mma)
            if BITS & 8:
                index = step * S + split_x8
                block = block_number(blocks_ptr, index, count, LISTED)
                sums, of_x = add_plane(sums, of_x, x_ptr, a8, block, index < count, K, M, group, BITS, 8, GROUP, NARROWEST == 8, R, S, T, mantissa, kind, mma)  # fmt: skip
            if BITS & 4:
                index = step * S + split_x4
                block = block_number(blocks_ptr, index, count, LISTED)
                sums, of_x = add_plane(sums, of_x, x_ptr, a4, block, index < count, K, M, group, BITS, 4, GROUP, NARROWEST == 4, R, S, T, mantissa, kind, mma)  # fmt: skip
            if BITS & 2:
                index = step * S + split_x2
                block = block_number(blocks_ptr, index, count, LISTED)
                sums, of_x = add_plane(sums, of_x, x_ptr, a2, block, index < count, K, M, group, BITS, 2, GROUP, NARROWEST == 2, R, S, T, mantissa, kind, mma)  # fmt: skip
            if BITS & 1:
                index = step * S + split_x1
                block = block_number(blocks_ptr, index, count, LISTED)
                sums, of_x = add_plane(sums, of_x, x_ptr, a1, block, index < count, K, M, group, BITS, 1, GROUP, NARROWEST == 1, R, S, T, mantissa, kind, mma)  # fmt: skip
            zero = zero_value
            if ZEROS:
                if GROUPS > 1:
                    zero_a = gl.load(zero_ptr + at_a + group)
                zero = gl.expand_dims(zero_a.to(gl.float32), 2) * zero_step
            sums -= (zero + offset(BITS)) * of_x
            if SCALES:
                if GROUPS > 1:
                    scale_a = gl.load(scale_ptr + at_a + group)
                total += sums * gl.expand_dims(scale_a.to(gl.float32), 2)
            else:
                total += sums * scale_value
        a8, b8 = b8, c8
        a4, b4 = b4, c4
        a2, b2 = b2, c2
        a1, b1 = b1, c1
        at_a, at_b = at_b, at_c
        if GROUPS == 1 and SCALES:
            scale_a, scale_b = scale_b, scale_c
        if GROUPS == 1 and ZEROS:
            zero_a, zero_b = zero_b, zero_c
    return total


@gluon.jit
def tail_plane(codes, words_ptr, columns, BITS: gl.constexpr, v: gl.constexpr):
    """codes with the bits of the plane of width v below them."""
    if BITS & v:
        byte = columns % (4 * v)
        word = gl.load(words_ptr + before(BITS, v) + byte // 4).to(gl.uint32, bitcast=True)
        field = (word >> (byte % 4 * 8 + columns // (4 * v) * v)) & ((1 << v) - 1)
        codes = (codes << v) | field.to(gl.int32)
    return codes


@gluon.jit
def tail_codes(words_ptr, columns, BITS: gl.constexpr):
    """Codes [R, 32] of a unit of 32 columns; words_ptr [R, 1]; columns [1, 32]."""
    codes = columns * 0
    codes = tail_plane(codes, words_ptr, columns, BITS, 8)
    codes = tail_plane(codes, words_ptr, columns, BITS, 4)
    codes = tail_plane(codes, words_ptr, columns, BITS, 2)
    return tail_plane(codes, words_ptr, columns, BITS, 1)


@gluon.jit
def add_tail(
    y, x_ptr, w_ptr, scale_ptr, zero_ptr, scale_value, zero_value, M, O, K, G, row_words,
    BITS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
    UNITS: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """y [R, T] + the product of the columns after the last whole block, in units of 32."""
    own: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [S, 1], [1, 0])
    out: gl.constexpr = gl.SliceLayout(1, layout)
    rows = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, own))
    rows = gl.expand_dims(gl.minimum(rows, O - 1), 1)
    columns = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, own)), 0)
    token = gl.expand_dims(gl.arange(0, T, layout=gl.SliceLayout(0, layout)), 0)
    whole = K // 128
    for unit in gl.static_range(UNITS):
        words_ptr = w_ptr + rows * row_words + whole * (4 * BITS) + unit * BITS
        codes = tail_codes(words_ptr, columns, BITS)
        column = whole * 128 + unit * 32 + columns
        group = column * 0
        if GROUP != 0:
            group = gl.minimum(column // GROUP, G - 1)
        zero = zero_value
        if ZEROS:
            zero = gl.load(zero_ptr + rows * G + group).to(gl.float32)
        scale = scale_value
        if SCALES:
            scale = gl.load(scale_ptr + rows * G + group).to(gl.float32)
        weights = (codes.to(gl.float32) - zero) * scale
        for t in gl.static_range(T):
            live = (column < K) & (t < M)
            x = gl.load(x_ptr + t * K + column, mask=live, other=0).to(gl.float32)
            sums = gl.convert_layout(gl.sum(weights * x, 1), out)
            y += gl.where(token == t, gl.expand_dims(sums, 1), 0.0)
    return y


@gluon.jit(do_not_specialize=["M"])
def uniform_few(
    x_ptr, w_ptr, scale_ptr, zero_ptr, blocks_ptr, bias_ptr, step_ptr, y_ptr,
    count0, count1, count2, start1, start2, zero_step0, zero_step1, zero_step2,
    scale_value, zero_value, M, O, K, G, row_words,
    BITS0: gl.constexpr, BITS1: gl.constexpr, BITS2: gl.constexpr, GROUP: gl.constexpr,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, LISTED: gl.constexpr, BIAS: gl.constexpr,
    STEPS: gl.constexpr, UNITS: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """y [M, O] = x [M, K] times the weight, times the step of each token, plus the bias.

    count, start, zero_step: of each part, its blocks, its first word in a row, and what a stored
    zero is worth. GROUP 0: one group a row. SCALES, ZEROS: whether rows and groups have their own;
    otherwise `scale_value` and `zero_value` serve all. UNITS: of 32 columns after the last whole
    block. HALF: 16-bit products are fp16's and not bf16's. K: a multiple of 8.
    """
    kind: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    mantissa: gl.constexpr = 10 if HALF else 7
    mma: gl.constexpr = product_layout(S)
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    total = part_sums(total, x_ptr, w_ptr, scale_ptr, zero_ptr, blocks_ptr, count0, zero_step0, scale_value, zero_value, M, O, K, G, row_words, BITS0, GROUP, SCALES, ZEROS, LISTED, R, S, T, mantissa, kind, mma)  # fmt: skip
    if BITS1:
        total = part_sums(total, x_ptr, w_ptr + start1, scale_ptr, zero_ptr, blocks_ptr + count0, count1, zero_step1, scale_value, zero_value, M, O, K, G, row_words, BITS1, GROUP, SCALES, ZEROS, LISTED, R, S, T, mantissa, kind, mma)  # fmt: skip
    if BITS2:
        total = part_sums(total, x_ptr, w_ptr + start2, scale_ptr, zero_ptr, blocks_ptr + count0 + count1, count2, zero_step2, scale_value, zero_value, M, O, K, G, row_words, BITS2, GROUP, SCALES, ZEROS, LISTED, R, S, T, mantissa, kind, mma)  # fmt: skip
    y = gl.sum(total, 0)
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    if UNITS:
        y = add_tail(y, x_ptr, w_ptr, scale_ptr, zero_ptr, scale_value, zero_value, M, O, K, G, row_words, BITS0, GROUP, SCALES, ZEROS, UNITS, R, S, T, layout)  # fmt: skip
    store(y, y_ptr, bias_ptr, step_ptr, M, O, BIAS, STEPS, R, T, layout)
