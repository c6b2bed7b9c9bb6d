"""GPTQ's error feedback: the error of a rounded column is compensated in the columns after it.

Legend: O out_features, I in_features, B columns of a block, L later ones of it, G groups.

U is the upper Cholesky factor of H^-1 (`cholesky.factorize` with `inverse`). Rounding column j of
W to q_j costs ((w_j - q_j) / U_jj)^2 on the calibration outputs, and the best compensation of the
later columns is -(w_j - q_j) / U_jj * U_j,later (Frantar et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..kernels import OVERFLOW, BlockRounder, block_rounder
from .grids import Grid, HalfGrid, Uniform, concatenated

BLOCK = 128  # columns of a block: later columns get its errors all at once


def _begin_nothing(start: int, stop: int) -> None: ...


def by_columns(
    W_OI: Tensor,
    U_II: Tensor | None,
    rounded: Callable[[int, Tensor], Tensor],
    begin: Callable[[int, int], None] = _begin_nothing,
    block: int = BLOCK,
    drift_II: Tensor | None = None,
    fused: bool = True,
) -> None:
    """Round the columns of W_OI from first to last, and compensate the error of each in all later
    ones. W_OI is overwritten.

    rounded(j, w_O): gives the value that column j, by now w_O, is rounded to.
    begin(start, stop): called when a block of columns is reached. W_OI[:, start:stop] then holds
        the errors of all earlier blocks.
    U_II: None for no compensation.
    drift_II: strictly upper; the later columns also get w_O * drift[j, later], with w_O column j
        before it is rounded (GPTAQ).
    fused: multiply and add in one operation, with one rounding. False rounds twice, as the
        authors' code does.

    LLQError where the compensation overflows. A block is kept transposed, so that each column is
    contiguous: that takes half the time for the same codes.
    """
    columns = W_OI.shape[1]
    errors_BO = W_OI.new_empty(min(block, columns), len(W_OI))
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        begin(start, stop)
        # torch transposes fast only what is contiguous.
        block_BO = W_OI[:, start:stop].contiguous().T.contiguous()
        if U_II is None:
            for j, w_O in enumerate(block_BO, start):
                rounded(j, w_O)
            continue
        U_BB = U_II[start:stop, start:stop].contiguous()
        steps = zip(block_BO, errors_BO, U_BB[..., None], torch.diagonal(U_BB), strict=False)
        for i, (w_O, error_O, u_B1, pivot) in enumerate(steps):
            torch.sub(w_O, rounded(start + i, w_O), out=error_O).div_(pivot)
            later_LO = block_BO[i + 1 :]
            u_L1 = u_B1[i + 1 :]
            if drift_II is not None:
                later_LO.addcmul_(drift_II[start + i, start + i + 1 : stop, None], w_O)
            if fused:
                later_LO.addcmul_(u_L1, error_O, value=-1)
            else:
                later_LO.sub_(u_L1 * error_O)
        W_OI[:, stop:].addmm_(errors_BO[: stop - start].T, U_II[start:stop, stop:], alpha=-1)
        if drift_II is not None:
            # Each column of the block still holds what it was before it was rounded.
            W_OI[:, stop:].addmm_(block_BO.T, drift_II[start:stop, stop:])
    # NaN spreads to all later columns, so the last column shows it.
    if U_II is not None and bool(block_BO[-1].isnan().any()):
        raise LLQError(OVERFLOW)


def by_blocks(
    W_OI: Tensor,
    U_II: Tensor | None,
    rounded: Callable[[int, int, Tensor], Tensor],
    block: int = BLOCK,
) -> None:
    """Round whole blocks of columns at once: rounded(start, stop, w_OB) gives values [O, B].

    Errors are compensated in later blocks only. W_OI is overwritten.
    """
    columns = W_OI.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        values_OB = rounded(start, stop, W_OI[:, start:stop])
        if U_II is not None:
            errors_OB = (W_OI[:, start:stop] - values_OB) / torch.diagonal(U_II)[start:stop]
            W_OI[:, stop:].addmm_(errors_OB, U_II[start:stop, stop:], alpha=-1)


class Solution(NamedTuple):
    """Codes [O, I] (from `solve`: uint8), the grids [O, G] of the groups, the group [I] of each
    column.
    """

    codes_OI: Tensor
    grid_OG: Grid
    group_I: Tensor

    def values(self) -> Tensor:
        return self.columns().values(self.codes_OI)

    def columns(self) -> Grid:
        """The grid of every column [O, I]."""
        scale, zero = (part[:, self.group_I] for part in self.grid_OG)
        return self.grid_OG._replace(scale=scale, zero=zero)


def solve(
    W_OI: Tensor,
    U_II: Tensor | None,
    uniform: Uniform,
    group_I: Tensor,
    grid_OG: Grid | None = None,
    importance_I: Tensor | None = None,
    block: int = BLOCK,
    drift_II: Tensor | None = None,
) -> Solution:
    """Round the columns of W_OI on grids of `uniform`, with the feedback of `by_columns`.

    grid_OG: the grids of the groups. None: groups are consecutive columns, and each gets its grid
        when its first column is reached, from W_OI with the errors of finished blocks.
    importance_I: weights the errors of columns where ranges are searched.
    """
    if U_II is not None:
        W_OI = W_OI.contiguous()
        rounder = block_rounder(W_OI, U_II, uniform.bits, block, drift_II)
        if rounder is not None:
            return _solve_by_kernel(rounder, uniform, group_I, grid_OG, importance_I, block)
    size = uniform.size(W_OI.shape[1])
    codes_IO = W_OI.new_empty(W_OI.shape[::-1], dtype=torch.uint8)
    groups: list[int] = group_I.tolist()
    grids_O: list[Grid] = [] if grid_OG is None else grid_OG.per_group()

    def rounded(j: int, w_O: Tensor) -> Tensor:
        if groups[j] == len(grids_O):
            importance_g = None if importance_I is None else importance_I[j : j + size]
            grids_O.extend(uniform.grid(W_OI[:, j : j + size], importance_g).per_group())
        grid_O = grids_O[groups[j]]
        codes_IO[j] = code_O = grid_O.codes(w_O, uniform.bits)
        return grid_O.values(code_O)

    by_columns(W_OI, U_II, rounded, block=block, drift_II=drift_II)
    return Solution(
        codes_IO.T.contiguous(), concatenated(grids_O) if grid_OG is None else grid_OG, group_I
    )


def _solve_by_kernel(
    rounder: BlockRounder,
    uniform: Uniform,
    group_I: Tensor,
    grid_OG: Grid | None,
    importance_I: Tensor | None,
    block: int,
) -> Solution:
    """`solve` on a GPU, one launch for the columns of a block."""
    W_OI = rounder.W_OI
    rows, columns = W_OI.shape
    size = uniform.size(columns)
    found: list[Grid] = []
    reached = 0  # the first column whose group has no grid yet
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if grid_OG is None and reached < stop:
            last = min(reached + -(-(stop - reached) // size) * size, columns)
            importance = None if importance_I is None else importance_I[reached:last]
            found.append(uniform.grids(W_OI[:, reached:last], importance))
            reached = last
        grid = concatenated(found) if grid_OG is None else grid_OG
        own_B = group_I[start:stop]
        scale_BO, zero_BO = (part.expand(rows, -1).T[own_B] for part in grid)
        rounder(start, stop, scale_BO, zero_BO, isinstance(grid, HalfGrid))
    rounder.check()
    grids_OG = concatenated(found) if grid_OG is None else grid_OG
    return Solution(rounder.codes_IO.T.contiguous(), grids_OG, group_I)


def drift(H_II: Tensor, C_II: Tensor, U_II: Tensor, share: float) -> Tensor:
    """`drift_II` of `by_columns`, which aims at the outputs of the full-precision model (GPTAQ, Li
    et al. 2025).

    H_II: undamped. C_II: of `PairedHessian`. U_II: of the damped H_II. All are in the order of
    solving. share: 0..1, how much of the correction is applied.
    """
    return share * torch.triu((C_II.T - H_II) @ U_II.T, 1) @ U_II


def group_aware_order(diagonal_I: Tensor, size: int) -> Tensor:
    """Columns [I] with the largest H_ii first inside each group of `size`, and groups with the
    largest first (GAR, Gafni et al. 2025).

    Groups keep their columns, so no order is stored. A short group stays last.
    """
    whole = len(diagonal_I) // size * size
    diagonal_GS = diagonal_I[:whole].view(-1, size)
    inside_GS = torch.argsort(diagonal_GS, dim=1, descending=True, stable=True)
    inside_GS += torch.arange(0, whole, size, device=diagonal_I.device)[:, None]
    by_largest_G = torch.argsort(diagonal_GS.amax(1), descending=True, stable=True)
    tail = whole + torch.argsort(diagonal_I[whole:], descending=True, stable=True)
    return torch.cat([inside_GS[by_largest_G].flatten(), tail])
