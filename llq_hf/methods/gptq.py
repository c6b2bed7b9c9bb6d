"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), after IST-DASLab/gptq at 2d65066.

Columns are rounded one at a time; the error of each is spread over the columns not yet rounded so that the output on
the calibration data changes least. With H = X X^T of the inputs and U the upper Cholesky factor of H^-1, rounding
column i of W to q costs ((w - q) / U_ii)^2, and the best repair of the later columns is -(w - q) / U_ii * U_i,later.
Work goes in blocks of 128 columns: inside a block the repair is immediate, the rest of the matrix gets it once a block.

A group's grid is found when its first column is reached, from the matrix as repaired by *finished blocks* (the authors'
order; a second group inside a block sees stale weights). `static_groups` finds all grids beforehand instead.
`act_order` rounds the columns of largest H_ii first: the codes are then stored in that order, groups are contiguous
in it, and `order` says which input channel each stored column reads. Static groups, or one per row, need no order.
`true_sequential` calibrates q/k/v, o, gate/up, down one after the other, each on what the previous left.

Storage (G = ceil(I / group_size) groups)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    order   [I]                   int16   16 / O (int32 from 32768 columns; only act_order with groups not static)

Departures: scales are rounded to the stored fp16 before use; the symmetric range is symmetric also where a row has no
negative weight (theirs halves the scale there); sorting is stable; a Hessian that will not factorize is damped
more (theirs stops with an error), and at last rounded to nearest, which the notes report as "fallback".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LLQError
from ..feedback import by_columns
from ..grids import Grid, Spec, Uniform
from ..method import Job, Method, Packed
from ..stats import Hessian, Stat, factorize, revive_dead


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """group_size -1: one group per row; damp: a share of mean(diag H); search_range: shrink each group's range."""

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ (Frantar et al. 2023)"
    observes: ClassVar[type[Stat] | None] = Hessian
    best: ClassVar[dict[str, Any]] = {
        "act_order": True,
        "static_groups": True,
        "true_sequential": True,
        "search_range": True,
    }

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = False
    search_range: bool = False
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid  # validates group_size and scale_bits
        if not 0 <= self.damp <= 1:
            raise LLQError(f"damp={self.damp} must lie in 0..1, a share of the Hessian's mean diagonal")

    @property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, self.search_range, self.scale_bits)

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def _keeps_order(self) -> bool:
        # With one group per row, or groups of original columns, the order of the columns means nothing.
        return self.act_order and not self.static_groups and self.group_size != -1

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = self.grid.layout(out_features, in_features)
        if self._keeps_order:
            layout["order"] = Spec((in_features,), torch.int16 if in_features < 1 << 15 else torch.int32)
        return layout

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        assert isinstance(stat, Hessian)
        H_II, W_OI = stat.H_II, weight_OI.clone()
        whole_row = self.grid.grid(W_OI) if self.group_size == -1 else None  # before dead columns are zeroed
        dead_I = revive_dead(H_II)
        W_OI[:, dead_I] = 0
        job.notes["dead_columns"] = int(dead_I.sum())
        # Grids that do not depend on the repair; None: found when a group is reached.
        static_OG = self.grid.grids(W_OI) if self.static_groups and whole_row is None else whole_row

        order_I = torch.arange(W_OI.shape[1], device=W_OI.device)
        if self.act_order:
            order_I = torch.argsort(torch.diagonal(H_II), descending=True, stable=True)
            W_OI, H_II = W_OI[:, order_I], H_II[order_I][:, order_I]
        U_II = factorize(H_II, self.damp, job.notes, inverse=True)
        if U_II is None:  # nothing made H positive definite: no repair, which is rounding to nearest
            job.notes["fallback"] = "rtn"
        codes_OI, grid_OG = self._solve(W_OI, U_II, order_I, static_OG)

        if not self._keeps_order:
            return self.grid.pack(codes_OI[:, torch.argsort(order_I)], grid_OG)
        return {**self.grid.pack(codes_OI, grid_OG), "order": order_I.to(self.layout(*weight_OI.shape)["order"].dtype)}

    def _solve(self, W_OI: Tensor, U_II: Tensor | None, order_I: Tensor, static_OG: Grid | None) -> tuple[Tensor, Grid]:
        """Round the columns of W_OI (already in `order_I`) one by one; uses W_OI up. Codes [O, I], grids [O, G]."""
        columns, codes_IO, found = W_OI.shape[1], torch.empty_like(W_OI.T), []
        size = columns if self.group_size == -1 else self.group_size
        groups = (order_I if self.static_groups else torch.arange(columns)).div(size, rounding_mode="floor").tolist()

        def rounded(i: int, w_O: Tensor) -> Tensor:
            if static_OG is not None:
                grid_O = Grid(*(part[:, groups[i]] for part in static_OG))
            else:
                if i % size == 0:
                    found.append(self.grid.grid(W_OI[:, i : i + size]))
                grid_O = Grid(*(part.flatten() for part in found[-1]))
            codes_IO[i] = code_O = grid_O.codes(w_O, self.bits)
            return grid_O.values(code_O)

        by_columns(W_OI, U_II, rounded)
        grid_OG = static_OG or Grid(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
        return codes_IO.T.contiguous(), grid_OG

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = self.grid.unpack(packed, in_features)
        return weight_OI[:, torch.argsort(packed["order"])] if self._keeps_order else weight_OI

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if not self._keeps_order:
            return super().linear(x, packed, bias, out_features)
        weight_OI = self.grid.unpack(packed, x.shape[-1])  # gather x, not the weight
        return nn.functional.linear(x[..., packed["order"].long()], weight_OI.to(x.dtype), bias)
