"""Chooses one option per unit within a budget of bits: an exact knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...common.errors import LLQError

# The room above the cheapest choice is counted in so many steps, unless all sizes share a larger
# one.
BUCKETS = 1 << 16


class Option(NamedTuple):
    """A choice for a unit: its stored bits, and its cost in nats per token."""

    bits: int
    loss: float


def knapsack(units: Sequence[Sequence[Option]], budget_bits: int) -> list[int]:
    """The index of the option for each unit: the least total loss within the budget.

    It is exact if all differences of bits share a step of at least 1 / BUCKETS of the room. Else
    bits are rounded up, so that the budget holds. LLQError if not even the cheapest options fit.
    """
    cheapest = [min(option.bits for option in options) for options in units]
    room = budget_bits - sum(cheapest)
    if room < 0:
        raise LLQError(
            f"the budget of {budget_bits} bits is below the {sum(cheapest)} of the cheapest choices"
        )
    above = [
        [option.bits - least for option in options]
        for options, least in zip(units, cheapest, strict=True)
    ]
    step = max(math.gcd(*(extra for extras in above for extra in extras)), -(-room // BUCKETS), 1)
    # best[j]: the least loss of the units so far within j steps above the cheapest choice.
    best = torch.zeros(room // step + 1, dtype=torch.float64)
    picks = []
    for options, extras in zip(units, above, strict=True):
        table = torch.full((len(options), len(best)), torch.inf, dtype=torch.float64)
        for row, option, extra in zip(table, options, extras, strict=True):
            steps = -(-extra // step)
            if steps < len(best):
                row[steps:] = best[: len(best) - steps] + option.loss
        best, pick = table.min(0)
        picks.append(pick)
    # Back from the last unit to the first.
    chosen: list[int] = []
    left = len(best) - 1
    for pick, extras in zip(reversed(picks), reversed(above), strict=True):
        chosen.append(int(pick[left]))
        left -= -(-extras[chosen[-1]] // step)
    return chosen[::-1]
