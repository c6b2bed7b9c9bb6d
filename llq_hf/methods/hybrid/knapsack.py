"""The knapsack that chooses one option per unit within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...common.errors import LLQError

BUCKETS = (
    1 << 16
    # steps that the room above the cheapest choice is counted in, unless all costs share a larger step
)


class Option(NamedTuple):
    """What a unit may take: stored bits in all, and nats per token that it costs the model."""

    bits: int
    loss: float


def knapsack(units: Sequence[Sequence[Option]], budget_bits: int) -> list[int]:
    """For each unit the index of the option it takes: the least total loss whose bits stay within
    the budget.

    Exact where all differences of bits share a step of at least 1 / BUCKETS of the room; else bits
    count rounded up, so that the budget holds. LLQError where not even the cheapest options fit.
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
    best = torch.zeros(
        room // step + 1, dtype=torch.float64
    )  # best[j]: the least loss within j steps above cheapest
    picks = []
    for options, extras in zip(units, above, strict=True):
        table = torch.full((len(options), len(best)), torch.inf, dtype=torch.float64)
        for row, option, extra in zip(table, options, extras, strict=True):
            steps = -(-extra // step)
            if steps < len(best):
                row[steps:] = best[: len(best) - steps] + option.loss
        best, pick = table.min(0)
        picks.append(pick)
    chosen, left = [], len(best) - 1
    for pick, extras in zip(reversed(picks), reversed(above), strict=True):
        chosen.append(int(pick[left]))
        left -= -(-extras[chosen[-1]] // step)
    return chosen[::-1]
