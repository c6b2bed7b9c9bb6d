"""What the few-token kernels share: how a block of packed codes becomes an operand of the tensor
cores' m16n8k16 product without moving a bit between threads.

Legend: S warps of a program, each with its own blocks of 128 columns; R rows of a program; T tokens
(a multiple of 8); n bits of a plane's fields, F = 8 / n fields of a byte; a *quad* is the four
threads that share a row of the operand.

A plane of a block is 4n words of 32 bits (bitpack.py). Thread q of a quad reads words qn .. qn+n-1,
which are 16 neighbouring bytes at 4 bits. Field f of bytes j and j+2 of a word are 16 bits apart, as
the two halves of an operand's register are. So one rotation brings both fields to the top of the
halves' mantissas, and one LOP3 masks them and sets the exponents: two weights 2**n + code, exact for
n <= 4, by two instructions. Bytes (n = 8) are two nibbles.

The sum over k does not care about the order of columns; `x_columns` is the order that this gives.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

@constexpr_function
def bases(rank, axis, size, first=1):
    """Basis vectors of a linear layout that run along `axis` in steps of first, 2 first, ..."""
    return [
        [first << i if at == axis else 0 for at in range(rank)]
        for i in range((size // first).bit_length() - 1)
    ]


@constexpr_function
def fields(n):
    """Fields of a byte."""
    return 8 // n


@constexpr_function
def weight_layout(n, rows, splits):
    """Of [S, R, quad 4, word n, field F, j % 2, j // 2]: registers hold pairs (j, j + 2)."""
    words, of_a_byte = bases(7, 3, n), bases(7, 4, fields(n))
    registers = [[0, 0, 0, 0, 0, 0, 1], *words, [0, 8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    return gl.DistributedLinearLayout(
        registers + of_a_byte + bases(7, 1, rows, 16),
        bases(7, 2, 4) + bases(7, 1, 8),
        bases(7, 0, splits),
        [],
        [splits, rows, 4, n, fields(n), 2, 2],
    )


@constexpr_function
def x_run(n):
    """Words whose columns lie side by side: a thread reads 4 or 8 neighbouring numbers of x."""
    return min(n, 2)


@constexpr_function
def x_layout(n, tokens, splits):
    """Of [S, T, quad 4, word n / run, field F, run x 4 columns]."""
    run = x_run(n)
    return gl.DistributedLinearLayout(
        bases(6, 5, 4 * run)
        + bases(6, 4, fields(n))
        + bases(6, 3, n // run)
        + bases(6, 1, tokens, 8),
        bases(6, 2, 4) + bases(6, 1, 8),
        bases(6, 0, splits),
        [],
        [splits, tokens, 4, n // run, fields(n), 4 * run],
    )


@constexpr_function
def only(layout, rank, axis):
    """The part of a layout of `rank` dimensions along one axis."""
    for i in range(rank - 1, -1, -1):
        if i != axis:
            layout = gl.SliceLayout(i, layout)
    return layout


@constexpr_function
def first_four(layout):
    """The first four of seven dimensions."""
    return gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, layout)))


@constexpr_function
def product_layout(splits):
    """Of the sums [S, R, T]: a warp has its own slice of the first axis."""
    return gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[splits, 1, 1], instr_shape=[1, 16, 8]
    )


@gluon.jit
def along(axis: gl.constexpr, size: gl.constexpr, layout: gl.constexpr, rank: gl.constexpr):
    """0 .. size - 1 along an axis, 1 long along the others."""
    own: gl.constexpr = only(layout, rank, axis)
    v = gl.arange(0, size, layout=own)
    for i in gl.static_range(rank):
        if i != axis:
            v = gl.expand_dims(v, i)
    return v


@gluon.jit
def word_offsets(n: gl.constexpr, layout: gl.constexpr):
    """Words of a plane of a block, [1, 1, 4, n]."""
    return along(2, 4, layout, 4) * n + along(3, n, layout, 4)


@gluon.jit
def x_columns(n: gl.constexpr, layout: gl.constexpr):
    """Columns of a block in the order of its plane of n bits, [1, 1, 4, n / run, F, 4 run]."""
    run: gl.constexpr = x_run(n)
    count: gl.constexpr = fields(n)
    word = along(2, 4, layout, 6) * n + along(3, n // run, layout, 6) * run
    # word % 4 * 4, said so that the compiler sees what divides it, and loads 16 bytes at once.
    chunk = word // 4 * (128 // n) + (word * 4 - word // 4 * 16)
    return chunk + along(4, count, layout, 6) * 16 + along(5, 4 * run, layout, 6)


@gluon.jit
def rotations(n: gl.constexpr, v: gl.constexpr, nibble: gl.constexpr, mantissa: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """By how much a word turns right, so that fields of v bits end at the top of a mantissa."""
    count: gl.constexpr = fields(n)
    at = along(4, count, layout, 7) * n + along(5, 2, layout, 7) * 8
    return (at + along(6, 2, layout, 7) * 0 + (nibble * 4 + v - mantissa)) & 31


@gluon.jit
def turned(words, by):
    """words [S, R, 4, n] rotated: [S, R, 4, n, F, 2, 2]."""
    wide = gl.expand_dims(gl.expand_dims(gl.expand_dims(words, 4), 5), 6)
    return (wide >> by) | (wide << ((32 - by) & 31))


@gluon.jit
def masked(words, mask: gl.constexpr, exponent: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr):  # fmt: skip
    """Two halves of each pair of equal words: 2**exponent * (1 + the masked bits / 2**mantissa)."""
    bias: gl.constexpr = 127 if mantissa == 7 else 15
    magic: gl.constexpr = (bias + exponent) << mantissa
    code: gl.constexpr = f"lop3.b32 $0, $1, {mask * 0x10001}, {magic * 0x10001}, 0xEA;"
    if mantissa == 7:
        return gl.inline_asm_elementwise(code, "=r,r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)  # fmt: skip
    else:
        return gl.inline_asm_elementwise(code, "=r,r,r", [words], dtype=gl.float16, is_pure=True, pack=2)  # fmt: skip


@gluon.jit
def left(halves, rows: gl.constexpr, splits: gl.constexpr, mma: gl.constexpr):
    """The left operand [S, R, 128] of halves [S, R, 4, n, F, 2, 2]; no thread gives a bit away."""
    a = gl.reshape(gl.permute(halves, (0, 1, 3, 4, 5, 2, 6)), (splits, rows, 128))
    return gl.convert_layout(a, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def right(x, n: gl.constexpr, tokens: gl.constexpr, splits: gl.constexpr, mma: gl.constexpr):
    """The right operand [S, 128, T] of x [S, T, 4, n / run, F, 4 run]."""
    run: gl.constexpr = x_run(n)
    count: gl.constexpr = fields(n)
    x = gl.reshape(x, (splits, tokens, 4, n // run, count, run, 2, 2))
    b = gl.reshape(gl.permute(x, (0, 3, 5, 4, 7, 2, 6, 1)), (splits, 128, tokens))
    return gl.convert_layout(b, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def column_sums(b, tokens: gl.constexpr, splits: gl.constexpr, mma: gl.constexpr, kind: gl.constexpr):  # fmt: skip
    """Sums over the columns of the right operand, [S, 1, T], by the tensor cores."""
    ones = gl.full([splits, 16, 128], 1.0, kind, layout=gl.DotOperandLayout(0, mma, 2))
    sums = mma_v2(ones, b, gl.zeros([splits, 16, tokens], gl.float32, layout=mma))
    return gl.expand_dims(gl.max(sums, 1), 1)


@gluon.jit
def plane_sums(sums, words, b, n: gl.constexpr, low: gl.constexpr, rows: gl.constexpr, splits: gl.constexpr, mantissa: gl.constexpr, kind: gl.constexpr, layout: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """sums += (code + offset(n)) * 2**low times x, for the codes of one plane."""
    if n == 8:
        for nibble in gl.static_range(2):
            turn = turned(words, rotations(8, 4, nibble, mantissa, layout))
            a = masked(turn, 15 << (mantissa - 4), 4 + 4 * nibble + low, mantissa, kind)
            sums = mma_v2(left(a, rows, splits, mma), b, sums)
    else:
        turn = turned(words, rotations(n, n, 0, mantissa, layout))
        a = masked(turn, ((1 << n) - 1) << (mantissa - n), n + low, mantissa, kind)
        sums = mma_v2(left(a, rows, splits, mma), b, sums)
    return sums


@constexpr_function
def offset(bits):
    """What `plane_sums` adds to every code, over all planes of `bits`."""
    low, total = bits, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            low -= width
            total += (2**8 + 2**4 if width == 8 else 2**width) << low
    return total


@constexpr_function
def before(bits, width):
    """Bits of the wider planes."""
    return bits & ~(2 * width - 1)


@constexpr_function
def below(bits, width):
    """Bits of the narrower planes."""
    return bits & (width - 1)


@gluon.jit
def group_of(block, GROUP: gl.constexpr):
    """The group that a whole block belongs to; of several, the first. GROUP 0: one group a row."""
    if GROUP == 0:
        return block * 0
    elif GROUP >= 128:
        return block // (GROUP // 128)
    else:
        return block * (128 // GROUP)


@gluon.jit
def load_x(x_ptr, block, live, K, M, n: gl.constexpr, T: gl.constexpr, layout: gl.constexpr, kind: gl.constexpr):  # fmt: skip
    """x [S, T, ..] of a block's columns in the order of a plane of n bits, zeros for no token."""
    token = along(1, T, layout, 6)
    at = token * K + block * 128 + x_columns(n, layout)
    return gl.load(x_ptr + at, mask=live & (token < M), other=0).to(kind)


@gluon.jit
def store(y, y_ptr, bias_ptr, step_ptr, M, O, BIAS: gl.constexpr, STEPS: gl.constexpr, R: gl.constexpr, T: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Write y [R, T] of a program to y [M, O]."""
    row = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    row = gl.expand_dims(row, 1)
    token = gl.expand_dims(gl.arange(0, T, layout=gl.SliceLayout(0, layout)), 0)
    if STEPS:
        y *= gl.load(step_ptr + token, mask=token < M, other=0.0)
    if BIAS:
        y += gl.load(bias_ptr + row, mask=row < O, other=0).to(gl.float32)
    live = (row < O) & (token < M)
    gl.store(y_ptr + token * O + row, y.to(y_ptr.dtype.element_ty), mask=live)
