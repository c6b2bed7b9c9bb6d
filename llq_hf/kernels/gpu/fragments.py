"""What the few-token kernels share: how a block of packed codes becomes an operand of the tensor
cores' m16n8k16 product without moving a bit between threads.

Legend: S warps of a program, each with its own blocks of 128 columns; R rows of a program; T tokens
(a multiple of 8); n bits of a plane's fields; a *quad* is the four threads that share a row of the
operand.

A plane of a block is 4n words of 32 bits (bitpack.py). Thread q of a quad reads words qn .. qn+n-1,
which are 16 neighbouring bytes at 4 bits. The same field of bytes j and j+2 of a word lies 16 bits
apart, as the two halves of an operand's register do. So one LOP3 masks two fields where they are
and sets the bits around them:
    bf16    128 + code * 2**power, exact as power + n <= 4: the sums of x have to be subtracted
    fp16    code * 2**power * 2**-24, a subnormal number: nothing has to be
Fields whose bit in the half is `power` modulo 4 form a *class*: one after shifts by 0, 4, 8 and 12,
which all classes share, with its own sum. Bytes (n = 8) are two nibbles.

The sum over k does not care about the order of columns; `x_columns` is the order that this gives.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.runtime.jit import constexpr_function

from . import few

STAGES = gl.constexpr(few.STAGES)


@constexpr_function
def ring_layout(rank):
    """Of `rank` dimensions in shared memory, row by row."""
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(rank - 1, -1, -1)))


@constexpr_function
def bases(rank, axis, size, first=1):
    """Basis vectors of a linear layout that run along `axis` in steps of first, 2 first, ..."""
    return [
        [first << i if at == axis else 0 for at in range(rank)]
        for i in range((size // first).bit_length() - 1)
    ]


@constexpr_function
def classes(n):
    """Classes of fields: 1, 1, 2 and 4 for 8, 4, 2 and 1 bits."""
    return max(4 // n, 1)


@constexpr_function
def fields(n):
    """Fields of a byte that belong to one class."""
    return 1 if n == 8 else 2


@constexpr_function
def run_of(n):
    """Words whose columns lie side by side: a thread reads 4 or 8 neighbouring numbers of x."""
    return min(n, 2)


@constexpr_function
def weight_layout(n, rows, splits):
    """Of [S, R, quad 4, word n, field, j % 2, j // 2]: registers hold pairs (j, j + 2)."""
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
def x_layout(n, tokens, splits):
    """Of x, [S, T, quad 4, word n / run, field 8 / n, run x 4 columns]."""
    run = run_of(n)
    return gl.DistributedLinearLayout(
        bases(6, 5, 4 * run) + bases(6, 4, 8 // n) + bases(6, 3, n // run) + bases(6, 1, tokens, 8),
        bases(6, 2, 4) + bases(6, 1, 8),
        bases(6, 0, splits),
        [],
        [splits, tokens, 4, n // run, 8 // n, 4 * run],
    )


@constexpr_function
def only(layout, rank, axis):
    """The part of a layout of `rank` dimensions along one axis."""
    for i in range(rank - 1, -1, -1):
        if i != axis:
            layout = gl.SliceLayout(i, layout)
    return layout


@constexpr_function
def words_layout(n, rows, splits):
    """Of the words [S, R, quad 4, n] that `weight_layout` is made of."""
    whole = weight_layout(n, rows, splits)
    return gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, whole)))


@constexpr_function
def product_layout(splits):
    """Of the sums [S, R, T]: a warp has its own slice of the first axis."""
    return gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[splits, 1, 1], instr_shape=[1, 16, 8]
    )


@constexpr_function
def repeated_layout(rows, splits, tokens):
    """Of sums [S, R / 16, 16, T]: `product_layout` with its rows in two axes."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 8, 0], *bases(4, 1, rows // 16), *bases(4, 3, tokens, 8)],
        [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        bases(4, 0, splits),
        [],
        [splits, rows // 16, 16, tokens],
    )


@constexpr_function
def above(HALF):
    """What stands above a code in an operand."""
    return 0 if HALF else 128


@constexpr_function
def worth(HALF, power):
    """The number that a unit of a code at bit `power` of an operand has to be multiplied with."""
    return 2.0 ** (24 - power) if HALF else 2.0**-power


@constexpr_function
def code_mask(n, cls):
    """The bits of a class's codes among the four at the end of a half."""
    return 15 if n == 8 else ((1 << n) - 1) << (cls * n % 4)


