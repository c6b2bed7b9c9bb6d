"""Few tokens times uniform codes, on tensor cores, straight from the stored planes.

Legend: O rows, K columns, G groups, M tokens; S, R, T, n as in fragments.py. A *part* is the codes
of one width (views.py): most weights have one, SliM-LLM's up to three.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .fragments import (
    STAGES,
    above,
    along,
    ask,
    before,
    below,
    block_number,
    byte_of,
    classes,
    code_mask,
    column_sums,
    first_group,
    groups_of_block,
    half_of,
    in_group,
    left,
    load_x,
    masked,
    new_ring_of_rows,
    of_class,
    product,
    product_layout,
    right,
    ring_layout,
    row_words_of,
    shifted,
    store,
    wait,
    weight_layout,
    word_offsets,
    words_layout,
    worth,
    x_layout,
)


@gluon.jit
def new_ring(BITS: gl.constexpr, n: gl.constexpr, R: gl.constexpr, S: gl.constexpr):
    """Shared memory for the plane of n bits of a few steps, if there is such a plane."""
    if BITS & n:
        return gl.allocate_shared_memory(gl.int32, [STAGES, S, R, 4, n], ring_layout(4))
    else:
        return gl.allocate_shared_memory(gl.int32, [1], ring_layout(1))


@gluon.jit
def ask_words(
    ring, w_ptr, step, count, O, row_words, BITS: gl.constexpr, n: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """Begin to copy the plane of n bits of each warp's block."""
    if BITS & n:
        layout: gl.constexpr = words_layout(n, R, S)
        row = gl.minimum(gl.program_id(0) * R + along(1, R, layout, 4), O - 1)
        block = gl.minimum(step * S + along(0, S, layout, 4), count - 1)
        at = row * row_words + (block * (4 * BITS) + 4 * before(BITS, n))
        ask(ring, step, w_ptr + at + word_offsets(n, layout))


@gluon.jit
def words_of(ring, step, BITS: gl.constexpr, n: gl.constexpr, R: gl.constexpr, S: gl.constexpr):
    """The plane of n bits of each warp's block, [S, R, 4, n]."""
    layout: gl.constexpr = words_layout(n, R, S)
    if BITS & n:
        return ring.index(step % STAGES).load(layout).to(gl.uint32, bitcast=True)
    else:
        return gl.full([1, 1, 1, 1], 0, gl.uint32, layout=layout)


@gluon.jit
def ask_grid(
    scales, more, zeros, scale_ptr, zero_ptr, at, step, GROUPS: gl.constexpr, SCALES: gl.constexpr,
    ZEROS: gl.constexpr,
):  # fmt: skip
    """Begin to copy the words that hold the scales and the zeros of a block's groups."""
    if SCALES == 32:
        ask(scales, step, scale_ptr + at)
    elif SCALES == 16:
        ask(scales, step, scale_ptr + (at >> 1))
        if GROUPS == 4:
            ask(more, step, scale_ptr + (at >> 1) + 1)
    if ZEROS:
        ask(zeros, step, zero_ptr + (at >> 2))


