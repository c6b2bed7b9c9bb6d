"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), after IST-DASLab/gptq at 2d65066.

Columns are rounded one at a time; the error of each is spread over the columns not yet rounded so
that the output on the calibration data changes least. With H = X X^T of the inputs and U the upper
Cholesky factor of H^-1, rounding column i of W to q costs ((w - q) / U_ii)^2, and the best repair
of the later columns is -(w - q) / U_ii * U_i,later. Work goes in blocks of 128 columns: inside a
block the repair is immediate, the rest of the matrix gets it once a block.

A group's grid is found when its first column is reached, from the matrix as repaired by *finished
blocks* (the authors' order; a second group inside a block sees stale weights). `static_groups`
finds all grids beforehand instead. `act_order` rounds the columns of largest H_ii first: the codes
are then stored in that order, groups are contiguous in it, and `order` says which input channel
each stored column reads. Static groups, or one per row, need no order. `true_sequential` calibrates
q/k/v, o, gate/up, down one after the other, each on what the previous left.

What came after the paper, all at no stored bit (together: preset="best"): `search_range` shrinks
each group's range, errors weighted by H_ii. `act_group_aware` orders columns inside groups and
groups among each other by H_ii (GAR, Gafni et al. 2025): no `order` to store; its grids see no
stale weights. `gptaq` lets the repair also aim at the full-precision model's outputs (GPTAQ, Li et
al. 2025; its share). `refine` rounds of coordinate descent and scale refit follow (refine.py). The
last two run the full-precision model alongside.

Storage (G = ceil(I / group_size) groups)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    order   [I]                   int16   16 / O (int32 from 32768 columns; only act_order with groups not static)