@constexpr_function
def groups_of_block(GROUP):
    """Groups that a block of 128 columns belongs to."""
    return 1 if GROUP == 0 or GROUP >= 128 else 128 // GROUP


@constexpr_function
def before(bits, width):
    """Bits of the wider planes."""
    return bits & ~(2 * width - 1)


@constexpr_function
def below(bits, width):
    """Bits of the narrower planes."""
    return bits & (width - 1)


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
    """Columns of a block, [1, 1, 4, n / run, 8 / n, 4 run]."""
    run: gl.constexpr = run_of(n)
    word = along(2, 4, layout, 6) * n + along(3, n // run, layout, 6) * run
    # word % 4 * 4, said so that the compiler sees what divides it, and loads 16 bytes at once.
    chunk = word // 4 * (128 // n) + (word * 4 - word // 4 * 16)
    return chunk + along(4, 8 // n, layout, 6) * 16 + along(5, 4 * run, layout, 6)


@gluon.jit
def shifted(words, n: gl.constexpr, nibble: gl.constexpr, layout: gl.constexpr):
    """words [S, R, 4, n] with each field's four bits at the end of its half, [.., field, 2, 2]."""
    count: gl.constexpr = fields(n)
    by = along(4, count, layout, 7) * 4 + along(5, 2, layout, 7) * 8
    by = by + along(6, 2, layout, 7) * 0 + nibble * 4
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(words, 4), 5), 6) >> by


