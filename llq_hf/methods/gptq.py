"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), after IST-DASLab/gptq at 2d65066.

Idea
    Columns are rounded one at a time. The error of each is compensated in the columns not yet
    rounded, so that the outputs on the calibration data change least. With H = X X^T of the inputs
    and U the upper Cholesky factor of H^-1, rounding column i of W to q costs ((w - q) / U_ii)^2,
    and the best compensation of the later columns is -(w - q) / U_ii * U_i,later. Columns are
    handled in blocks of 128: inside a block the compensation is immediate, and the rest of the
    matrix gets it once per block.

Steps of `quantize`
    1. Statistics: H of the inputs, and its diagonal as the importance of columns.
    2. Order: as in the model; `act_order`, largest H_ii first; or `act_group_aware`, largest first
       inside groups and among groups (GAR, Gafni et al. 2025).
    3. Factor: H is damped by `damp` of its mean diagonal, and factorized.
    4. Grids that do not depend on the compensation: of whole rows, and with `static_groups` of all
       groups. Otherwise a group's grid is found when its first column is reached, from the matrix
       with the errors of *finished blocks*. (This is the authors' order; a second group inside a
       block does not see the errors of the first.)
    5. Solve: round the columns.
    6. Refine: `refine` rounds of coordinate descent and scale refit (numerics/coordinate_descent).

    `true_sequential` calibrates q/k/v, o, gate/up and down one after the other, each on the outputs
    of those before. `search_range` shrinks each group's range, with errors weighted by H_ii. Two
    options, both shares, aim at the outputs of the full-precision model, which runs alongside:
    `gptaq` while columns are solved and refined (GPTAQ, Li et al. 2025), `aim` by another weight to
    begin with (numerics/aim).

Storage (G = ceil(I / group_size) groups)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    order   [I]                   int16   16 / O (int32 from 32768 columns; see below)

    With `act_order` and groups that are not static, codes are stored in the order of solving.
    Groups are contiguous in that order, and `order` gives the input channel of each stored column.
    Static groups, one group per row, and `act_group_aware` need no order.

Departures
    Scales are rounded to the stored fp16 before use. The symmetric range is symmetric also where a
    row has no negative weight (theirs halves the scale there). Sorting is stable. A Hessian that
    cannot be factorized is damped more (theirs stops with an error); if nothing helps, weights are
    rounded to nearest, which the notes report as "fallback".

Presets
    "best" combines what came after the paper: `true_sequential`, `act_group_aware`,
    `search_range`, `aim` and `refine`. It stores the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..method import Flow, ForeignCodes, Job, Packed
from ..numerics.aim import aimed
from ..numerics.cholesky import largest_first, prepare_hessian
from ..numerics.coordinate_descent import Objective, refined
from ..numerics.error_feedback import BLOCK, Solution, drift, group_aware_order, solve
from ..numerics.grids import Affine, Grid, Uniform
from ..numerics.stats import PairedHessian, Stat
from .options import check_damp, check_gptaq, check_refine
from .uniform import OnUniformGrid


