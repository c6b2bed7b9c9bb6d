"""Improve codes and scales after rounding: coordinate descent, then a least-squares refit.

Legend: O out_features, I in_features, B columns of a block, G groups, K levels, R rows handled
together.

The loss of a row w^ is |X w^ - X~ w|^2 = w^ H w^T - 2 w^ b + const. X is the input of the linear in
the quantized model and X~ in the full-precision model: H = X^T X, b = X^T X~ w. So errors of
earlier linears are corrected, too. Neither step increases the loss of any row, and neither stores
more bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import descender
from .error_feedback import BLOCK, Solution
from .grids import Grid, HalfGrid, Uniform

ROWS = 1024  # rows whose G x G systems are solved together
REACH = 4.0  # a refitted scale that changes by a larger factor is not used


class Objective(NamedTuple):
    """The loss of all rows: H_II damped, symmetric, with a positive diagonal; B_OI the rows b."""

    H_II: Tensor
    B_OI: Tensor

    @classmethod
    def of(
        cls, H_II: Tensor, damp: float, target_II: Tensor, weight_OI: Tensor, W_OI: Tensor
    ) -> Objective:
        """b = weight_OI @ target_II, where target_II = X~^T X, or H_II itself.

        H_II is damped in place by `damp` times its mean diagonal. The damping pulls towards W_OI,
        the weight that was solved for, instead of towards zero.
        """
        pull = damp * float(torch.diagonal(H_II).mean())
        B_OI = (weight_OI @ target_II).add_(W_OI, alpha=pull)
        torch.diagonal(H_II).add_(pull)
        return cls(H_II, B_OI)

    def loss(self, values_OI: Tensor) -> Tensor:
        """[O], up to a constant per row; in fp64, because the terms nearly cancel."""
        values_OI = values_OI.double()
        return ((values_OI @ self.H_II.double() - 2 * self.B_OI.double()) * values_OI).sum(1)


def descend(
    objective: Objective, values_OI: Tensor, nearest: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Values [O, I] after one pass of coordinate descent, from the first column to the last.

    nearest(j, w_O): gives the values nearest to w_O that column j can take, and remembers their
    codes. (QuIP's greedy pass goes from the last column to the first.)
    """
    H_II = objective.H_II
    columns = values_OI.shape[1]
    values_IO, gradient_IO = _begun(objective, values_OI)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        moved_BO = torch.empty_like(values_IO[start:stop])
        for j in range(start, stop):
            value_O = nearest(j, values_IO[j] - gradient_IO[j] / H_II[j, j])
            moved_O = torch.sub(value_O, values_IO[j], out=moved_BO[j - start])
            gradient_IO[j + 1 : stop].addcmul_(H_II[j, j + 1 : stop, None], moved_O)
            values_IO[j] = value_O
        gradient_IO[stop:].addmm_(H_II[stop:, start:stop], moved_BO)
    return values_IO.T.contiguous()


