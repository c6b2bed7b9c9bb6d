"""Error feedback inside a block of columns as one kernel, rows side by side.

Legend: O rows, I columns, B columns of the block, BR rows of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_whole(x):
    """Half to even, as torch.round, of |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest_code(
    value_R, scale_R, zero_R, top, HALVES: tl.constexpr, MEANS: tl.constexpr
):  # fmt: skip
    """The code 0 .. top of a uniform grid whose value scale * (code - zero) is nearest.

    HALVES: the zero lies between two codes. MEANS: it lies anywhere.
    """
    steps_R = tl.clamp(tl.div_rn(value_R, scale_R), -1048576.0, 1048576.0)
    if HALVES:
        code_R = nearest_whole(steps_R - 0.5) + (zero_R + 0.5)
    elif MEANS:
        whole_R = tl.floor(zero_R)
        code_R = nearest_whole(steps_R + (zero_R - whole_R)) + whole_R
    else:
        code_R = nearest_whole(steps_R) + zero_R
    return tl.clamp(code_R, 0.0, top)


@triton.jit
def uniform_block(
    w_ptr, u_ptr, drift_ptr, scale_ptr, zero_ptr, mean_ptr, codes_ptr, error_ptr, before_ptr,
    start, size, O, I, u_row, u_column, drift_row, top,
    HALVES: tl.constexpr, MEANS: tl.constexpr, DRIFT: tl.constexpr,
    B: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Round columns start .. start + size of w [O, I], each compensated in the later ones of the
    block, as `error_feedback.by_columns` does.

    u: upper triangular [I, I] with strides u_row and u_column; drift: of strides drift_row and 1.
    scale, zero: fp32 [B, O], of each column. HALVES: zeros lie between two codes. MEANS: values
    have a mean [B, O] added, and zeros lie anywhere. Writes codes uint8 [I, O], errors [O, B], and
    with DRIFT what the columns were before rounding, [O, B].
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, O - 1).to(tl.int64)
    column = tl.arange(0, B).to(tl.int64)  # offsets of large weights need 64 bits
    inside = column < size
    w = tl.load(w_ptr + safe[:, None] * I + start + column[None, :], mask=inside[None, :], other=0)
    errors = tl.zeros((BR, B), tl.float32)
    before = tl.zeros((BR, B), tl.float32)
    for i in range(0, size):
        here = (column == i)[None, :]
        later = (column > i)[None, :]
        w_R = tl.sum(tl.where(here, w, 0.0), 1)
        at = (start + i + column * 0) * u_row + (start + column) * u_column
        u_B = tl.load(u_ptr + at, mask=inside, other=0)
        pivot = tl.sum(tl.where(column == i, u_B, 0.0), 0)
        scale_R = tl.load(scale_ptr + (i * O + safe))
        zero_R = tl.load(zero_ptr + (i * O + safe))
        mean_R = zero_R * 0
        if MEANS:
            mean_R = tl.load(mean_ptr + (i * O + safe))
        code_R = nearest_code(w_R - mean_R, scale_R, zero_R, top, HALVES, MEANS)
        tl.store(codes_ptr + ((start + i + safe * 0) * O + row), code_R.to(tl.uint8), mask=row < O)
        rest_R = w_R - (scale_R * (code_R - zero_R) + mean_R)
        error_R = tl.div_rn(rest_R, pivot + rest_R * 0)
        if DRIFT:
            before = tl.where(here, w_R[:, None], before)
            at = (start + i + column * 0) * drift_row + start + column
            drift_B = tl.load(drift_ptr + at, mask=inside, other=0)
            w = tl.where(later, w + w_R[:, None] * drift_B[None, :], w)
        w = tl.where(later, w - error_R[:, None] * u_B[None, :], w)
        errors = tl.where(here, error_R[:, None], errors)
    to = safe[:, None] * B + column[None, :]
    tl.store(error_ptr + to, errors, mask=(row < O)[:, None])
    if DRIFT:
        tl.store(before_ptr + to, before, mask=(row < O)[:, None])


