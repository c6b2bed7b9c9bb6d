"""A linear of OmniQuant while it is trained: clipped ranges, learned rounding."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.spec import Spec
from ...method import Packed
from ...numerics.activations import pass_through, round_through
from ...numerics.grids import Grid, grouped

if TYPE_CHECKING:
    from . import OmniQuant

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: clips a little from the start
SEARCHED = [0.998, *(1 - i / 20 for i in range(1, 15))]  # shares of a range's end: down to 0.3
TINY_SCALE = 2.0**-24  # the smallest fp16 above zero


class Factor(NamedTuple):
    """What LET multiplies the rows or the columns of a weight by: entries of s, or of 1 / s."""

    s: nn.Parameter
    picks: Tensor  # of s, for every row or column
    inverse: bool = False

    def __call__(self) -> Tensor:
        picked = self.s[self.picks]
        return 1 / picked if self.inverse else picked


class TrainedLinear(nn.Module):
    """A linear that rounds its weight and its inputs anew at every forward pass, on grids under
    training.
    """

    def __init__(self, linear: nn.Linear, method: OmniQuant) -> None:
        super().__init__()
        self.method, self.levels = method, 2**method.bits - 1
        self.out_features, self.in_features = linear.weight.shape
        self.size = method.grid.size(self.in_features)
        groups = -(-self.in_features // self.size)
        self.weight_OI = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        whole, device = (self.out_features, groups, self.size), linear.weight.device
        self.clip_2OG = nn.Parameter(
            torch.full((2, *whole[:2]), INITIAL_LOGIT, device=device)
        )  # upper, lower ends
        self.drift_OGg = (
            nn.Parameter(torch.zeros(whole, device=device)) if method.rounding_lr else None
        )
        self.rows: Factor | None = None
        self.columns: Factor | None = None
        self.divisor: nn.Parameter | None = None  # the input's
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor is not None:
            x = x / self.divisor
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        scale, zero = self._grid(low_OG1, high_OG1)
        values_OGg = (self._codes(weight_OGg, scale, zero) - zero) * scale
        return F.linear(self.method.tokens(x), self._whole(values_OGg), self.bias)

    def packed(self, layout: dict[str, Spec]) -> Packed:
        """The tensors of `layout`. Codes are decided here."""
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        grid = self._grid(low_OG1, high_OG1)
        codes_OI = self._whole(self._codes(weight_OGg, *grid))
        packed = self.method.grid.pack(codes_OI, Grid(grid.scale[..., 0], grid.zero[..., 0]))
        if "in_scale" in layout:
            assert self.divisor is not None
            packed["in_scale"] = self.divisor.detach().half()
        return packed

    def search(self, squares_I: Tensor) -> None:
        """Start from the two ends of each range that make sum(squares * error**2) least; squares:
        of the inputs.
        """
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        if self.columns is not None:
            squares_I = squares_I / self.columns().square()
        squares_Gg = grouped(squares_I, self.size)
        best_2OG, least_OG = self.clip_2OG.clone(), torch.full_like(self.clip_2OG[0], torch.inf)
        for up, down in itertools.product(SEARCHED, repeat=2):
            self.clip_2OG[0], self.clip_2OG[1] = (
                math.log(up / (1 - up)),
                math.log(down / (1 - down)),
            )
            grid = self._grid(low_OG1, high_OG1)
            values_OGg = grid.values(grid.codes(weight_OGg, self.method.bits))
            error_OG = (values_OGg - weight_OGg).square_().mul_(squares_Gg).sum(-1)
            best_2OG = torch.where(error_OG < least_OG, self.clip_2OG, best_2OG)
            least_OG = torch.minimum(error_OG, least_OG)
        self.clip_2OG.copy_(best_2OG)

    def _codes(self, weight_OGg: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps_OGg = weight_OGg / scale
        if self.drift_OGg is not None:
            steps_OGg = steps_OGg + self.drift_OGg
        return (round_through(steps_OGg) + zero).clamp(0, self.levels)

    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transformed weight in groups [O, G, g], the last one filled up with its last weight;
        their ranges.
        """
        if self._fixed is not None:
            return self._fixed
        weight_OI = self.weight_OI
        if self.rows is not None:
            weight_OI = weight_OI * self.rows()[:, None]
        if self.columns is not None:
            weight_OI = weight_OI * self.columns()
        weight_OGg = grouped(weight_OI, self.size, mode="replicate")
        low_OG1 = weight_OGg.amin(-1, keepdim=True).clamp_max(0)
        high_OG1 = weight_OGg.amax(-1, keepdim=True).clamp_min(0)
        found = weight_OGg, low_OG1, high_OG1
        if self.rows is None and self.columns is None:
            self._fixed = found
        return found

    def _whole(self, weight_OGg: Tensor) -> Tensor:
        return weight_OGg.flatten(1)[:, : self.in_features]

    def _grid(self, low_OG1: Tensor, high_OG1: Tensor) -> Grid:
        """Clipped ranges -> scales as the file will hold them, and zero points; both [O, G, 1] and
        differentiable.
        """
        up_OG1, down_OG1 = torch.sigmoid(self.clip_2OG).unsqueeze(-1)
        low_OG1, high_OG1 = low_OG1 * down_OG1, high_OG1 * up_OG1
        if self.method.sym:
            high_OG1 = torch.maximum(high_OG1, -low_OG1)
            low_OG1 = -high_OG1
        scale = ((high_OG1 - low_OG1) / self.levels).clamp_min(TINY_SCALE)
        scale = pass_through(scale, scale.detach().half().float())
        if self.method.sym:
            return Grid(scale, torch.full_like(scale, float(2 ** (self.method.bits - 1))))
        return Grid(scale, round_through(-low_OG1 / scale).clamp(0, self.levels))
