"""Few tokens times 1- and 2-bit codes of levels, on tensor cores, straight from the stored planes.

Legend: O rows, K columns (whole blocks of 128), G groups, M tokens; b1, b0 the bits of a code; S, R,
T as in fragments.py.

Each level is linear in b1, b0 and b1 b0, so a group's sum is one of products of x with single bits:
    DUAL    scale0 b0 + scale1 b1                                       (DB-LLM)
    SIGNS   mean + scale (2 b0 - 1), codes of one bit                   (PB-LLM's plain weights)
    SPLIT   in plain columns (low or mid by b1, sign b0)                (BiLLM)
              (m_low - a_low) + b1 (m_mid - m_low - a_mid + a_low) + b0 2 a_low + b1 b0 2 (a_mid - a_low)
            in salient ones (two signs)
              (m - a_first - a_second) + b1 2 a_first + b0 2 a_second
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    along,
    column_sums,
    first_four,
    group_of,
    left,
    load_x,
    masked,
    product_layout,
    right,
    rotations,
    store,
    turned,
    weight_layout,
    word_offsets,
    x_columns,
    x_layout,
)

DUAL, SPLIT, SIGNS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def bit_sums(words, b, bit: gl.constexpr, n: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The product of x with one bit of each code plus 2**(n - bit), [S, R, T]."""
    turn = turned(words, rotations(n, n, 0, mantissa, weight_layout(n, R, S)))
    a = masked(turn, 1 << (mantissa - n + bit), n - bit, mantissa, kind)
    return mma_v2(left(a, R, S, mma), b, gl.zeros([S, R, T], gl.float32, layout=mma))


@gluon.jit
def coefficient(ptr, at, i: gl.constexpr, each: gl.constexpr):
    """Number i of the `each` that a row and group have, [S, R, 1] fp32."""
    return gl.expand_dims(gl.load(ptr + at * each + i).to(gl.float32), 2)