@triton.jit
def backward_block(
    sums_ptr, target_ptr, matrix_ptr, codes_ptr, error_ptr, start, size, O, I, m_row, m_column, top,
    GREEDY: tl.constexpr, B: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Round columns start + size - 1 .. start, each changing the sums of the earlier ones.

    With feedback, a code is its sum rounded, halves up, and its error times its row of the matrix
    [I, I] is added to the sums. GREEDY: a code moves by minus its sum over the diagonal, rounded,
    and the move times the row is added. sums [O, size]; target, codes, error [O, I] in fp32; the
    last two are written (GREEDY: changed) in the columns of the block.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, O - 1).to(tl.int64)
    column = tl.arange(0, B).to(tl.int64)
    inside = column < size
    live = (row < O)[:, None] & inside[None, :]
    place = safe[:, None] * I + start + column[None, :]
    sums = tl.load(sums_ptr + (safe[:, None] * size + column[None, :]), mask=live, other=0)
    if GREEDY:
        codes = tl.load(codes_ptr + place, mask=live, other=0)
        errors = tl.load(error_ptr + place, mask=live, other=0)
    else:
        codes = tl.zeros((BR, B), tl.float32)
        errors = tl.load(target_ptr + place, mask=live, other=0)
    for step in range(0, size):
        i = size - 1 - step
        here = (column == i)[None, :]
        at = (start + i + column * 0) * m_row + (start + column) * m_column
        matrix_B = tl.load(matrix_ptr + at, mask=inside, other=0)
        sum_R = tl.sum(tl.where(here, sums, 0.0), 1)
        if GREEDY:
            old_R = tl.sum(tl.where(here, codes, 0.0), 1)
            pivot = tl.sum(tl.where(column == i, matrix_B, 0.0), 0)
            code_R = nearest_whole(old_R - tl.div_rn(sum_R, pivot + sum_R * 0))
            code_R = tl.clamp(code_R, 0.0, top)
            change_R = code_R - old_R
            errors = tl.where(here, errors + change_R[:, None], errors)
        else:
            code_R = tl.clamp(tl.floor(sum_R + 0.5), 0.0, top)
            change_R = tl.sum(tl.where(here, errors, 0.0), 1) - code_R
            errors = tl.where(here, change_R[:, None], errors)
        codes = tl.where(here, code_R[:, None], codes)
        sums += change_R[:, None] * matrix_B[None, :]
    tl.store(codes_ptr + place, codes, mask=live)
    tl.store(error_ptr + place, errors, mask=live)


@triton.jit
def descend_block(
    gradient_ptr, value_ptr, matrix_ptr, scale_ptr, zero_ptr, codes_ptr, moved_ptr, start, size, O,
    m_row, m_column, top, HALVES: tl.constexpr, B: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Coordinate descent in columns start .. start + size: each value moves against its gradient to
    the nearest one of its grid, which changes the gradients of the later columns.

    gradient, value, scale, zero [I, O] in fp32; matrix [I, I]. Writes values, codes uint8 [I, O],
    and moves [size, O].
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, O - 1).to(tl.int64)
    column = tl.arange(0, B).to(tl.int64)
    inside = column < size
    live = (row < O)[:, None] & inside[None, :]
    place = (start + column)[None, :] * O + safe[:, None]
    gradient = tl.load(gradient_ptr + place, mask=live, other=0)
    values = tl.load(value_ptr + place, mask=live, other=0)
    moves = tl.zeros((BR, B), tl.float32)
    for i in range(0, size):
        here = (column == i)[None, :]
        at = (start + i + column * 0) * m_row + (start + column) * m_column
        matrix_B = tl.load(matrix_ptr + at, mask=inside, other=0)
        pivot = tl.sum(tl.where(column == i, matrix_B, 0.0), 0)
        old_R = tl.sum(tl.where(here, values, 0.0), 1)
        slope_R = tl.sum(tl.where(here, gradient, 0.0), 1)
        own = (start + i + safe * 0) * O + safe
        scale_R, zero_R = tl.load(scale_ptr + own), tl.load(zero_ptr + own)
        wanted_R = old_R - tl.div_rn(slope_R, pivot + slope_R * 0)
        code_R = nearest_code(wanted_R, scale_R, zero_R, top, HALVES, False)
        tl.store(codes_ptr + own, code_R.to(tl.uint8), mask=row < O)
        move_R = scale_R * (code_R - zero_R) - old_R
        moves = tl.where(here, move_R[:, None], moves)
        gradient += move_R[:, None] * matrix_B[None, :]
    tl.store(moved_ptr + (column[None, :] * O + safe[:, None]), moves, mask=live)
    tl.store(value_ptr + place, values + moves, mask=live)
