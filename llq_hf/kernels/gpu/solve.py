"""Error feedback inside a block of columns as one kernel, rows side by side.

Legend: O rows, I columns, B columns of the block, BR rows of a program, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_whole(x):
    """Half to even, as torch.round, of |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def uniform_block(
    w_ptr, u_ptr, scale_ptr, zero_ptr, codes_ptr, error_ptr, start, size, O, I, u_row, u_column,
    scale_row, top, B: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Round columns start .. start + size of w [O, I], each repairing the later ones of the block.

    u: upper triangular [I, I] with strides u_row and u_column. scale, zero: fp32, one for each
    `GROUP` columns of the block, in rows of `scale_row`. Writes codes uint8 [I, O] and errors [O, B].
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    safe = tl.minimum(row, O - 1).to(tl.int64)
    column = tl.arange(0, B)
    inside = column < size
    w = tl.load(w_ptr + safe[:, None] * I + start + column[None, :], mask=inside[None, :], other=0)
    errors = tl.zeros((BR, B), tl.float32)
    for i in range(0, size):
        here = (column == i)[None, :]
        w_R = tl.sum(tl.where(here, w, 0.0), 1)
        at = (start + i).to(tl.int64) * u_row + (start + column).to(tl.int64) * u_column
        u_B = tl.load(u_ptr + at, mask=inside, other=0)
        pivot = tl.sum(tl.where(column == i, u_B, 0.0), 0)
        scale_R = tl.load(scale_ptr + safe * scale_row + i // GROUP)
        zero_R = tl.load(zero_ptr + safe * scale_row + i // GROUP)
        steps_R = tl.clamp(tl.div_rn(w_R, scale_R), -1048576.0, 1048576.0)
        code_R = tl.clamp(nearest_whole(steps_R) + zero_R, 0.0, top)
        tl.store(codes_ptr + (start + i).to(tl.int64) * O + row, code_R.to(tl.uint8), mask=row < O)
        rest_R = w_R - scale_R * (code_R - zero_R)
        error_R = tl.div_rn(rest_R, pivot + rest_R * 0)
        w = tl.where((column > i)[None, :], w - error_R[:, None] * u_B[None, :], w)
        errors = tl.where(here, error_R[:, None], errors)
    tl.store(error_ptr + safe[:, None] * B + column[None, :], errors, mask=(row < O)[:, None])
