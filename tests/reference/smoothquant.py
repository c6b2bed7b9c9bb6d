"""Spec 5.2 and 5.3 as literal loops: smoothing of linears that share an input, and the
fake-quantized product.
"""

from __future__ import annotations

import numpy as np


def smoothing(tokens: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """s [I] of linears [O, I] that read the same tokens [T, I]; 1 where a channel never fired."""
    s = np.ones(tokens.shape[1])
    for j in range(tokens.shape[1]):
        act = max(abs(x) for x in tokens[:, j])
        largest = max(max(abs(w) for w in weight[:, j]) for weight in weights)
        if act > 0:
            s[j] = max(act**alpha / max(largest, 1e-5) ** (1 - alpha), 1e-5)
    return s


def on_grid(row: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """(codes, step) of one row of weights, or one token: the grid of its largest magnitude."""
    step = max(max(abs(v) for v in row), 1e-5) / (2 ** (bits - 1) - 1)
    return np.array([round(v / step) for v in row]), step


def product(
    tokens: np.ndarray, weight: np.ndarray, s: np.ndarray, bits: int, a_bits: int
) -> np.ndarray:
    """y [T, O]: every token and every row on a grid of its own, sums in integers."""
    y = np.zeros((len(tokens), len(weight)))
    for t, token in enumerate(tokens):
        codes_x, step_x = on_grid(token / s, a_bits)
        for o, row in enumerate(weight):
            codes_w, step_w = on_grid(row * s, bits)
            y[t, o] = int(codes_x @ codes_w) * step_x * step_w
    return y