@gluon.jit
def split_sums(words, x, salient, scale_ptr, mean_ptr, at, MEANS: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The sums of SPLIT levels, [S, R, T]."""
    a_low = coefficient(scale_ptr, at, 0, 4)
    a_mid = coefficient(scale_ptr, at, 1, 4)
    a_first = coefficient(scale_ptr, at, 2, 4)
    a_second = coefficient(scale_ptr, at, 3, 4)
    m_low = coefficient(mean_ptr, at, 0, MEANS)
    m_mid = coefficient(mean_ptr, at, 1, MEANS)
    m = coefficient(mean_ptr, at, 2, MEANS)
    if MEANS == 4:
        m += coefficient(mean_ptr, at, 3, MEANS)
    zero = gl.zeros_like(x)
    b = right(gl.where(salient, zero, x), 2, T, S, mma)
    of_x = column_sums(b, T, S, mma, kind)
    total = (m_low - a_low) * of_x
    total += (m_mid - m_low - a_mid + a_low) * (bit_sums(words, b, 1, 2, R, S, T, mantissa, kind, mma) - 2 * of_x)  # fmt: skip
    total += 2 * a_low * (bit_sums(words, b, 0, 2, R, S, T, mantissa, kind, mma) - 4 * of_x)
    both = words & (words >> 1)
    total += 2 * (a_mid - a_low) * (bit_sums(both, b, 0, 2, R, S, T, mantissa, kind, mma) - 4 * of_x)  # fmt: skip
    b = right(gl.where(salient, x, zero), 2, T, S, mma)
    of_x = column_sums(b, T, S, mma, kind)
    total += (m - a_first - a_second) * of_x
    total += 2 * a_first * (bit_sums(words, b, 1, 2, R, S, T, mantissa, kind, mma) - 2 * of_x)
    return total + 2 * a_second * (bit_sums(words, b, 0, 2, R, S, T, mantissa, kind, mma) - 4 * of_x)  # fmt: skip


@gluon.jit
def group_sums(words, b, scale_ptr, mean_ptr, at, KIND: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The sums of DUAL or SIGNS levels, [S, R, T]."""
    of_x = column_sums(b, T, S, mma, kind)
    if KIND == DUAL:
        second = bit_sums(words, b, 1, 2, R, S, T, mantissa, kind, mma) - 2 * of_x
        first = bit_sums(words, b, 0, 2, R, S, T, mantissa, kind, mma) - 4 * of_x
        return coefficient(scale_ptr, at, 0, 2) * first + coefficient(scale_ptr, at, 1, 2) * second
    else:
        scale = coefficient(scale_ptr, at, 0, 1)
        sign = bit_sums(words, b, 0, 1, R, S, T, mantissa, kind, mma) - 2 * of_x
        return (coefficient(mean_ptr, at, 0, 1) - scale) * of_x + 2 * scale * sign


@gluon.jit(do_not_specialize=["M"])
def levels_few(
    x_ptr, w_ptr, scale_ptr, mean_ptr, salient_ptr, bias_ptr, y_ptr, M, O, K, G, row_words,
    KIND: gl.constexpr, MEANS: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    HALF: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """y [M, O] = x [M, K] times the weight, plus the bias.

    scale: [O, G, 2] (DUAL), [O, G, 4] (SPLIT) or [O, G] (SIGNS). mean: [O, G, MEANS] (SPLIT) or
    [O, G] (SIGNS). salient: uint8 [K], 1 in salient columns (SPLIT). GROUP 0: one group a row.
    """
    kind: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    mantissa: gl.constexpr = 10 if HALF else 7
    n: gl.constexpr = 1 if KIND == SIGNS else 2
    mma: gl.constexpr = product_layout(S)
    words_in: gl.constexpr = first_four(weight_layout(n, R, S))
    x_in: gl.constexpr = x_layout(n, T, S)
    GROUPS: gl.constexpr = 1 if GROUP == 0 or GROUP >= 128 else 128 // GROUP
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    first_row = gl.program_id(0) * R
    row = gl.minimum(first_row + along(1, R, words_in, 4), O - 1)
    rows_ptr = w_ptr + row * row_words + word_offsets(n, words_in)
    split = along(0, S, words_in, 4)
    row_at = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, sides)), 0)
    row_at = gl.minimum(first_row + row_at, O - 1) * G
    split_s = gl.expand_dims(gl.arange(0, S, layout=gl.SliceLayout(1, sides)), 1)
    split_x = along(0, S, x_in, 6)
    count = K // 128
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    words = gl.load(rows_ptr + gl.minimum(split, count - 1) * (4 * n))
    next_words = gl.load(rows_ptr + gl.minimum(S + split, count - 1) * (4 * n))
    for step in range(0, (count + S - 1) // S):
        ahead = gl.minimum((step + 2) * S + split, count - 1)
        later_words = gl.load(rows_ptr + ahead * (4 * n))
        at = row_at + group_of(gl.minimum(step * S + split_s, count - 1), GROUP)
        block = step * S + split_x
        x = load_x(x_ptr, block, block < count, K, M, n, T, x_in, kind)
        bits = words.to(gl.uint32, bitcast=True)
        if KIND == SPLIT:
            column = gl.minimum(block, count - 1) * 128 + x_columns(n, x_in)
            salient = gl.load(salient_ptr + column) != 0
            total += split_sums(bits, x, salient, scale_ptr, mean_ptr, at, MEANS, R, S, T, mantissa, kind, mma)  # fmt: skip
        else:
            for group in gl.static_range(GROUPS):
                own = x
                if GROUPS > 1:
                    own = gl.where(x_columns(n, x_in) // GROUP == group, x, gl.zeros_like(x))
                b = right(own, n, T, S, mma)
                total += group_sums(bits, b, scale_ptr, mean_ptr, at + group, KIND, R, S, T, mantissa, kind, mma)  # fmt: skip
        words, next_words = next_words, later_words
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    store(gl.sum(total, 0), y_ptr, bias_ptr, bias_ptr, M, O, BIAS, False, R, T, layout)