@gluon.jit
def scaled(
    sums, of_x, scale, more, zero, at, group: gl.constexpr, scale_ptr, zero_step, scale_value,
    zero_value, SCALES: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """scale * (sums - zero * of_x) of one of a block's groups."""
    if ZEROS:
        sums -= gl.expand_dims(byte_of(zero, at + group), 2) * zero_step * of_x
    else:
        sums -= zero_value * of_x
    if SCALES == 16:
        return sums * gl.expand_dims(half_of(scale if group < 2 else more, at + group), 2)
    elif SCALES == 32:
        return sums * gl.expand_dims(scale if group == 0 else gl.load(scale_ptr + at + group), 2)
    else:
        return sums * scale_value


@gluon.jit
def load_plane_x(
    x_ptr, step, blocks_ptr, count, K, M, BITS: gl.constexpr, n: gl.constexpr,
    LISTED: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """x of each warp's block in the order of the plane of n bits, if there is such a plane."""
    layout: gl.constexpr = x_layout(n, T, S)
    if BITS & n:
        index = step * S + along(0, S, layout, 6)
        block = block_number(blocks_ptr, index, count, LISTED)
        return load_x(x_ptr, block, index < count, K, M, n, T, layout)
    else:
        return gl.full([1, 1, 1, 1, 1, 1], 0, x_ptr.dtype.element_ty, layout=layout)


@gluon.jit
def add_plane(
    sums, of_x, x, words, group: gl.constexpr, BITS: gl.constexpr, n: gl.constexpr,
    GROUP: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, HALF: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """sums += the codes of a plane times x, in one group of each block; of_x: the sums of x, which
    the narrowest plane computes for all.
    """
    if BITS & n:
        x = in_group(x, n, group, GROUP, x_layout(n, T, S))
        x = x.to(gl.float16) if HALF else x.to(gl.bfloat16)
        for cls in gl.static_range(classes(n)):
            b = right(of_class(x, n, cls), n, T, S, mma)
            own = column_sums(b, R, S, T, mma)
            if n == (BITS & -BITS):
                of_x += own
            for nibble in gl.static_range(2 if n == 8 else 1):
                bits = shifted(words, n, nibble, weight_layout(n, R, S))
                a = left(masked(bits, code_mask(n, cls), HALF), R, S, mma)
                part = product(a, b, R, S, T, mma) - above(HALF) * own
                sums += part * worth(HALF, cls * n % 4 - below(BITS, n) - 4 * nibble)
    return sums, of_x


@gluon.jit
def add_block(
    total, x8, x4, x2, x1, w8, w4, w2, w1, scale, more, zero, at, scale_ptr, zero_step,
    scale_value, zero_value, BITS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
    HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """total + the product of each warp's block."""
    for group in gl.static_range(GROUPS):
        sums = gl.zeros([S, R, T], gl.float32, layout=mma)
        of_x = gl.zeros([S, R, T], gl.float32, layout=mma)
        sums, of_x = add_plane(sums, of_x, x8, w8, group, BITS, 8, GROUP, R, S, T, HALF, mma)
        sums, of_x = add_plane(sums, of_x, x4, w4, group, BITS, 4, GROUP, R, S, T, HALF, mma)
        sums, of_x = add_plane(sums, of_x, x2, w2, group, BITS, 2, GROUP, R, S, T, HALF, mma)
        sums, of_x = add_plane(sums, of_x, x1, w1, group, BITS, 1, GROUP, R, S, T, HALF, mma)
        total += scaled(
            sums, of_x, scale, more, zero, at, group, scale_ptr, zero_step, scale_value,
            zero_value, SCALES, ZEROS,
        )  # fmt: skip
    return total


@gluon.jit
def load_all_x(
    x_ptr, step, blocks_ptr, count, K, M, BITS: gl.constexpr, LISTED: gl.constexpr,
    S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """x of a step, in the orders of the four planes."""
    x8 = load_plane_x(x_ptr, step, blocks_ptr, count, K, M, BITS, 8, LISTED, S, T)
    x4 = load_plane_x(x_ptr, step, blocks_ptr, count, K, M, BITS, 4, LISTED, S, T)
    x2 = load_plane_x(x_ptr, step, blocks_ptr, count, K, M, BITS, 2, LISTED, S, T)
    x1 = load_plane_x(x_ptr, step, blocks_ptr, count, K, M, BITS, 1, LISTED, S, T)
    return x8, x4, x2, x1


@gluon.jit
def part_sums(
    total, x_ptr, w_ptr, scale_ptr, zero_ptr, blocks_ptr, count, zero_step, scale_value,
    zero_value, M, O, K, G, row_words, BITS: gl.constexpr, GROUP: gl.constexpr,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, LISTED: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr, T: gl.constexpr, HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """total + the products of a part's codes of `BITS` bits, [S, R, T] fp32.

    Words, scales and zeros go through a ring in shared memory, `STAGES` - 1 steps ahead. x comes
    from the cache, one step before it is used.
    """
    GROUPS: gl.constexpr = groups_of_block(GROUP)
    MORE: gl.constexpr = SCALES == 16 and GROUPS == 4
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    ring8 = new_ring(BITS, 8, R, S)
    ring4 = new_ring(BITS, 4, R, S)
    ring2 = new_ring(BITS, 2, R, S)
    ring1 = new_ring(BITS, 1, R, S)
    scales = new_ring_of_rows(scale_ptr, SCALES != 0, R, S)
    more = new_ring_of_rows(scale_ptr, MORE, R, S)
    zeros = new_ring_of_rows(zero_ptr, ZEROS, R, S)
    for step in gl.static_range(STAGES - 1):
        ask_words(ring8, w_ptr, step, count, O, row_words, BITS, 8, R, S)
        ask_words(ring4, w_ptr, step, count, O, row_words, BITS, 4, R, S)
        ask_words(ring2, w_ptr, step, count, O, row_words, BITS, 2, R, S)
        ask_words(ring1, w_ptr, step, count, O, row_words, BITS, 1, R, S)
        at = first_group(step, blocks_ptr, count, O, G, GROUP, LISTED, R, S, mma)
        ask_grid(scales, more, zeros, scale_ptr, zero_ptr, at, step, GROUPS, SCALES, ZEROS)
        async_copy.commit_group()
    x8, x4, x2, x1 = load_all_x(x_ptr, 0, blocks_ptr, count, K, M, BITS, LISTED, S, T)
    for step in range(0, (count + S - 1) // S):
        wait()
        w8 = words_of(ring8, step, BITS, 8, R, S)
        w4 = words_of(ring4, step, BITS, 4, R, S)
        w2 = words_of(ring2, step, BITS, 2, R, S)
        w1 = words_of(ring1, step, BITS, 1, R, S)
        at = first_group(step, blocks_ptr, count, O, G, GROUP, LISTED, R, S, mma)
        scale = row_words_of(scales, step, at, SCALES != 0, sides)
        later = row_words_of(more, step, at, MORE, sides)
        zero = row_words_of(zeros, step, at, ZEROS, sides)
        ahead = step + (STAGES - 1)
        ask_words(ring8, w_ptr, ahead, count, O, row_words, BITS, 8, R, S)
        ask_words(ring4, w_ptr, ahead, count, O, row_words, BITS, 4, R, S)
        ask_words(ring2, w_ptr, ahead, count, O, row_words, BITS, 2, R, S)
        ask_words(ring1, w_ptr, ahead, count, O, row_words, BITS, 1, R, S)
        at_ahead = first_group(ahead, blocks_ptr, count, O, G, GROUP, LISTED, R, S, mma)
        ask_grid(scales, more, zeros, scale_ptr, zero_ptr, at_ahead, ahead, GROUPS, SCALES, ZEROS)
        async_copy.commit_group()
        y8, y4, y2, y1 = load_all_x(x_ptr, step + 1, blocks_ptr, count, K, M, BITS, LISTED, S, T)
        total = add_block(
            total, x8, x4, x2, x1, w8, w4, w2, w1, scale, later, zero, at, scale_ptr, zero_step,
            scale_value, zero_value, BITS, GROUP, GROUPS, SCALES, ZEROS, R, S, T, HALF, mma,
        )  # fmt: skip
        x8, x4, x2, x1 = y8, y4, y2, y1
    async_copy.wait_group(0)
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
        at = rows * G + group
        zero = zero_value
        if ZEROS:
            zero = byte_of(gl.load(zero_ptr + (at >> 2)), at)
        scale = scale_value
        if SCALES == 16:
            scale = half_of(gl.load(scale_ptr + (at >> 1)), at)
        elif SCALES == 32:
            scale = gl.load(scale_ptr + at)
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

    scale: int32 words of fp16 pairs (SCALES 16), or fp32 (32); none (0). zero: int32 words of four
    bytes. Rows times groups: a multiple of 4.
    """
    mma: gl.constexpr = product_layout(S)
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    total = part_sums(
        total, x_ptr, w_ptr, scale_ptr, zero_ptr, blocks_ptr, count0, zero_step0, scale_value,
        zero_value, M, O, K, G, row_words, BITS0, GROUP, SCALES, ZEROS, LISTED, R, S, T, HALF, mma,
    )  # fmt: skip
    if BITS1:
        total = part_sums(
            total, x_ptr, w_ptr + start1, scale_ptr, zero_ptr, blocks_ptr + count0, count1,
            zero_step1, scale_value, zero_value, M, O, K, G, row_words, BITS1, GROUP, SCALES,
            ZEROS, LISTED, R, S, T, HALF, mma,
        )  # fmt: skip
    if BITS2:
        total = part_sums(
            total, x_ptr, w_ptr + start2, scale_ptr, zero_ptr, blocks_ptr + count0 + count1,
            count2, zero_step2, scale_value, zero_value, M, O, K, G, row_words, BITS2, GROUP,
            SCALES, ZEROS, LISTED, R, S, T, HALF, mma,
        )  # fmt: skip
    y = gl.sum(total, 0)
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    if UNITS:
        y = add_tail(
            y, x_ptr, w_ptr, scale_ptr, zero_ptr, scale_value, zero_value, M, O, K, G, row_words,
            BITS0, GROUP, SCALES, ZEROS, UNITS, R, S, T, layout,
        )  # fmt: skip
    store(y, y_ptr, bias_ptr, step_ptr, M, O, BIAS, STEPS, R, T, layout)
