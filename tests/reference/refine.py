"""Improvements 3.1.6 and 3.1.7, row by row and column by column, in fp64."""

from __future__ import annotations

import numpy as np


def loss(H: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
    return float(w @ H @ w - 2 * w @ b)


def descend(H, b, codes, scales, zeros, groups, bits):
    """One row: every code, in turn, to the level next to the minimum along its own axis."""
    codes = list(codes)
    for j in range(len(codes)):
        w = np.array([scales[g] * (c - zeros[g]) for c, g in zip(codes, groups, strict=True)])
        rest = sum(H[j, k] * w[k] for k in range(len(w)) if k != j)
        best = (b[j] - rest) / H[j, j]
        g = groups[j]
        codes[j] = min(range(2**bits), key=lambda c: abs(best - scales[g] * (c - zeros[g])))
    return codes


def refit(H, b, codes, scales, zeros, groups):
    """One row: the scales of least loss for its codes, in fp64; no bound on how far they may go."""
    count = len(scales)
    units = np.zeros((count, len(codes)))
    for j, (code, g) in enumerate(zip(codes, groups, strict=True)):
        units[g, j] = code - zeros[g]
    A = np.array([[units[k] @ H @ units[m] for m in range(count)] for k in range(count)])
    return np.linalg.solve(A, np.array([units[k] @ b for k in range(count)]))
