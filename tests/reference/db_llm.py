"""Spec 4.1 and 4.2, weight by weight and token by token."""

from __future__ import annotations

import math


def nearest_level(w: float, a1: float, a2: float) -> tuple[int, int]:
    """(b1, b2) of the level a1 b1 + a2 b2 next to w, by trying all four."""
    return min(
        ((b1, b2) for b1 in (0, 1) for b2 in (0, 1)), key=lambda b: abs(w - a1 * b[0] - a2 * b[1])
    )


def start(group: list[float]) -> tuple[float, float, float]:
    """(a1, a2, squared error) of the best of 80 shrunken ranges, plain or mirrored."""
    largest = max(max(abs(w) for w in group), 2.0**-14)
    best = (0.0, 0.0, math.inf)
    for step in range(80):
        for sign in (1, -1):
            s = sign * (1 - step / 100) * largest / 2
            error = 0.0
            for w in group:
                b1, b2 = nearest_level(w, 2 * s, -s)
                error += (w - 2 * s * b1 + s * b2) ** 2
            if error < best[2]:
                best = (2 * s, -s, error)
    return best


def dad_loss(
    teacher: list[list[float]],
    student: list[list[float]],
    labels: list[int],
    dad: float,
    gamma: float,
    use_labels: bool,
) -> float:
    """Of one sequence: logits of both, [tokens][vocabulary]; labels[t] is token t."""

    def log_softmax(logits: list[float]) -> list[float]:
        norm = math.log(sum(math.exp(v) for v in logits))
        return [v - norm for v in logits]

    deviation = 0.0
    for t_logits, s_logits in zip(teacher, student, strict=True):
        t, s = log_softmax(t_logits), log_softmax(s_logits)
        entropy = -sum(math.exp(v) * v for v in t)
        cross = -sum(math.exp(v) * u for v, u in zip(t, s, strict=True))
        deviation += entropy**gamma * cross / len(teacher)
    guess = -sum(log_softmax(student[t])[labels[t + 1]] for t in range(len(labels) - 1)) / (
        len(labels) - 1
    )
    return (guess if use_labels else 0.0) + dad * deviation