@dataclass(frozen=True, kw_only=True)
class GPTQ(OnUniformGrid):
    """group_size: -1 is one group per row. damp: a share of mean(diag H). gptaq, aim: shares, 0 is
    off. refine: rounds. The others: see the head of this file.
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ (Frantar et al. 2023)"
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {
        "true_sequential": True,
        "act_group_aware": True,
        "search_range": True,
        "aim": 0.5,
        "refine": 2,
    }

    adopts: ClassVar[tuple[str, ...]] = ("gptq", "compressed-tensors")

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
    aim: float = 0.0
    refine: int = 0
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid  # validates group_size and scale_bits
        check_damp(self)
        check_gptaq(self)
        check_refine(self)
        if self.act_group_aware and (self.act_order or self.static_groups):
            raise LLQError(
                "act_group_aware is another order of columns: give it without act_order and "
                "static_groups"
            )

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, self.search_range, self.scale_bits)

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.gptaq or self.aim else Flow.QUANTIZED

    @property
    def _keeps_order(self) -> bool:
        # With one group per row, or groups of the model's columns, codes are put back in order.
        return self.act_order and not self.static_groups and self.group_size != -1

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = super().layout(out_features, in_features)
        if self._keeps_order:
            layout["order"] = Spec((in_features,), _order_dtype(in_features))
        return layout

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        # 1. statistics
        assert isinstance(stat, PairedHessian)
        importance_I = stat.diagonal_I
        aimed_OI = aimed(weight_OI, stat, self.aim)

        # 2. order, 3. factor
        order = self._order if self.act_order or self.act_group_aware else None
        H_II, U_II, order_I, dead_I = prepare_hessian(
            stat.H_II, self.damp, job.notes, order, quick=True, fallback="rtn"
        )
        if U_II is not None:
            weight_OI = aimed_OI
        # 4. grids that do not depend on the compensation; None: found when a group is reached
        W_OI = weight_OI.masked_fill(dead_I, 0)
        static_OG = None
        if self.group_size == -1:
            static_OG = self.grid.grid(weight_OI, importance_I)  # with dead columns, as theirs
        elif self.static_groups:
            static_OG = self.grid.grids(W_OI, importance_I)

        # 5. solve
        W_OI = W_OI[:, order_I]
        importance_I = importance_I[order_I]
        drift_II, target_II = None, H_II
        if self.gptaq and U_II is not None:
            C_II = stat.C_II[order_I][:, order_I]
            drift_II = drift(H_II, C_II, U_II, self.gptaq)
            target_II = torch.lerp(H_II, C_II.T, self.gptaq)
        used_OI = W_OI.clone() if self.refine else W_OI  # solve overwrites it
        solution = solve(
            used_OI,
            U_II,
            self.grid,
            self._groups(order_I),
            static_OG,
            importance_I,
            self._block,
            drift_II,
        )

        # 6. refine
        if self.refine and U_II is not None:
            objective = Objective.of(H_II, job.notes["damp"], target_II, W_OI, W_OI)
            solution = refined(objective, solution, self.grid, self.refine)
        return self._packed(solution, order_I)

    def _order(self, diagonal_I: Tensor) -> Tensor:
        """Input channels in the order of solving."""
        size = self.grid.size(len(diagonal_I))
        if self.act_order or size >= len(diagonal_I):
            return largest_first(diagonal_I)
        return group_aware_order(diagonal_I, size)

    def _groups(self, order_I: Tensor) -> Tensor:
        """Group [I] of each column in the order of solving: static groups are of the model's
        columns, others of columns in that order.
        """
        columns = len(order_I)
        places_I = order_I if self.static_groups else torch.arange(columns, device=order_I.device)
        return places_I // self.grid.size(columns)

    @property
    def _block(self) -> int:
        """Columns of a block of the feedback.

        With `act_group_aware` a block is a group where groups and blocks would not coincide, so
        that each grid is found from weights that have got all errors so far.
        """
        apart = self.group_size < BLOCK or self.group_size % BLOCK != 0
        own = self.act_group_aware and self.group_size != -1 and apart
        return self.group_size if own else BLOCK

    def _packed(self, solution: Solution, order_I: Tensor) -> Packed:
        codes_OI, grid_OG, _ = solution
        if self._keeps_order:
            order_I = order_I.to(_order_dtype(len(order_I)))
            return {**self.grid.pack(codes_OI, grid_OG), "order": order_I}
        if self.act_group_aware:  # the grids are in the order of solving
            size = self.grid.size(len(order_I))
            back_G = torch.argsort(order_I[::size] // size)
            grid_OG = Grid(*(part[:, back_G] for part in grid_OG))
        if self.act_order or self.act_group_aware:
            codes_OI = codes_OI[:, torch.argsort(order_I)]
        return self.grid.pack(codes_OI, grid_OG)

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        if self._keeps_order:
            sorted_I = torch.sort(packed["order"].long()).values
            if not torch.equal(sorted_I, torch.arange(in_features, device=sorted_I.device)):
                raise LLQError(f"order does not name each of {in_features} columns once")

    @classmethod
    def adopting(cls, codes: ForeignCodes) -> Self:
        return cls.build(**cls._adopted(codes), act_order=not codes.in_order)

    def adopt(self, affine: Affine) -> Packed:
        if not self._keeps_order:
            return super().adopt(affine)
        order_I = torch.argsort(affine.groups_I, stable=True)
        ordered = affine._replace(
            codes_OI=affine.codes_OI[:, order_I], groups_I=affine.groups_I[order_I]
        )
        return {**super().adopt(ordered), "order": order_I.to(_order_dtype(len(order_I)))}

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        return weight_OI[:, torch.argsort(packed["order"])] if self._keeps_order else weight_OI

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if self._keeps_order:
            x = x[..., packed["order"].long()]  # cheaper than reordering the weight
        return super().linear(x, packed, bias, out_features)


def _order_dtype(in_features: int) -> torch.dtype:
    return torch.int16 if in_features < 1 << 15 else torch.int32
