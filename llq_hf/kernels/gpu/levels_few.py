"""Few tokens times 1- and 2-bit codes of levels, on tensor cores, straight from the stored planes.

Legend: O rows, K columns (whole blocks of 128), G groups, M tokens; b1, b0 the bits of a code; S,
R, T as in fragments.py.

Each level is linear in b1, b0 and b1 b0, so a group's sum is one of products of x with single bits:
    DUAL    scale0 b0 + scale1 b1                                       (DB-LLM)
    SIGNS   mean + scale (2 b0 - 1), codes of one bit                   (PB-LLM's plain weights)
    SPLIT   in plain columns (low or mid by b1, sign b0)                (BiLLM)
              m_low - a_low + b1 (m_mid - m_low - a_mid + a_low)
              + b0 2 a_low + b1 b0 2 (a_mid - a_low)
            in salient ones (two signs)
              m - a_first - a_second + b1 2 a_first + b0 2 a_second
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.jit import constexpr_function

from .fragments import (
    STAGES,
    above,
    along,
    ask,
    classes,
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
    x_columns,
    x_layout,
)

DUAL, SPLIT, SIGNS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@constexpr_function
def scales_of(kind):
    """Scales of a row and group."""
    return (2, 4, 1)[kind]


@gluon.jit
def add_bit(
    sums, halves, b, power: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
    HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """sums + x times the bit at `power` of the shifted halves, and what bf16 adds to it."""
    a = left(masked(halves, 1 << power, HALF), R, S, mma)
    return sums + product(a, b, R, S, T, mma) * worth(HALF, power)


@gluon.jit
def add_x(
    of_x, extra, b, power: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
    HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """of_x + the sums of x; extra + what `add_bit` of this power adds to the right sum. At the next
    power it is half of that.
    """
    own = column_sums(b, R, S, T, mma)
    if HALF:
        return of_x + own, extra
    else:
        return of_x + own, extra + own * (above(HALF) * worth(HALF, power))


@gluon.jit
def first_word(at, each: gl.constexpr):
    """The word in which the `each` fp16 numbers of a row and group begin."""
    return at * each >> 1


@gluon.jit
def coefficient(word, more, at, i: gl.constexpr, each: gl.constexpr):
    """Number i of the `each` that a row and group have, [S, R, 1] fp32."""
    if each == 3:  # they begin in either half of the first word
        place = (at & 1) + i
        return gl.expand_dims(half_of(gl.where(place < 2, word, more), place), 2)
    elif each == 1:
        return gl.expand_dims(half_of(word, at), 2)
    else:
        return gl.expand_dims(half_of(word if i < 2 else more, at * 0 + i), 2)


@gluon.jit
def split_sums(
    all_x, all_salient, halves, scale, more_scale, mean, more_mean, at, MEANS: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The sums of SPLIT levels in each warp's block, [S, R, T]."""
    none = gl.zeros([S, R, T], gl.float32, layout=mma)
    of_plain, plain_extra, first, second, both = none, none, none, none, none
    of_salient, salient_extra, first_sign, second_sign = none, none, none, none
    pairs = halves & (halves >> 1)
    all_x = all_x.to(gl.float16) if HALF else all_x.to(gl.bfloat16)
    nothing = gl.zeros_like(all_x)
    plain_x = gl.where(all_salient != 0, nothing, all_x)
    salient_x = gl.where(all_salient != 0, all_x, nothing)
    for cls in gl.static_range(2):
        b = right(of_class(plain_x, 2, cls), 2, T, S, mma)
        of_plain, plain_extra = add_x(of_plain, plain_extra, b, 2 * cls, R, S, T, HALF, mma)
        second = add_bit(second, halves, b, 2 * cls, R, S, T, HALF, mma)
        first = add_bit(first, halves, b, 2 * cls + 1, R, S, T, HALF, mma)
        both = add_bit(both, pairs, b, 2 * cls, R, S, T, HALF, mma)
        b = right(of_class(salient_x, 2, cls), 2, T, S, mma)
        of_salient, salient_extra = add_x(of_salient, salient_extra, b, 2 * cls, R, S, T, HALF, mma)
        second_sign = add_bit(second_sign, halves, b, 2 * cls, R, S, T, HALF, mma)
        first_sign = add_bit(first_sign, halves, b, 2 * cls + 1, R, S, T, HALF, mma)
    a_low = coefficient(scale, more_scale, at, 0, 4)
    a_mid = coefficient(scale, more_scale, at, 1, 4)
    m_low = coefficient(mean, more_mean, at, 0, MEANS)
    m_mid = coefficient(mean, more_mean, at, 1, MEANS)
    by_first, by_both = m_mid - m_low - a_mid + a_low, 2 * (a_mid - a_low)
    total = (m_low - a_low) * of_plain + by_first * first + 2 * a_low * second + by_both * both
    total -= (0.5 * by_first + 2 * a_low + by_both) * plain_extra
    a_first = coefficient(scale, more_scale, at, 2, 4)
    a_second = coefficient(scale, more_scale, at, 3, 4)
    m = coefficient(mean, more_mean, at, 2, MEANS)
    if MEANS == 4:
        m += coefficient(mean, more_mean, at, 3, MEANS)
    total += (m - a_first - a_second) * of_salient + 2 * a_first * first_sign
    return total + 2 * a_second * second_sign - (a_first + 2 * a_second) * salient_extra