Departures: scales are rounded to the stored fp16 before use; the symmetric range is symmetric also
where a row has no negative weight (theirs halves the scale there); sorting is stable; a Hessian
that will not factorize is damped more (theirs stops with an error), and at last rounded to nearest,
which the notes report as "fallback".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..method import Flow, Job, Method, Packed
from ..numerics.cholesky import factorize, revive_dead
from ..numerics.coordinate_descent import Objective, refined
from ..numerics.error_feedback import BLOCK, Solution, drift, group_aware_order, solve
from ..numerics.grids import Affine, Grid, Uniform
from ..numerics.stats import PairedHessian, Stat


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """group_size -1: one group per row; damp: a share of mean(diag H); gptaq: its share, 0 is off;
    refine: rounds.
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ (Frantar et al. 2023)"
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {
        "true_sequential": True,
        "act_group_aware": True,
        "search_range": True,
        "gptaq": 0.25,
        "refine": 2,
    }

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    damp: float = 0.01
    act_order: bool = False
    act_group_aware: bool = False
    static_groups: bool = False
    true_sequential: bool = False
    search_range: bool = False
    gptaq: float = 0.0
    refine: int = 0
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid  # validates group_size and scale_bits
        if not 0 <= self.damp <= 1:
            raise LLQError(
                f"damp={self.damp} must lie in 0..1, a share of the Hessian's mean diagonal"
            )
        if not 0 <= self.gptaq <= 1:
            raise LLQError(f"gptaq={self.gptaq} must lie in 0..1, the share of GPTAQ's correction")
        if not 0 <= self.refine <= 100:
            raise LLQError(f"refine={self.refine} must lie in 0..100 rounds")
        if self.act_group_aware and (self.act_order or self.static_groups):
            raise LLQError(
                "act_group_aware is another order of columns: it goes without act_order and static_groups"
            )

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, self.search_range, self.scale_bits)

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.gptaq or self.refine else Flow.QUANTIZED

    @property
    def _keeps_order(self) -> bool:
        # With one group per row, or groups of original columns, the order of the columns means
        # nothing.
        return self.act_order and not self.static_groups and self.group_size != -1

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = self.grid.layout(out_features, in_features)
        if self._keeps_order:
            layout["order"] = Spec(
                (in_features,), torch.int16 if in_features < 1 << 15 else torch.int32
            )
        return layout

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        assert isinstance(stat, PairedHessian)
        H_II, W_OI = stat.H_II, weight_OI.clone()
        diagonal_I = torch.diagonal(H_II).clone()
        whole_row = (
            self.grid.grid(W_OI, diagonal_I) if self.group_size == -1 else None
        )  # before dead ones are zeroed
        dead_I = revive_dead(H_II)
        W_OI[:, dead_I] = 0
        job.notes["dead_columns"] = int(dead_I.sum())
        # Grids that do not depend on the repair; None: found when a group is reached.
        static_OG = (
            self.grid.grids(W_OI, diagonal_I)
            if self.static_groups and whole_row is None
            else whole_row
        )

        order_I = self._order(torch.diagonal(H_II))
        if self.act_order or self.act_group_aware:
            W_OI, H_II, diagonal_I = (
                W_OI[:, order_I],
                H_II[order_I][:, order_I],
                diagonal_I[order_I],
            )
        U_II = factorize(H_II, self.damp, job.notes, inverse=True, quick=True)
        if (
            U_II is None
        ):  # nothing made H positive definite: no repair, which is rounding to nearest
            job.notes["fallback"] = "rtn"
        aims_at_dense = U_II is not None and self.flow is Flow.BOTH
        if not aims_at_dense:
            del H_II  # 3.3 GB of a 70B model's down projection
        C_II = stat.C_II[order_I][:, order_I] if aims_at_dense else None
        drift_II = None
        if self.gptaq and C_II is not None and U_II is not None:
            drift_II = drift(H_II, C_II, U_II, self.gptaq)
        used_OI, groups_I = W_OI.clone() if self.refine else W_OI, self._groups(order_I)
        solution = solve(
            used_OI, U_II, self.grid, groups_I, static_OG, diagonal_I, self._block, drift_II
        )
        if self.refine and C_II is not None:
            objective = Objective.of(H_II, job.notes["damp"], C_II.T, weight_OI[:, order_I], W_OI)
            solution = refined(objective, solution, self.grid, self.refine)
        return self._packed(solution, order_I)

    def _order(self, diagonal_I: Tensor) -> Tensor:
        """Input channels in the order of solving."""
        columns = len(diagonal_I)
        size = columns if self.group_size == -1 else self.group_size
        if self.act_order or (self.act_group_aware and size >= columns):
            return torch.argsort(diagonal_I, descending=True, stable=True)
        if not self.act_group_aware:
            return torch.arange(columns, device=diagonal_I.device)
        return group_aware_order(diagonal_I, size)

    def _groups(self, order_I: Tensor) -> Tensor:
        """Group [I] of each column in the order of solving: groups of original columns, or of the
        order's.
        """
        places_I = (
            order_I if self.static_groups else torch.arange(len(order_I), device=order_I.device)
        )
        return places_I.div(
            len(order_I) if self.group_size == -1 else self.group_size, rounding_mode="floor"
        )

    @property
    def _block(self) -> int:
        """Columns repaired together. In blocks of a group, its grid is found from weights that
        nothing is owed to.
        """
        fresh = self.act_group_aware and (
            0 < self.group_size < BLOCK or self.group_size % BLOCK != 0
        )
        return self.group_size if fresh and self.group_size != -1 else BLOCK

    def _packed(self, solution: Solution, order_I: Tensor) -> Packed:
        codes_OI, grid_OG, _ = solution
        if self._keeps_order:
            dtype = torch.int16 if len(order_I) < 1 << 15 else torch.int32
            return {**self.grid.pack(codes_OI, grid_OG), "order": order_I.to(dtype)}
        if (
            self.act_group_aware and self.group_size != -1
        ):  # groups were found in the order of solving
            back_G = torch.argsort(
                order_I[:: self.group_size].div(self.group_size, rounding_mode="floor")
            )
            grid_OG = Grid(*(part[:, back_G] for part in grid_OG))
        if self.act_order or self.act_group_aware:
            codes_OI = codes_OI[:, torch.argsort(order_I)]
        return self.grid.pack(codes_OI, grid_OG)

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = self.grid.unpack(packed, in_features)
        return weight_OI[:, torch.argsort(packed["order"])] if self._keeps_order else weight_OI

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        return self.grid.affine(packed, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if self._keeps_order:
            x = x[..., packed["order"].long()]  # gather x, not the weight
        return self.grid.linear(x, packed, bias)
