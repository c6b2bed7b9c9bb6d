"""Few tokens times 4-bit codes of a table (NF4), on tensor cores, straight from the stored bytes.

Legend: O rows, K columns (whole blocks of 128), G groups of a row, M tokens; S, R, T as in
fragments.py. Of the two codes of a byte, the first lies in the high half, so a word holds eight
neighbouring columns and a quarter of a block is four words.

A level has 16 bits, two bytes; PRMT looks up a byte for four codes at once among eight, and the code's
top bit chooses between two such results. Levels are rounded to the 16-bit type of the activations.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

from .fragments import along, bases, column_sums, left, product_layout, store


@constexpr_function
def words_layout(rows, splits):
    """Of [S, R, quad 4, word 4]."""
    return gl.DistributedLinearLayout(
        bases(4, 3, 4) + [[0, 8, 0, 0]] + bases(4, 1, rows, 16),
        bases(4, 2, 4) + bases(4, 1, 8),
        bases(4, 0, splits),
        [],
        [splits, rows, 4, 4],
    )


@constexpr_function
def codes_layout(rows, splits):
    """Of codes [S, R, quad 4, word 4, column 8]."""
    return gl.DistributedLinearLayout(
        bases(5, 4, 8) + bases(5, 3, 4) + [[0, 8, 0, 0, 0]] + bases(5, 1, rows, 16),
        bases(5, 2, 4) + bases(5, 1, 8),
        bases(5, 0, splits),
        [],
        [splits, rows, 4, 4, 8],
    )


@constexpr_function
def columns_layout(tokens, splits):
    """Of x [S, T, quad 4, word 4, column 8]."""
    return gl.DistributedLinearLayout(
        bases(5, 4, 8) + bases(5, 3, 4) + bases(5, 1, tokens, 8),
        bases(5, 2, 4) + bases(5, 1, 8),
        bases(5, 0, splits),
        [],
        [splits, tokens, 4, 4, 8],
    )


@constexpr_function
def look_up_code(levels):
    """PTX: the eight levels $0..$3 of a word, of which $4 is a copy.

    levels: 16 patterns of 16 bits. For the four codes of half a word, `i` holds their low three
    bits and `m` a byte of ones where the top bit is set; a and c become the low and high bytes.
    """
    packed = [
        sum((levels[first + i] >> shift & 255) << 8 * i for i in range(4))
        for shift in (0, 8)
        for first in (0, 4, 8, 12)
    ]
    lines = [".reg .b32 h, i, m, n, a, b, c, d;"]
    for half in range(2):
        lines += [
            f"shr.b32 h, $4, {16 * half}; and.b32 i, h, 0x7777; shl.b32 n, h, 4;",
            "prmt.b32 m, h, n, 0x9d8c;",
            f"prmt.b32 a, {packed[0]}, {packed[1]}, i; prmt.b32 b, {packed[2]}, {packed[3]}, i;",
            f"prmt.b32 c, {packed[4]}, {packed[5]}, i; prmt.b32 d, {packed[6]}, {packed[7]}, i;",
            "lop3.b32 a, a, b, m, 0xd8; lop3.b32 c, c, d, m, 0xd8;",
            f"prmt.b32 ${2 * half}, a, c, 0x4051; prmt.b32 ${2 * half + 1}, a, c, 0x6273;",
        ]
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def looked_up(words, levels: gl.constexpr, HALF: gl.constexpr):
    """words [S, R, 4, 4, 8], each eight times -> the levels of their codes."""
    code: gl.constexpr = look_up_code(levels)
    kinds: gl.constexpr = "=r,=r,=r,=r,r,r,r,r,r,r,r,r"
    if HALF:
        return gl.inline_asm_elementwise(code, kinds, [words], dtype=gl.float16, is_pure=True, pack=8)  # fmt: skip
    else:
        return gl.inline_asm_elementwise(code, kinds, [words], dtype=gl.bfloat16, is_pure=True, pack=8)  # fmt: skip


@gluon.jit
def numbers(value, at, map_ptr, step_ptr, mean_ptr, CODED: gl.constexpr, MEAN: gl.constexpr):
    """fp32 numbers of what was loaded from place `at`: themselves, or codes (`Numbers`)."""
    if CODED:
        found = gl.load(map_ptr + value.to(gl.int32)) * gl.load(step_ptr + at // 256)
        return found + gl.load(mean_ptr) if MEAN else found
    else:
        return value


@gluon.jit(do_not_specialize=["M"])
def table_few(
    x_ptr, w_ptr, scale_ptr, map_ptr, step_ptr, mean_ptr, shift_ptr, shift_step_ptr,
    bias_ptr, y_ptr, M, O, K, G, row_words,
    LEVELS: gl.constexpr, GROUP: gl.constexpr, CODED: gl.constexpr, SHIFTED: gl.constexpr,
    BIAS: gl.constexpr, HALF: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """y [M, O] = x [M, K] times the weight, plus the bias.

    scale: fp32 or, if CODED, uint8 codes [O G], with map [256], a step for 256 codes, and one mean.
    shift: codes of the same kind without a mean, if SHIFTED. LEVELS: 16 patterns of 16 bits.
    """
    kind: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    mma: gl.constexpr = product_layout(S)
    words_in: gl.constexpr = words_layout(R, S)
    x_in: gl.constexpr = columns_layout(T, S)
    wide: gl.constexpr = codes_layout(R, S)
    GROUPS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    first_row = gl.program_id(0) * R
    row = gl.minimum(first_row + along(1, R, words_in, 4), O - 1)
    rows_ptr = w_ptr + row * row_words + along(2, 4, words_in, 4) * 4 + along(3, 4, words_in, 4)
    split = along(0, S, words_in, 4)
    row_at = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, sides)), 0)
    row_at = gl.minimum(first_row + row_at, O - 1) * G
    split_s = gl.expand_dims(gl.arange(0, S, layout=gl.SliceLayout(1, sides)), 1)
    split_x = along(0, S, x_in, 5)
    token = along(1, T, x_in, 5)
    own = along(2, 4, x_in, 5) * 32 + along(3, 4, x_in, 5) * 8 + along(4, 8, x_in, 5)
    count = K // 128
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    words = gl.load(rows_ptr + gl.minimum(split, count - 1) * 16)
    next_words = gl.load(rows_ptr + gl.minimum(S + split, count - 1) * 16)
    for step in range(0, (count + S - 1) // S):
        later_words = gl.load(rows_ptr + gl.minimum((step + 2) * S + split, count - 1) * 16)
        block = step * S + split_x
        live = (block < count) & (token < M)
        x = gl.load(x_ptr + (token * K + block * 128 + own), mask=live, other=0).to(kind)
        bits = gl.expand_dims(gl.convert_layout(words, gl.SliceLayout(4, wide)), 4)  # fmt: skip
        bits = bits.to(gl.uint32, bitcast=True) | gl.zeros([S, R, 4, 4, 8], gl.uint32, layout=wide)
        a = gl.reshape(looked_up(bits, LEVELS, HALF), (S, R, 4, 4, 2, 2, 2))
        a = left(a, R, S, mma)
        at = row_at + gl.minimum(step * S + split_s, count - 1) * 128 // GROUP
        for group in gl.static_range(GROUPS):
            part = x
            if GROUPS > 1:
                part = gl.where(own // GROUP == group, x, gl.zeros_like(x))
            b = gl.permute(gl.reshape(part, (S, T, 4, 4, 2, 2, 2)), (0, 3, 4, 5, 2, 6, 1))
            b = gl.reshape(b, (S, 128, T))
            b = gl.convert_layout(b, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)
            sums = mma_v2(a, b, gl.zeros([S, R, T], gl.float32, layout=mma))
            scale = numbers(gl.load(scale_ptr + at + group), at + group, map_ptr, step_ptr, mean_ptr, CODED, True)  # fmt: skip
            total += sums * gl.expand_dims(scale, 2)
            if SHIFTED:
                shift = numbers(gl.load(shift_ptr + at + group), at + group, map_ptr, shift_step_ptr, mean_ptr, True, False)  # fmt: skip
                total += column_sums(b, T, S, mma, kind) * gl.expand_dims(shift, 2)
        words, next_words = next_words, later_words
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    store(gl.sum(total, 0), y_ptr, bias_ptr, bias_ptr, M, O, BIAS, False, R, T, layout)
