"""Spec 1.2: PB-LLM of one linear, weight by weight, in fp64."""

from __future__ import annotations

import math

import numpy as np


def eight_bit(row: np.ndarray) -> tuple[float, int]:
    """Scale and zero point of one row's 8-bit grid."""
    low, high = min(0.0, row.min()), max(0.0, row.max())
    if low == high:
        low, high = -1.0, 1.0
    scale = (high - low) / 255
    return scale, round(-low / scale)


def pb_llm(
    weight: np.ndarray,
    hessian: np.ndarray,
    low_share: float,
    group_size: int = -1,
    salience: str = "hessian",
    mean_over: str = "group",
    feedback: bool = True,
    damp: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """(restored weight [O, I], mask of the 8-bit weights [O, I])."""
    W, H = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    rows, columns = W.shape
    grids = [eight_bit(row) for row in W]  # 1. from the original weights
    for j in range(columns):  # 2.
        if H[j, j] == 0:
            H[j, j] = 1
            W[:, j] = 0
    H = H + damp * np.mean([H[j, j] for j in range(columns)]) * np.eye(columns)
    U = np.linalg.cholesky(np.linalg.inv(H)).T

    size = columns if group_size == -1 else group_size
    salient = np.zeros((rows, columns), dtype=bool)
    alphas, means = {}, {}
    for start in range(0, columns, size):
        group = range(start, min(start + size, columns))
        scores = []  # 3. all rows together
        for row in range(rows):
            for j in group:
                score = abs(W[row, j]) if salience == "magnitude" else W[row, j] ** 2 / U[j, j] ** 2
                scores.append((score, row, j))
        scores.sort()
        for _, row, j in scores[math.floor(len(scores) * low_share) + 1 :]:
            salient[row, j] = True
        for row in range(rows):  # 4.
            low = [W[row, j] for j in group if not salient[row, j]]
            whole = [0.0 if salient[row, j] else W[row, j] for j in group]
            entries = whole if mean_over == "group" else low
            mean = sum(entries) / len(entries) if entries else 0.0
            alpha = sum(abs(w - mean) for w in entries) / len(entries) if entries else 0.0
            means[row, start // size], alphas[row, start // size] = mean, alpha

    restored = np.zeros((rows, columns))
    for j in range(columns):  # 5.
        for row in range(rows):
            w = W[row, j]
            if salient[row, j]:
                scale, zero = grids[row]
                restored[row, j] = scale * (min(max(round(w / scale) + zero, 0), 255) - zero)
            else:
                mean, alpha = means[row, j // size], alphas[row, j // size]
                restored[row, j] = mean + alpha if w >= mean else mean - alpha
            if feedback:
                error = (w - restored[row, j]) / U[j, j]
                for later in range(j + 1, columns):
                    W[row, later] -= error * U[j, later]
    return restored, salient