@gluon.jit
def masked(words, mask: gl.constexpr, HALF: gl.constexpr):
    """Both halves of each pair of equal words: their masked bits as an operand's numbers."""
    if HALF:
        bits: gl.constexpr = f"and.b32 $0, $1, {mask * 0x10001};"
        return gl.inline_asm_elementwise(
            bits, "=r,r,r", [words], dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        code: gl.constexpr = f"lop3.b32 $0, $1, {mask * 0x10001}, {0x43004300}, 0xEA;"
        return gl.inline_asm_elementwise(
            code, "=r,r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def left(halves, rows: gl.constexpr, splits: gl.constexpr, mma: gl.constexpr):
    """The left operand [S, R, k] of halves [S, R, quad, a, b, c, half], in this order: a, b, c,
    quad, half. No thread gives a bit away.
    """
    k: gl.constexpr = halves.shape[3] * halves.shape[4] * halves.shape[5] * 8
    a = gl.reshape(gl.permute(halves, (0, 1, 3, 4, 5, 2, 6)), (splits, rows, k))
    return gl.convert_layout(a, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def of_class(x, n: gl.constexpr, cls: gl.constexpr):
    """Of x [S, T, 4, n / run, 8 / n, 4 run], the fields of a class: every `classes(n)`-th one."""
    count: gl.constexpr = fields(n)
    if classes(n) == 1:
        return x
    elif classes(n) == 2:
        pairs = gl.reshape(x, (x.shape[0], x.shape[1], 4, x.shape[3], count, 2, x.shape[5]))
        even, odd = gl.split(gl.permute(pairs, (0, 1, 2, 3, 4, 6, 5)))
        return even if cls == 0 else odd
    else:
        fours = gl.reshape(x, (x.shape[0], x.shape[1], 4, x.shape[3], count, 2, 2, x.shape[5]))
        even, odd = gl.split(gl.permute(fours, (0, 1, 2, 3, 4, 7, 5, 6)))
        first, second = gl.split(even if cls % 2 == 0 else odd)
        return first if cls < 2 else second


@gluon.jit
def right(x, n: gl.constexpr, tokens: gl.constexpr, splits: gl.constexpr, mma: gl.constexpr):
    """The right operand [S, k, T] of a class of x [S, T, 4, n / run, field, 4 run]."""
    run: gl.constexpr = run_of(n)
    count: gl.constexpr = fields(n)
    x = gl.reshape(x, (splits, tokens, 4, n // run, count, run, 2, 2))
    b = gl.reshape(gl.permute(x, (0, 3, 5, 4, 7, 2, 6, 1)), (splits, 16 * n * count, tokens))
    return gl.convert_layout(b, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def product(
    a, b, rows: gl.constexpr, splits: gl.constexpr, tokens: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """a @ b, [S, R, T] fp32."""
    return mma_v2(a, b, gl.zeros([splits, rows, tokens], gl.float32, layout=mma))


@gluon.jit
def column_sums(
    b, rows: gl.constexpr, splits: gl.constexpr, tokens: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Sums over the columns of the right operand, by the tensor cores, the same in all R rows."""
    ones = gl.full([splits, 16, b.shape[1]], 1.0, b.dtype, layout=gl.DotOperandLayout(0, mma, 2))
    sums = product(ones, b, 16, splits, tokens, mma)
    more: gl.constexpr = repeated_layout(rows, splits, tokens)
    sums = gl.convert_layout(sums, gl.SliceLayout(1, more), assert_trivial=True)
    many = gl.zeros([splits, rows // 16, 16, tokens], gl.float32, layout=more)
    many = gl.reshape(many + gl.expand_dims(sums, 1), (splits, rows, tokens))
    return gl.convert_layout(many, mma, assert_trivial=True)


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
def load_x(x_ptr, block, live, K, M, n: gl.constexpr, T: gl.constexpr, layout: gl.constexpr):
    """x in a block in the order of a plane of n bits, zeros where there is no token."""
    token = along(1, T, layout, 6)
    at = token * K + block * 128 + x_columns(n, layout)
    return gl.load(x_ptr + at, mask=live & (token < M), other=0)


@gluon.jit
def in_group(x, n: gl.constexpr, group: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr):
    """x with zeros outside of one of a block's groups."""
    if GROUP == 0 or GROUP >= 128:
        return x
    else:
        return gl.where(x_columns(n, layout) // GROUP == group, x, gl.zeros_like(x))


@gluon.jit
def first_group(
    step, blocks_ptr, count, O, G, GROUP: gl.constexpr, LISTED: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The place of each row's first group in each warp's block, [S, R]."""
    sides: gl.constexpr = gl.SliceLayout(2, mma)
    row = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, sides)), 0)
    row = gl.minimum(gl.program_id(0) * R + row, O - 1)
    index = step * S + gl.expand_dims(gl.arange(0, S, layout=gl.SliceLayout(1, sides)), 1)
    return row * G + group_of(block_number(blocks_ptr, index, count, LISTED), GROUP)


@gluon.jit
def block_number(blocks_ptr, index, count, LISTED: gl.constexpr):
    """The number of the 128 columns that block `index` of a part belongs to; a valid one beyond."""
    safe = gl.minimum(index, count - 1)
    return gl.load(blocks_ptr + safe) if LISTED else safe


@gluon.jit
def half_of(word, at):
    """The fp16 number at place `at`, as fp32, of the word that holds it."""
    half = (word >> ((at & 1) * 16)) & 0xFFFF
    return half.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def byte_of(word, at):
    """The byte at place `at`, as fp32, of the word that holds it."""
    return ((word >> ((at & 3) * 8)) & 0xFF).to(gl.float32)


@gluon.jit
def ask(ring, step, pointers):
    """Begin to copy what lies at `pointers` into the place of a step. Copies go past registers, so
    that nothing waits for them but `wait`.
    """
    async_copy.async_copy_global_to_shared(ring.index(step % STAGES), pointers)


@gluon.jit
def new_ring_of_rows(ptr, THERE: gl.constexpr, R: gl.constexpr, S: gl.constexpr):
    """Shared memory for a word of each row and step, if there are such words."""
    if THERE:
        return gl.allocate_shared_memory(ptr.dtype.element_ty, [STAGES, S, R], ring_layout(2))
    else:
        return gl.allocate_shared_memory(gl.int32, [1], ring_layout(1))


@gluon.jit
def row_words_of(ring, step, at, THERE: gl.constexpr, layout: gl.constexpr):
    """A word of each row, [S, R]; anything if there are none."""
    if THERE:
        return ring.index(step % STAGES).load(layout)
    else:
        return at


@gluon.jit
def wait():
    """Wait until the copies of the oldest step that has not been waited for are there."""
    async_copy.wait_group(STAGES - 2)


@gluon.jit
def store(
    y, y_ptr, bias_ptr, step_ptr, M, O, BIAS: gl.constexpr, STEPS: gl.constexpr, R: gl.constexpr,
    T: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
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