@gluon.jit
def group_sums(
    all_x, halves, scale, mean, at, group: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, HALF: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The sums of DUAL or SIGNS levels in one group of each warp's block, [S, R, T]."""
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    x_in: gl.constexpr = x_layout(n, T, S)
    none = gl.zeros([S, R, T], gl.float32, layout=mma)
    of_x, extra, first, second = none, none, none, none
    all_x = in_group(all_x, n, group, GROUP, x_in)
    all_x = all_x.to(gl.float16) if HALF else all_x.to(gl.bfloat16)
    for cls in gl.static_range(classes(n)):
        b = right(of_class(all_x, n, cls), n, T, S, mma)
        of_x, extra = add_x(of_x, extra, b, n * cls, R, S, T, HALF, mma)
        second = add_bit(second, halves, b, n * cls, R, S, T, HALF, mma)
        if KIND == DUAL:
            first = add_bit(first, halves, b, n * cls + 1, R, S, T, HALF, mma)
    if KIND == DUAL:
        scale0 = coefficient(scale, scale, at, 0, 2)
        scale1 = coefficient(scale, scale, at, 1, 2)
        return scale0 * second + scale1 * first - (scale0 + 0.5 * scale1) * extra
    else:
        reach = coefficient(scale, scale, at, 0, 1)
        return (coefficient(mean, mean, at, 0, 1) - reach) * of_x + 2 * reach * (second - extra)


@gluon.jit
def ask_step(
    words, scales, more_scales, means, more_means, w_ptr, scale_ptr, mean_ptr, step, count, O, G,
    row_words, KIND: gl.constexpr, MEANS: gl.constexpr, GROUP: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Begin to copy what a step needs: words, scales and means of each warp's block."""
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    layout: gl.constexpr = words_layout(n, R, S)
    row = gl.minimum(gl.program_id(0) * R + along(1, R, layout, 4), O - 1)
    block = gl.minimum(step * S + along(0, S, layout, 4), count - 1)
    ask(words, step, w_ptr + (row * row_words + block * (4 * n)) + word_offsets(n, layout))
    at = first_group(step, w_ptr, count, O, G, GROUP, False, R, S, mma)
    each: gl.constexpr = scales_of(KIND)
    ask(scales, step, scale_ptr + first_word(at, each))
    if KIND == SPLIT:
        ask(more_scales, step, scale_ptr + first_word(at, 4) + 1)
        ask(means, step, mean_ptr + first_word(at, MEANS))
        ask(more_means, step, mean_ptr + first_word(at, MEANS) + 1)
    if KIND == SIGNS:
        ask(means, step, mean_ptr + first_word(at, 1))
    async_copy.commit_group()


@gluon.jit
def add_block(
    total, words, scale, more_scale, mean, more_mean, at, x, salient, scale_ptr, mean_ptr,
    KIND: gl.constexpr, MEANS: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """total + the product of each warp's block."""
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    GROUPS: gl.constexpr = groups_of_block(GROUP)
    halves = shifted(words, n, 0, weight_layout(n, R, S))
    if KIND == SPLIT:
        total += split_sums(
            x, salient, halves, scale, more_scale, mean, more_mean, at, MEANS, R, S, T, HALF, mma,
        )  # fmt: skip
    else:
        for group in gl.static_range(GROUPS):
            if group > 0:
                scale = gl.load(scale_ptr + first_word(at + group, scales_of(KIND)))
                if KIND == SIGNS:
                    mean = gl.load(mean_ptr + first_word(at + group, 1))
            total += group_sums(
                x, halves, scale, mean, at + group, group, KIND, GROUP, R, S, T, HALF, mma,
            )  # fmt: skip
    return total


@gluon.jit
def load_columns(
    x_ptr, salient_ptr, step, count, K, M, KIND: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """x of each warp's block, and which columns are salient."""
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    x_in: gl.constexpr = x_layout(n, T, S)
    block = step * S + along(0, S, x_in, 6)
    x = load_x(x_ptr, block, block < count, K, M, n, T, x_in)
    salient = block
    if KIND == SPLIT:
        column = gl.minimum(block, count - 1) * 128 + x_columns(2, x_in)
        salient = gl.load(salient_ptr + column)
    return x, salient


@gluon.jit(do_not_specialize=["M"])
def levels_few(
    x_ptr, w_ptr, scale_ptr, mean_ptr, salient_ptr, bias_ptr, y_ptr, M, O, K, G, row_words,
    KIND: gl.constexpr, MEANS: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    HALF: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """y [M, O] = x [M, K] times the weight, plus the bias.

    scale: fp16 [O, G, 2] (DUAL), [O, G, 4] (SPLIT) or [O, G] (SIGNS). mean: fp16 [O, G, MEANS]
    (SPLIT) or [O, G] (SIGNS). Both are read as int32 words of two numbers, so rows times groups are
    even. salient: uint8 [K], 1 in salient columns (SPLIT). GROUP 0: one group a row.
    """
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    mma: gl.constexpr = product_layout(S)
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    count = K // 128
    words = gl.allocate_shared_memory(gl.int32, [STAGES, S, R, 4, n], ring_layout(4))
    scales = new_ring_of_rows(scale_ptr, True, R, S)
    more_scales = new_ring_of_rows(scale_ptr, KIND == SPLIT, R, S)
    means = new_ring_of_rows(scale_ptr, KIND != DUAL, R, S)
    more_means = new_ring_of_rows(scale_ptr, KIND == SPLIT, R, S)
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    for step in gl.static_range(STAGES - 1):
        ask_step(
            words, scales, more_scales, means, more_means, w_ptr, scale_ptr, mean_ptr, step, count,
            O, G, row_words, KIND, MEANS, GROUP, R, S, mma,
        )  # fmt: skip
    x, salient = load_columns(x_ptr, salient_ptr, 0, count, K, M, KIND, S, T)
    for step in range(0, (count + S - 1) // S):
        wait()
        bits = words.index(step % STAGES).load(words_layout(n, R, S)).to(gl.uint32, bitcast=True)
        at = first_group(step, w_ptr, count, O, G, GROUP, False, R, S, mma)
        scale = row_words_of(scales, step, at, True, sides)
        more_scale = row_words_of(more_scales, step, at, KIND == SPLIT, sides)
        mean = row_words_of(means, step, at, KIND != DUAL, sides)
        more_mean = row_words_of(more_means, step, at, KIND == SPLIT, sides)
        ask_step(
            words, scales, more_scales, means, more_means, w_ptr, scale_ptr, mean_ptr,
            step + (STAGES - 1), count, O, G, row_words, KIND, MEANS, GROUP, R, S, mma,
        )  # fmt: skip
        y, next_salient = load_columns(x_ptr, salient_ptr, step + 1, count, K, M, KIND, S, T)
        total = add_block(
            total, bits, scale, more_scale, mean, more_mean, at, x, salient, scale_ptr, mean_ptr,
            KIND, MEANS, GROUP, HALF, R, S, T, mma,
        )  # fmt: skip
        x, salient = y, next_salient
    async_copy.wait_group(0)
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    store(gl.sum(total, 0), y_ptr, bias_ptr, bias_ptr, M, O, BIAS, False, R, T, layout)
