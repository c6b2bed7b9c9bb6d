"""Grids of SliM-LLM's groups (scale, zero, mean), and what the fits of grids need.

Legend: O out_features, I in_features, B columns of a group, n groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Grids of groups, each part [O, 1] or [O, n]: value = scale * (code - zero) + mean.

    zero: in steps of the codes, and also between whole steps.
    """

    scale: Tensor
    zero: Tensor
    mean: Tensor

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """Nearest codes. With a whole zero, weights are rounded before it is added."""
        whole = self.zero.floor()
        steps = (weight - self.mean) / self.scale + (self.zero - whole)
        return (torch.round(steps) + whole).clamp_(0, 2**bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero) + self.mean

    def round(self, weight: Tensor, bits: int) -> Tensor:
        """The nearest values to weights."""
        return self.values(self.codes(weight, bits))

    def map(self, change: Callable[[Tensor], Tensor]) -> Levels:
        """Levels whose three parts are each changed in the same way."""
        return Levels(*(change(part) for part in self))


class Factor(NamedTuple):
    """A Hessian [I, I] and U, the upper Cholesky factor of its inverse, and what follows from them.

    H_II and U_II are in the order of solving, which is `order_I`; the masks and vectors are in the
    model's order.
    """

    H_II: Tensor
    U_II: Tensor | None
    order_I: Tensor
    dead_I: Tensor  # mask of the columns that never fired
    groups: list[int]  # in the order of solving
    spread_I: Tensor  # d: saliences are divided by its square


def ends_of(part_OB: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight [O, 1] of each row, with zero between them.

    A row of zeros gets -1 and 1.
    """
    low = part_OB.amin(1, keepdim=True).clamp_max(0)
    high = part_OB.amax(1, keepdim=True).clamp_min(0)
    empty = low == high
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def most_salient(salience_OB: Tensor) -> Tensor:
    """Mask of the weights that are at least as salient as the least outlier; none if no outliers.

    Outliers are more than 2 standard deviations away from the mean, on either side.
    """
    outlier_OB = (salience_OB - salience_OB.mean()).abs() > 2 * salience_OB.std()
    return salience_OB >= torch.where(outlier_OB, salience_OB, math.inf).min()
