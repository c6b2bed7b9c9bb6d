"""GPTQ's feedback: the error of a column, once rounded, is spread over the columns still to come.

Legend: O out_features, I in_features, B columns of a block, L later ones of it, G groups.

With U the upper Cholesky factor of H^-1 (`stats.factorize(..., inverse=True)`), rounding column j
of W to q_j costs ((w_j - q_j) / U_jj)^2 on the calibration outputs, and the best repair of the
later columns is -(w_j - q_j) / U_jj * U_j,later (Frantar et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import LLQError
from .grids import Grid, Uniform, concatenated

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

    rounded(j, w_O) gives the value that column j, now w_O, is rounded to. begin(start, stop) is
    called when a block of columns is reached: W_OI[:, start:stop] holds them as repaired by all
    earlier blocks. U_II None: no repair. drift_II (strictly upper): column j, as it is before it is
    rounded, also adds w_O * drift[j, later] (GPTAQ). fused: a product and its sum in one operation,
    of one rounding; False rounds twice, as the authors' codes do.

    A block is held transposed, so that a column is contiguous: half the time, the same codes.
    """
    columns = W_OI.shape[1]
    errors_BO = W_OI.new_empty(min(block, columns), len(W_OI))
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        begin(start, stop)
        block_BO = (
            W_OI[:, start:stop].contiguous().T.contiguous()
        )  # torch transposes fast only what is in one piece
        if U_II is None:
            for j, w_O in enumerate(block_BO, start):
                rounded(j, w_O)
            continue
        U_BB = U_II[start:stop, start:stop].contiguous()
        steps = zip(block_BO, errors_BO, U_BB[..., None], torch.diagonal(U_BB), strict=False)
        for i, (w_O, error_O, u_B1, pivot) in enumerate(steps):
            torch.sub(w_O, rounded(start + i, w_O), out=error_O).div_(pivot)
            later_LO, u_L1 = block_BO[i + 1 :], u_B1[i + 1 :]
            if drift_II is not None:
                later_LO.addcmul_(drift_II[start + i, start + i + 1 : stop, None], w_O)
            if fused:
                later_LO.addcmul_(u_L1, error_O, value=-1)
            else:
                later_LO.sub_(u_L1 * error_O)
        W_OI[:, stop:].addmm_(errors_BO[: stop - start].T, U_II[start:stop, stop:], alpha=-1)
        if (
            drift_II is not None
        ):  # each column of the block is still what it was before it was rounded
            W_OI[:, stop:].addmm_(block_BO.T, drift_II[start:stop, stop:])
    if U_II is not None and bool(
        block_BO[-1].isnan().any()
    ):  # NaN spreads: the last column tells of all
        raise LLQError(
            "repairing columns overflows fp32: the weights or the calibration inputs are not usable"
        )


def by_blocks(
    W_OI: Tensor,
    U_II: Tensor | None,
    rounded: Callable[[int, int, Tensor], Tensor],
    block: int = BLOCK,
) -> None:
    """Round whole blocks of columns at once: rounded(start, stop, w_OB) gives values [O, B]. Only
    later blocks are repaired; W_OI is used up.
    """
    columns = W_OI.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        values_OB = rounded(start, stop, W_OI[:, start:stop])
        if U_II is not None:
            errors_OB = (W_OI[:, start:stop] - values_OB) / torch.diagonal(U_II)[start:stop]
            W_OI[:, stop:].addmm_(errors_OB, U_II[start:stop, stop:], alpha=-1)


class Solution(NamedTuple):
    """Codes [O, I] (uint8 of `solve`), the grids [O, G] they lie on, and the group [I] of each
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
    """Round the columns of W_OI on grids of `uniform`, as `by_columns` does.

    grid_OG: the grids of the groups. None: a group, of consecutive columns then, gets its grid when
    its first column is reached, from W_OI as finished blocks left it; importance_I weights errors
    where ranges are searched.
    """
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


def drift(H_II: Tensor, C_II: Tensor, U_II: Tensor, share: float) -> Tensor:
    """`drift_II` of `by_columns`: a share of what aims at the full-precision model's outputs
    (GPTAQ, Li et al. 2025).

    H_II undamped, C_II as `PairedHessian` has it, U_II of the damped H_II; all in the order of
    solving.
    """
    return share * torch.triu((C_II.T - H_II) @ U_II.T, 1) @ U_II


def group_aware_order(diagonal_I: Tensor, size: int) -> Tensor:
    """Columns [I] by falling H_ii inside each group of `size`, groups by their largest (GAR, Gafni
    et al. 2025).

    Groups stay what they were, so nothing is stored; a short group stays last.
    """
    whole = len(diagonal_I) // size * size
    diagonal_GS = diagonal_I[:whole].view(-1, size)
    inside_GS = torch.argsort(diagonal_GS, dim=1, descending=True, stable=True)
    inside_GS += torch.arange(0, whole, size, device=diagonal_I.device)[:, None]
    by_largest_G = torch.argsort(diagonal_GS.amax(1), descending=True, stable=True)
    tail = whole + torch.argsort(diagonal_I[whole:], descending=True, stable=True)
    return torch.cat([inside_GS[by_largest_G].flatten(), tail])
