"""Few tokens times 4-bit codes of a table (NF4), on tensor cores, straight from the stored bytes.

Legend: O rows, K columns (whole blocks of 128), G groups of a row, M tokens; S, R, T as in
fragments.py. Of the two codes of a byte, the first lies in the high half, so a word holds eight
neighbouring columns and a quarter of a block is four words.

A level has 16 bits, two bytes; PRMT looks up a byte for four codes at once among eight, and the
code's top bit chooses between two such results. Levels are rounded to the 16-bit type of the
activations.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.jit import constexpr_function

from .fragments import (
    STAGES,
    along,
    ask,
    bases,
    column_sums,
    first_group,
    groups_of_block,
    left,
    new_ring_of_rows,
    product,
    product_layout,
    ring_layout,
    row_words_of,
    store,
    wait,
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
        return gl.inline_asm_elementwise(
            code, kinds, [words], dtype=gl.float16, is_pure=True, pack=8,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            code, kinds, [words], dtype=gl.bfloat16, is_pure=True, pack=8,
        )  # fmt: skip


@gluon.jit
def numbers(
    ptr, first, at, group: gl.constexpr, map_ptr, step_ptr, mean_ptr, CODED: gl.constexpr,
    MEAN: gl.constexpr,
):  # fmt: skip
    """fp32 numbers of one of a block's groups: themselves, or codes (`Numbers`), in words of four,
    of which `first` holds the first group's.
    """
    own = at + group
    if CODED:
        word = first if group == 0 else gl.load(ptr + (own >> 2))
        code = (word >> ((own & 3) * 8)) & 0xFF
        found = gl.load(map_ptr + code) * gl.load(step_ptr + own // 256)
        return found + gl.load(mean_ptr) if MEAN else found
    else:
        return first if group == 0 else gl.load(ptr + own)


@gluon.jit
def ask_step(
    words, values, w_ptr, scale_ptr, step, O, K, G, row_words, CODED: gl.constexpr,
    GROUP: gl.constexpr, R: gl.constexpr, S: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Begin to copy each warp's block, and what is stored for its first group."""
    layout: gl.constexpr = gl.SliceLayout(4, codes_layout(R, S))
    row = gl.minimum(gl.program_id(0) * R + along(1, R, layout, 4), O - 1)
    block = gl.minimum(step * S + along(0, S, layout, 4), K // 128 - 1)
    at = row * row_words + block * 16 + along(2, 4, layout, 4) * 4 + along(3, 4, layout, 4)
    ask(words, step, w_ptr + at)
    own = first_group(step, w_ptr, K // 128, O, G, GROUP, False, R, S, mma)
    ask(values, step, scale_ptr + (own >> 2 if CODED else own))
    async_copy.commit_group()


@gluon.jit
def own_columns(layout: gl.constexpr):
    """Columns of a block, [1, 1, 4, 4, 8]."""
    return along(2, 4, layout, 5) * 32 + along(3, 4, layout, 5) * 8 + along(4, 8, layout, 5)


@gluon.jit
def load_columns(x_ptr, step, M, K, S: gl.constexpr, T: gl.constexpr):
    """x of each warp's block."""
    layout: gl.constexpr = columns_layout(T, S)
    block = step * S + along(0, S, layout, 5)
    token = along(1, T, layout, 5)
    at = token * K + block * 128 + own_columns(layout)
    return gl.load(x_ptr + at, mask=(block < K // 128) & (token < M), other=0)


@gluon.jit
def add_block(
    total, words, value, at, x, scale_ptr, map_ptr, step_ptr, mean_ptr, shift_ptr, shift_step_ptr,
    LEVELS: gl.constexpr, GROUP: gl.constexpr, CODED: gl.constexpr, SHIFTED: gl.constexpr,
    HALF: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """total + the product of each warp's block."""
    x_in: gl.constexpr = columns_layout(T, S)
    wide: gl.constexpr = codes_layout(R, S)
    GROUPS: gl.constexpr = groups_of_block(GROUP)
    own = own_columns(x_in)
    bits = gl.expand_dims(words, 4) | gl.zeros([S, R, 4, 4, 8], gl.uint32, layout=wide)
    a = left(gl.reshape(looked_up(bits, LEVELS, HALF), (S, R, 4, 4, 2, 2, 2)), R, S, mma)
    for group in gl.static_range(GROUPS):
        part = x
        if GROUPS > 1:
            part = gl.where(own // GROUP == group, x, gl.zeros_like(x))
        b = gl.permute(gl.reshape(part, (S, T, 4, 4, 2, 2, 2)), (0, 3, 4, 5, 2, 6, 1))
        b = gl.reshape(b, (S, 128, T))
        b = gl.convert_layout(b, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)
        scale = numbers(scale_ptr, value, at, group, map_ptr, step_ptr, mean_ptr, CODED, True)
        total += product(a, b, R, S, T, mma) * gl.expand_dims(scale, 2)
        if SHIFTED:
            first = gl.load(shift_ptr + (at >> 2))
            shift = numbers(
                shift_ptr, first, at, group, map_ptr, shift_step_ptr, mean_ptr, True, False,
            )  # fmt: skip
            total += column_sums(b, R, S, T, mma) * gl.expand_dims(shift, 2)
    return total


@gluon.jit(do_not_specialize=["M"])
def table_few(
    x_ptr, w_ptr, scale_ptr, map_ptr, step_ptr, mean_ptr, shift_ptr, shift_step_ptr,
    bias_ptr, y_ptr, M, O, K, G, row_words,
    LEVELS: gl.constexpr, GROUP: gl.constexpr, CODED: gl.constexpr, SHIFTED: gl.constexpr,
    BIAS: gl.constexpr, HALF: gl.constexpr, R: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """y [M, O] = x [M, K] times the weight, plus the bias.

    scale: fp32 or, if CODED, uint8 codes [O G] (int32 words of four), with map [256], a step for
    256 codes, and one mean. shift: codes of the same kind without a mean, if SHIFTED. LEVELS: 16
    patterns of 16 bits.
    """
    mma: gl.constexpr = product_layout(S)
    count = K // 128
    total = gl.zeros([S, R, T], gl.float32, layout=mma)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, S, R, 4, 4], ring_layout(4))
    values = new_ring_of_rows(scale_ptr, True, R, S)
    for step in gl.static_range(STAGES - 1):
        ask_step(words, values, w_ptr, scale_ptr, step, O, K, G, row_words, CODED, GROUP, R, S, mma)
    x = load_columns(x_ptr, 0, M, K, S, T)
    for step in range(0, (count + S - 1) // S):
        wait()
        bits = words.index(step % STAGES).load(gl.SliceLayout(4, codes_layout(R, S)))
        at = first_group(step, w_ptr, K // 128, O, G, GROUP, False, R, S, mma)
        value = row_words_of(values, step, at, True, gl.SliceLayout(2, mma))
        ask_step(
            words, values, w_ptr, scale_ptr, step + (STAGES - 1), O, K, G, row_words, CODED, GROUP,
            R, S, mma,
        )  # fmt: skip
        y = load_columns(x_ptr, step + 1, M, K, S, T)
        total = add_block(
            total, bits.to(gl.uint32, bitcast=True), value, at, x, scale_ptr, map_ptr, step_ptr,
            mean_ptr, shift_ptr, shift_step_ptr, LEVELS, GROUP, CODED, SHIFTED, HALF, R, S, T, mma,
        )  # fmt: skip
        x = y
    async_copy.wait_group(0)
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    store(gl.sum(total, 0), y_ptr, bias_ptr, bias_ptr, M, O, BIAS, False, R, T, layout)