def _begun(objective: Objective, values_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The values and half of their gradient, both [I, O] and contiguous."""
    values_IO = values_OI.T.clone(memory_format=torch.contiguous_format)
    return values_IO, (objective.H_II @ values_IO).sub_(objective.B_OI.T)


def refined(objective: Objective, solution: Solution, uniform: Uniform, rounds: int) -> Solution:
    """`rounds` times: set each code to the best level given all others, then refit the scales.

    The loss of no row grows.
    """
    for _ in range(rounds):
        solution = solution._replace(codes_OI=descended(objective, solution, uniform.bits))
        solution = solution._replace(grid_OG=refitted(objective, solution, uniform))
    return solution


def descended(objective: Objective, solution: Solution, bits: int) -> Tensor:
    """Codes [O, I] after one pass of coordinate descent over the columns."""
    scale_IO, zero_IO = (part.T.contiguous() for part in solution.columns())
    codes_IO = solution.codes_OI.T.contiguous()
    by_kernel = descender(scale_IO)
    if by_kernel is not None:
        values_IO, gradient_IO = _begun(objective, solution.values())
        halves, codes_IO = isinstance(solution.grid_OG, HalfGrid), codes_IO.to(torch.uint8)
        grids = (scale_IO, zero_IO)
        by_kernel(gradient_IO, values_IO, objective.H_II, *grids, codes_IO, BLOCK, bits, halves)
        return codes_IO.T.contiguous()

    def nearest(j: int, w_O: Tensor) -> Tensor:
        grid_O = solution.grid_OG._replace(scale=scale_IO[j], zero=zero_IO[j])
        codes_IO[j] = grid_O.codes(w_O, bits)
        return grid_O.values(codes_IO[j])

    descend(objective, solution.values(), nearest)
    return codes_IO.T.contiguous()


def refitted(objective: Objective, solution: Solution, uniform: Uniform) -> Grid:
    """Grid [O, G] with the scales that minimize the loss of each row, rounded to what is stored.

    Codes and zero points stay. Each row is one G x G system: A_kl = v_k H v_l, A s = v_k b, where
    v_k holds the integers (code - zero) of group k, and 0 elsewhere.
    """
    scale_OG, zero_OG = solution.grid_OG
    units_OI = solution.codes_OI - zero_OG[:, solution.group_I]
    groups = Groups.of(solution.group_I, scale_OG.shape[1])
    found = [
        _refitted_rows(objective.H_II, B_RI, units_RI, scale_RG, groups, uniform)
        for B_RI, units_RI, scale_RG in zip(
            *(torch.split(part, ROWS) for part in (objective.B_OI, units_OI, scale_OG)), strict=True
        )
    ]
    return solution.grid_OG._replace(scale=torch.cat(found))


class Groups(NamedTuple):
    """The columns of each group, read from the device once."""

    members: tuple[Tensor, ...]  # ascending
    order_I: Tensor | None  # all of them, group by group; None: as they are
    ends_G1: Tensor  # where the groups end in that order, behind a 0

    @classmethod
    def of(cls, group_I: Tensor, count: int) -> Groups:
        groups = group_I.cpu()
        order_I = torch.argsort(groups, stable=True)
        sizes = torch.bincount(groups, minlength=count)
        in_order = bool((groups.diff() >= 0).all())
        ends_G1 = nn.functional.pad(sizes.cumsum(0), (1, 0)).to(group_I.device)
        order_I = order_I.to(group_I.device)
        members = torch.split(order_I, sizes.tolist())
        return cls(members, None if in_order else order_I, ends_G1)

    def sums(self, x_RI: Tensor) -> Tensor:
        """Sums [R, G] over the columns of each group, one after the other: on GPUs as on CPUs the
        same bits in every run, which the atomic sums of index_add_ would not give.
        """
        x_RI = x_RI if self.order_I is None else x_RI[:, self.order_I]
        ends_RG1 = self.ends_G1.expand(len(x_RI), -1).contiguous()
        sums_RG: Tensor = torch.segment_reduce(x_RI, "sum", offsets=ends_RG1, axis=1, unsafe=True)
        return sums_RG


def _refitted_rows(
    H_II: Tensor,
    B_RI: Tensor,
    units_RI: Tensor,
    scale_RG: Tensor,
    groups: Groups,
    uniform: Uniform,
) -> Tensor:
    A_RGG = scale_RG.new_empty(*scale_RG.shape, scale_RG.shape[1])
    for k, members in enumerate(groups.members):
        A_RGG[:, k] = groups.sums((units_RI[:, members] @ H_II[members]).mul_(units_RI))
    b_RG = groups.sums(units_RI * B_RI)
    # A weak pull towards the old scale: nothing else determines the scale of an all-zero group, and
    # rounding can make A singular.
    diagonal_RG = torch.diagonal(A_RGG, dim1=1, dim2=2)
    pull_RG = (1e-6 * diagonal_RG.mean(1, keepdim=True)).clamp_min(1e-20).expand_as(scale_RG)
    best_RG = _solved(A_RGG + torch.diag_embed(pull_RG), b_RG + pull_RG * scale_RG)
    sound_RG = torch.isfinite(best_RG) & (best_RG > scale_RG / REACH) & (best_RG < scale_RG * REACH)
    best_RG = uniform.stored(torch.where(sound_RG, best_RG, scale_RG))

    def loss(s_RG: Tensor) -> Tensor:
        A, b, s = A_RGG.double(), b_RG.double(), s_RG.double()
        return (s * ((A @ s[..., None])[..., 0] - 2 * b)).sum(1, keepdim=True)

    return torch.where(loss(best_RG) < loss(scale_RG), best_RG, scale_RG)


def _solved(A_RKK: Tensor, b: Tensor) -> Tensor:
    """x with A x = b, [R, K] or [R, K, 1].

    Nothing is checked, for which a GPU would have to wait: the caller keeps its old numbers where
    those of a singular system are no better.
    """
    found: Tensor = torch.linalg.solve_ex(A_RKK, b).result
    return found


# --- levels that are no uniform grid --------------------------------------------------------------


def refit_levels(
    objective: Objective,
    values_OI: Tensor,
    start: int,
    basis_OKB: Tensor,
    levels_OK: Tensor,
    stored: Callable[[Tensor], Tensor],
) -> Tensor:
    """Levels [O, K] of a block that minimize the loss of each row, rounded by `stored`.

    Columns start .. start + B of `values_OI` are sum_k levels_k * basis_k. Rows whose loss would
    grow keep their levels.
    """
    stop = start + basis_OKB.shape[2]
    slope_OB = objective.B_OI[:, start:stop] - values_OI @ objective.H_II[:, start:stop]
    A_OKK = basis_OKB @ objective.H_II[start:stop, start:stop] @ basis_OKB.mT
    b_OK1 = basis_OKB @ slope_OB[..., None]
    # A weak pull towards the old levels: nothing else determines a level that no weight takes, and
    # rounding can make A singular.
    diagonal_OK = torch.diagonal(A_OKK, dim1=1, dim2=2)
    pull_OK = (1e-6 * diagonal_OK.mean(1, keepdim=True)).clamp_min(1e-20).expand_as(levels_OK)
    change_OK = _solved(A_OKK + torch.diag_embed(pull_OK), b_OK1)[..., 0]
    found_OK = stored(levels_OK + change_OK)
    step_OK1 = (found_OK - levels_OK)[..., None].double()
    growth_O1 = (step_OK1 * (A_OKK.double() @ step_OK1 - 2 * b_OK1.double())).sum(1)
    # The comparison is false, and the old levels stay, where the new ones are not finite.
    return torch.where(growth_O1 < 0, found_OK, levels_OK)
