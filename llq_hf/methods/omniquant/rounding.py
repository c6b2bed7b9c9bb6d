"""A linear of OmniQuant under training: clipped ranges, learned rounding."""

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
SEARCHED = [0.998, *(1 - i / 20 for i in range(1, 15))]  # shares of each end of a range, to 0.3
TINY_SCALE = 2.0**-24  # the smallest fp16 above zero


class Factor(NamedTuple):
    """What LET multiplies the rows or columns of a weight by: entries of s, or of 1 / s."""

    s: nn.Parameter
    picks: Tensor  # index into s of each row or column
    inverse: bool = False

    def __call__(self) -> Tensor:
        picked = self.s[self.picks]
        return 1 / picked if self.inverse else picked


class TrainedLinear(nn.Module):
    """A linear that quantizes its weight and its inputs in every forward pass, on grids that are
    trained.
    """

    def __init__(self, linear: nn.Linear, method: OmniQuant) -> None:
        super().__init__()
        self.method = method
        self.levels = 2**method.bits - 1
        self.out_features, self.in_features = linear.weight.shape
        self.size = method.grid.size(self.in_features)
        groups = -(-self.in_features // self.size)
        self.weight_OI = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        device = linear.weight.device
        # Logits of the upper and lower ends.
        clip_2OG = torch.full((2, self.out_features, groups), INITIAL_LOGIT, device=device)
        self.clip_2OG = nn.Parameter(clip_2OG)
        # Offsets of the rounding, in steps.
        self.drift_OGg: nn.Parameter | None = None
        if method.rounding_lr:
            drift_OGg = torch.zeros(self.out_features, groups, self.size, device=device)
            self.drift_OGg = nn.Parameter(drift_OGg)
        self.rows: Factor | None = None
        self.columns: Factor | None = None
        self.divisor: nn.Parameter | None = None  # of the input
        # The groups and their ranges where no factor changes them.
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor is not None:
            x = x / self.divisor
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        scale, zero = self._grid(low_OG1, high_OG1)
        values_OGg = (self._codes(weight_OGg, scale, zero) - zero) * scale
        return F.linear(self.method.tokens(x), self._whole(values_OGg), self.bias)

    def packed(self, layout: dict[str, Spec]) -> Packed:
        """The tensors of `layout`. Codes are chosen here."""
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        grid = self._grid(low_OG1, high_OG1)
        codes_OI = self._whole(self._codes(weight_OGg, *grid))
        packed = self.method.grid.pack(codes_OI, Grid(grid.scale[..., 0], grid.zero[..., 0]))
        if "in_scale" in layout:
            assert self.divisor is not None
            packed["in_scale"] = self.divisor.detach().half()
        return packed

    def search(self, squares_I: Tensor) -> None:
        """Set the ends of each range to those with the least sum(squares * error**2).

        squares_I: sums of squares of the input channels.
        """
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        if self.columns is not None:
            squares_I = squares_I / self.columns().square()
        squares_Gg = grouped(squares_I, self.size)
        best_2OG = self.clip_2OG.clone()
        least_OG = torch.full_like(self.clip_2OG[0], torch.inf)
        for up, down in itertools.product(SEARCHED, repeat=2):
            self.clip_2OG[0] = math.log(up / (1 - up))
            self.clip_2OG[1] = math.log(down / (1 - down))
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
        """The transformed weight in groups [O, G, g], and the ends of their ranges [O, G, 1]. The
        last group is padded with its last weight.
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
        """The grid [O, G, 1] of the clipped ranges, with scales rounded to what is stored;
        differentiable.
        """
        up_OG1, down_OG1 = torch.sigmoid(self.clip_2OG).unsqueeze(-1)
        low_OG1 = low_OG1 * down_OG1
        high_OG1 = high_OG1 * up_OG1
        if self.method.sym:
            high_OG1 = torch.maximum(high_OG1, -low_OG1)
            low_OG1 = -high_OG1
        scale = ((high_OG1 - low_OG1) / self.levels).clamp_min(TINY_SCALE)
        scale = pass_through(scale, scale.detach().half().float())
        if self.method.sym:
            return Grid(scale, torch.full_like(scale, float(2 ** (self.method.bits - 1))))
        return Grid(scale, round_through(-low_OG1 / scale).clamp(0, self.levels))
