"""Levels of a group in SliM-LLM: scale, zero and mean, and the codes on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Grids of groups, [O, 1] or [O, n]: value = scale * (code - zero) + mean. zero counts steps,
    also parts of one.
    """

    scale: Tensor
    zero: Tensor
    mean: Tensor

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """Nearest codes; with a whole zero, rounded before it is added."""
        whole = self.zero.floor()
        return (
            torch.round((weight - self.mean) / self.scale + (self.zero - whole)) + whole
        ).clamp_(0, 2**bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero) + self.mean

    def rounded(self, weight: Tensor, bits: int) -> Tensor:
        return self.values(self.codes(weight, bits))

    def through(self, change: Callable[[Tensor], Tensor]) -> Levels:
        return Levels(*(change(part) for part in self))


class Factor(NamedTuple):
    """A Hessian [I, I] and its U, both in the order of solving; divisors [I] of saliences, in the
    model's order.
    """

    H_II: Tensor
    U_II: Tensor | None
    order_I: Tensor
    dead_I: Tensor  # mask of the columns that never fired, in the model's order
    groups: list[int]  # in the order of solving
    spread_I: Tensor


def ends_of(part_OB: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight [O, 1] of each row, zero between them; -1 and 1 for rows of zeros."""
    low, high = (
        part_OB.amin(1, keepdim=True).clamp_max(0),
        part_OB.amax(1, keepdim=True).clamp_min(0),
    )
    empty = low == high
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def most_salient(salience_OB: Tensor) -> Tensor:
    """What is at least as salient as the least of the outliers, those beyond 2 standard deviations;
    nothing if none.
    """
    outlier_OB = (salience_OB - salience_OB.mean()).abs() > 2 * salience_OB.std()
    return salience_OB >= torch.where(outlier_OB, salience_OB, math.inf).min()
