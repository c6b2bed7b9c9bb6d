"""Fits the grids of SliM-LLM's groups to weights: salience-weighted quantizer calibration.

Legend: O out_features, K groups, R rows of all groups, B columns of a group, g its weights, C
candidate grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...numerics.grids import Uniform, at_once
from .levels import Levels, ends_of
from .storage import Storage

# Shares of a range, in the authors' order: of equally good ones the first wins.
SHARES = torch.cat([torch.linspace(1.0, 1.1, 51), torch.linspace(1.0, 0.9, 51)[1:]])
WIDE_SHARES = torch.linspace(0.4, 1.05, 41)  # of search_range
OFFSETS = (-2, -1, 0, 1, 2)  # of search_range: steps of a stored zero


@cache
@torch.inference_mode(False)
def _shares(device: torch.device, wide: bool) -> Tensor:
    """The shares of a range, copied to a device once."""
    return (WIDE_SHARES if wide else SHARES).to(device)


@dataclass(frozen=True)
class GridFit:
    """Chooses grids, with scales and zeros as stored.

    search_range and lambda_salience are options of the method.
    """

    uniform: Uniform
    storage: Storage
    search_range: bool
    lambda_salience: float

    def round_groups(self, weight_OKg: Tensor, width: int) -> Tensor:
        """Groups of weights as the allocation rounds them, without feedback and salience.

        Their grids span whole ranges, or with `search_range` the best ones.
        """
        rows_Rg = weight_OKg.reshape(-1, weight_OKg.shape[2])
        rounded = []
        for part_Rg in torch.split(rows_Rg, max(1, at_once(rows_Rg.device) // rows_Rg.shape[1])):
            levels_R = self._whole_range(part_Rg, width)
            if self.search_range:
                equal_g = torch.ones_like(part_Rg[0])
                none_Rg = torch.zeros_like(part_Rg).bool()
                levels_R = self.fit(part_Rg, width, equal_g, none_Rg)
            rounded.append(levels_R.round(part_Rg, width))
        return torch.cat(rounded).view_as(weight_OKg)

    def _whole_range(self, part_OB: Tensor, width: int) -> Levels:
        """The grid of each row over its whole range."""
        return self._two_levels(part_OB) if width == 1 else self._grid(*ends_of(part_OB), width)

    def _two_levels(self, part_OB: Tensor) -> Levels:
        """The grid of 1 bit: mean +- mean|w|. Rows of zeros stay zeros."""
        mean = part_OB.mean(1, keepdim=True)
        size = part_OB.abs().mean(1, keepdim=True)
        scale = self.uniform.stored(2 * size)
        if self.storage.exact:
            zero = torch.full_like(mean, 0.5)
        else:
            zero = self.storage.round_zero(0.5 - mean / scale, 1)
            mean = torch.zeros_like(mean)
        return Levels(scale, torch.where(size == 0, 0.0, zero), mean)

    def _grid(self, low: Tensor, high: Tensor, width: int, sym: bool = False) -> Levels:
        """The grid over a range. sym: with the zero of a symmetric range."""
        scale = self.uniform.stored((high - low) / (2**width - 1))
        zero = torch.full_like(scale, 2.0 ** (width - 1)) if sym else torch.round(-low / scale)
        return Levels(scale, self.storage.round_zero(zero, width), torch.zeros_like(scale))

    def fit(
        self,
        part_OB: Tensor,
        width: int,
        importance_B: Tensor,
        salient_OB: Tensor,
        sym: bool = False,
    ) -> Levels:
        """Salience-weighted quantizer calibration: for each row the candidate grid of least error.

        Of equally good ones the first. importance_B: weights of the columns' errors.
        """
        tried_C = self._candidates(part_OB, width, sym)  # each part [C, O, 1]
        best = tried_C.map(lambda t: t[0])
        least = torch.full_like(part_OB[:, :1], math.inf)
        size = max(1, at_once(part_OB.device) // part_OB.numel())
        for start in range(0, len(tried_C.scale), size):
            some_C = tried_C.map(lambda t, start=start: t[start : start + size])  # type: ignore[misc]
            error_COB = some_C.round(part_OB, width) - part_OB
            error_COB = error_COB.abs_().pow_(2.4).mul_(importance_B)
            salient_CO1 = (error_COB * salient_OB).sum(2, keepdim=True)
            other_CO1 = (error_COB * ~salient_OB).sum(2, keepdim=True)
            error_CO1 = other_CO1 + self.lambda_salience * salient_CO1
            which_1O1 = error_CO1.argmin(0, keepdim=True)
            error = error_CO1.gather(0, which_1O1)[0]
            better = error < least
            least = torch.where(better, error, least)
            winner = some_C.map(lambda t, which=which_1O1: t.gather(0, which)[0])  # type: ignore[misc]
            pairs = zip(winner, best, strict=True)
            best = Levels(*(torch.where(better, new, old) for new, old in pairs))
        return best

    def _candidates(self, part_OB: Tensor, width: int, sym: bool) -> Levels:
        """The grids to try, each part [C, O, 1].

        With `search_range` there are more spans around the range, and zeros between whole steps.
        """
        if width == 1 and not self.search_range:
            return self._two_levels(part_OB).map(lambda t: t[None])
        low, high = ends_of(part_OB)
        shares_C11 = _shares(part_OB.device, self.search_range)[:, None, None]
        if not self.search_range:
            return self._grid(shares_C11 * low, shares_C11 * high, width, sym)
        if width == 1:
            # The best two levels lie inside the range, about 0.8 standard deviations from the mean.
            mean = part_OB.mean(1, keepdim=True)
            reach = 1.25 * part_OB.abs().mean(1, keepdim=True)
            low, high = mean - reach, mean + reach
        scale_CO1 = self.uniform.stored(shares_C11 * (high - low) / (2**width - 1))
        steps = 2.0 ** (self.storage.zero_bits - width)
        zero_CO1 = torch.round(-shares_C11 * low / scale_CO1 * steps) / steps
        zeros = [self.storage.round_zero(zero_CO1 + offset / steps, width) for offset in OFFSETS]
        zero_CO1 = torch.cat(zeros)
        wide = Levels(scale_CO1.repeat(len(OFFSETS), 1, 1), zero_CO1, torch.zeros_like(zero_CO1))
        pairs = zip(self._whole_range(part_OB, width), wide, strict=True)
        return Levels(*(torch.cat([first[None], more]) for first, more in pairs))
