"""GPTQ's feedback: the error of a column, once rounded, is spread over the columns still to come.

Legend: O out_features, I in_features, B columns of a block, G groups.

With U the upper Cholesky factor of H^-1 (`stats.factorize(..., inverse=True)`), rounding column j of W to q_j costs
((w_j - q_j) / U_jj)^2 on the calibration outputs, and the best repair of the later columns is -(w_j - q_j) / U_jj *
U_j,later (Frantar et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .grids import Grid, Uniform, joined

BLOCK = 128  # columns repaired together


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
    """Round the columns of W_OI from first to last, each repairing all later ones; W_OI is used up.

    rounded(j, w_O) gives the value that column j, now w_O, is rounded to. begin(start, stop) is called when a block of
    columns is reached: W_OI[:, start:stop] holds them as repaired by all earlier blocks. U_II None: no repair.
    drift_II (strictly upper): column j, as it is before it is rounded, also adds w_O * drift[j, later] (GPTAQ).
    fused: a product and its sum in one operation, of one rounding; False rounds twice, as the authors' codes do.

    A block is held transposed, so that a column is contiguous: half the time, the same codes.
    """
    columns = W_OI.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        begin(start, stop)
        block_BO = W_OI[:, start:stop].T.contiguous()
        errors_BO = torch.empty_like(block_BO)
        before_BO = torch.empty_like(block_BO) if drift_II is not None else block_BO
        for j in range(start, stop):
            w_O = block_BO[j - start]
            value_O = rounded(j, w_O)
            if U_II is not None:
                error_O = torch.sub(w_O, value_O, out=errors_BO[j - start]).div_(U_II[j, j])
                if drift_II is not None:
                    before_BO[j - start] = w_O
                    block_BO[j - start :].addcmul_(drift_II[j, j:stop, None], before_BO[j - start])
                if fused:
                    block_BO[j - start :].addcmul_(U_II[j, j:stop, None], error_O, value=-1)
                else:
                    block_BO[j - start :].sub_(U_II[j, j:stop, None] * error_O)
        if U_II is not None:
            W_OI[:, stop:].addmm_(errors_BO.T, U_II[start:stop, stop:], alpha=-1)
            if drift_II is not None:
                W_OI[:, stop:].addmm_(before_BO.T, drift_II[start:stop, stop:])


def by_blocks(
    W_OI: Tensor, U_II: Tensor | None, rounded: Callable[[int, int, Tensor], Tensor], block: int = BLOCK
) -> None:
    """Round whole blocks of columns at once: rounded(start, stop, w_OB) gives values [O, B]. Only later blocks are
    repaired; W_OI is used up.
    """
    columns = W_OI.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        values_OB = rounded(start, stop, W_OI[:, start:stop])
        if U_II is not None:
            errors_OB = (W_OI[:, start:stop] - values_OB) / torch.diagonal(U_II)[start:stop]
            W_OI[:, stop:].addmm_(errors_OB, U_II[start:stop, stop:], alpha=-1)


class Solution(NamedTuple):
    """Codes [O, I], the grids [O, G] they lie on, and the group [I] of each column."""

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
    """Round the columns of W_OI on grids of `uniform`, as `by_columns` does.

    grid_OG: the grids of the groups. None: a group, of consecutive columns then, gets its grid when its first column is
    reached, from W_OI as finished blocks left it; importance_I weights errors where ranges are searched.
    """
    size = W_OI.shape[1] if uniform.group_size == -1 else uniform.group_size
    codes_IO, groups, found = torch.empty_like(W_OI.T), group_I.tolist(), list[Grid]()

    def rounded(j: int, w_O: Tensor) -> Tensor:
        if grid_OG is None and groups[j] == len(found):
            importance_g = None if importance_I is None else importance_I[j : j + size]
            found.append(uniform.grid(W_OI[:, j : j + size], importance_g))
        grid, column = (found[-1], 0) if grid_OG is None else (grid_OG, groups[j])
        grid_O = grid._replace(scale=grid.scale[:, column], zero=grid.zero[:, column])
        codes_IO[j] = code_O = grid_O.codes(w_O, uniform.bits)
        return grid_O.values(code_O)

    by_columns(W_OI, U_II, rounded, block=block, drift_II=drift_II)
    return Solution(codes_IO.T.contiguous(), joined(found) if grid_OG is None else grid_OG, group_I)


def drift(H_II: Tensor, C_II: Tensor, U_II: Tensor, share: float) -> Tensor:
    """`drift_II` of `by_columns`: a share of what aims at the full-precision model's outputs (GPTAQ, Li et al. 2025).

    H_II undamped, C_II as `PairedHessian` has it, U_II of the damped H_II; all in the order of solving.
    """
    return share * torch.triu((C_II.T - H_II) @ U_II.T, 1) @ U_II


def group_aware_order(diagonal_I: Tensor, size: int) -> Tensor:
    """Columns [I] by falling H_ii inside each group of `size`, groups by their largest (GAR, Gafni et al. 2025).

    Groups stay what they were, so nothing is stored; a short group stays last.
    """
    whole = len(diagonal_I) // size * size
    diagonal_GS = diagonal_I[:whole].view(-1, size)
    inside_GS = torch.argsort(diagonal_GS, dim=1, descending=True, stable=True)
    inside_GS += torch.arange(0, whole, size, device=diagonal_I.device)[:, None]
    by_largest_G = torch.argsort(diagonal_GS.amax(1), descending=True, stable=True)
    tail = whole + torch.argsort(diagonal_I[whole:], descending=True, stable=True)
    return torch.cat([inside_GS[by_largest_G].flatten(), tail])
