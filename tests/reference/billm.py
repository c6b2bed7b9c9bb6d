"""Spec 2.1 and 2.2: BiLLM of one linear, row by row, in fp64."""

from __future__ import annotations

import numpy as np


def fit(values: list[float]) -> tuple[float, float]:
    """(alpha, mu) of mu +- alpha; zeros where there are no values."""
    if not values:
        return 0.0, 0.0
    mu = sum(values) / len(values)
    return sum(abs(v - mu) for v in values) / len(values), mu


def approximate(X: np.ndarray, mask: np.ndarray, signs: int) -> np.ndarray:
    """R_k(X | M)."""
    result = np.zeros_like(X)
    for row in range(X.shape[0]):
        inside = [j for j in range(X.shape[1]) if mask[row, j]]
        for _ in range(signs):
            rest = {j: X[row, j] - result[row, j] for j in inside}
            alpha, mu = fit(list(rest.values()))
            for j in inside:
                result[row, j] += mu + (alpha if rest[j] >= mu else -alpha)
    return result


def quantile(ordered: list[float], share: float) -> float:
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def masks(W: np.ndarray, S: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(salient, mid), both [O, B]; what is measured is the error of approximating `target`."""
    columns = W.shape[1]
    order = sorted(range(columns), key=lambda j: -np.abs(S[:, j]).sum())
    best, salient = np.inf, np.zeros(W.shape, dtype=bool)
    for n in range(1, min(50, columns)):
        chosen = np.zeros(W.shape, dtype=bool)
        chosen[:, order[:n]] = True
        error = np.mean(
            (target - approximate(target, chosen, 2) - approximate(target, ~chosen, 2)) ** 2
        )
        if error < best:
            best, salient = error, chosen
    sizes = np.where(salient, 0, np.abs(S))
    ordered, double = sorted(sizes.flatten().tolist()), approximate(target, salient, 2)
    best, mid = np.inf, np.zeros(W.shape, dtype=bool)
    for percent in range(10, 91):
        chosen = ~salient & (sizes >= quantile(ordered, percent / 100))
        low = ~salient & ~chosen
        error = np.mean(
            (target - approximate(target, low, 1) - approximate(target, chosen, 1) - double) ** 2
        )
        if error < best:
            best, mid = error, chosen
    return salient, mid


def billm(
    weight: np.ndarray,
    hessian: np.ndarray,
    block_size: int,
    salience: str = "hessian",
    search_on: str = "salience",
    feedback: bool = True,
    damp: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """(restored weight [O, I], salient columns [I])."""
    W, H = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    columns = W.shape[1]
    for j in range(columns):
        if H[j, j] == 0:
            H[j, j] = 1
            W[:, j] = 0
    H = H + damp * np.mean([H[j, j] for j in range(columns)]) * np.eye(columns)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    restored, salient_columns = np.zeros_like(W), np.zeros(columns, dtype=bool)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[:, start:stop].copy()
        S = block.copy()
        if salience == "hessian":
            for j in range(stop - start):
                S[:, j] = block[:, j] ** 2 / U[start + j, start + j] ** 2
        salient, mid = masks(block, S, S if search_on == "salience" else block)
        low = ~salient & ~mid
        Q = approximate(block, low, 1) + approximate(block, mid, 1) + approximate(block, salient, 2)
        restored[:, start:stop], salient_columns[start:stop] = Q, salient.any(0)
        if feedback:
            for j in range(start, stop):
                error = (block[:, j - start] - Q[:, j - start]) / U[j, j]
                for later in range(stop, columns):
                    W[:, later] -= error * U[j, later]
    return restored, salient_columns
