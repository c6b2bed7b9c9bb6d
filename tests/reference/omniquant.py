"""Spec 7: OmniQuant's learnable weight clipping of one linear, with derivatives written out, weight
by weight, in fp64.

value = s (clamp(round(w / s + v) + z, 0, L) - z), s = (high - low) / L, z = round(-low / s), high =
sigmoid(u) max, low = sigmoid(l) min; roundings count as identities where derivatives are taken, and
so does the rounding of s to fp16. v is 0, or moves by the signs of its derivatives.
"""

from __future__ import annotations

import math

import numpy as np

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def grid(
    part: list[float], up: float, down: float, bits: int, sym: bool
) -> tuple[float, float, float, float]:
    """(scale, zero, high, low) of one group of weights."""
    levels = 2**bits - 1
    high, low = sigmoid(up) * max(0.0, *part), sigmoid(down) * min(0.0, *part)
    if sym:
        high = max(high, -low)
        low = -high
    scale = float(np.float16(max((high - low) / levels, 2.0**-24)))
    return (
        scale,
        float(2 ** (bits - 1)) if sym else float(np.clip(np.rint(-low / scale), 0, levels)),
        high,
        low,
    )


def searched(part: list[float], squares: list[float], bits: int, sym: bool) -> tuple[float, float]:
    """The two logits, of 15 x 15, of least sum(squares * error**2); the first of equals."""
    shares = [0.998] + [1 - i / 20 for i in range(1, 15)]
    best, least = (math.nan, math.nan), math.inf
    for a in shares:
        for b in shares:
            up, down = math.log(a / (1 - a)), math.log(b / (1 - b))
            scale, zero, _, _ = grid(part, up, down, bits, sym)
            error = 0.0
            for w, square in zip(part, squares, strict=True):
                code = np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1)
                error += square * (scale * (code - zero) - w) ** 2
            if error < least:
                best, least = (up, down), error
    return best


def group_gradient(
    part: list[float],
    drift: list[float],
    slope: list[float],
    up: float,
    down: float,
    bits: int,
    sym: bool,
) -> tuple[float, float]:
    """Derivatives by the two logits of sum(slope * value)."""
    levels = 2**bits - 1
    scale, zero, high, low = grid(part, up, down, bits, sym)
    by_scale = by_zero = 0.0
    for w, v, g in zip(part, drift, slope, strict=True):
        code = np.rint(w / scale + v) + zero
        inside = 0 <= code <= levels
        by_scale += g * (np.clip(code, 0, levels) - zero - (w / scale if inside else 0))
        by_zero += g * (0.0 if inside else -scale)
    if sym:  # high = -low is the larger of the two ends
        by_high = 2 / levels * by_scale
        up_wins = sigmoid(up) * max(0.0, *part) >= -sigmoid(down) * min(0.0, *part)
        return (
            (by_high * high * (1 - sigmoid(up)), 0.0)
            if up_wins
            else (0.0, by_high * high * (1 - sigmoid(down)))
        )
    by_scale += by_zero * low / scale**2
    by_high, by_low = by_scale / levels, -by_scale / levels - by_zero / scale
    return by_high * high * (1 - sigmoid(up)), by_low * low * (1 - sigmoid(down))


def omniquant(
    weight: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    epochs: int,
    lr: float,
    aug_loss: bool,
    search_range: bool,
    rounding_lr: float,
    decay: bool,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """(codes [O, I], scales [O, G], mean loss of each epoch) for sequences inputs [N, S, I] and
    targets [N, S, O].
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    spans = [(start, min(start + size, columns)) for start in range(0, columns, size)]
    W = weight.astype(np.float64)
    logits = np.full((rows, len(spans), 2), 4.0)
    drift, total_steps = np.zeros((rows, columns)), epochs * len(inputs)
    if search_range:
        squares = (inputs.astype(np.float64) ** 2).sum((0, 1))
        for o in range(rows):
            for k, (start, stop) in enumerate(spans):
                logits[o, k] = searched(
                    W[o, start:stop].tolist(), squares[start:stop].tolist(), bits, sym
                )
    first, second, steps, losses = np.zeros_like(logits), np.zeros_like(logits), 0, []

    def rounded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.zeros((rows, columns))
        scales = np.zeros((rows, len(spans)))
        values = np.zeros((rows, columns))
        for o in range(rows):
            for k, (start, stop) in enumerate(spans):
                scale, zero, _, _ = grid(W[o, start:stop].tolist(), *logits[o, k], bits, sym)
                scales[o, k] = scale
                inner = W[o, start:stop] / scale + drift[o, start:stop]
                codes[o, start:stop] = np.clip(np.rint(inner) + zero, 0, 2**bits - 1)
                values[o, start:stop] = scale * (codes[o, start:stop] - zero)
        return codes, scales, values

    for _ in range(epochs):
        total = 0.0
        for x, target in zip(inputs.astype(np.float64), targets.astype(np.float64), strict=True):
            y = x @ rounded()[2].T
            wanted = [target, x @ W.T] if aug_loss else [target]
            total += sum(float(np.mean((y - t) ** 2)) for t in wanted)
            slope = sum(2 / y.size * (y - t).T @ x for t in wanted)
            left = 1 - steps / total_steps
            gradient, moved = np.zeros_like(logits), drift.copy()
            for o in range(rows):
                for k, (start, stop) in enumerate(spans):
                    span = slice(start, stop)
                    part = W[o, span].tolist(), drift[o, span].tolist(), slope[o, span].tolist()
                    gradient[o, k] = group_gradient(*part, *logits[o, k], bits, sym)
                    scale, zero, _, _ = grid(part[0], *logits[o, k], bits, sym)
                    for i in range(start, stop):
                        if 0 <= np.rint(W[o, i] / scale + drift[o, i]) + zero <= 2**bits - 1:
                            moved[o, i] -= rounding_lr * left * np.sign(slope[o, i])
            drift = np.clip(moved, -0.5, 0.5)
            steps += 1
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient**2
            step = first / (1 - BETA1**steps) / (np.sqrt(second / (1 - BETA2**steps)) + EPSILON)
            logits = logits - lr * (left if decay else 1) * step
        losses.append(total / len(inputs))
    codes, scales, _ = rounded()
    return codes, scales, losses
