"""SliM-LLM of one linear in loops, in fp64: allocation by salience and divergence, grids of 101
shares, feedback.

`as_published` keeps what the authors' code does beside it: 0.01 on the diagonal of H (instead of
the damping where groups are ranked for the search, and left in afterwards), dead columns kept,
leading narrow groups symmetric.
"""

from __future__ import annotations

import math

import numpy as np

SHARES = [1.0] + [1 + i / 500 for i in range(1, 51)] + [1 - i / 500 for i in range(1, 51)]


def slim_llm(
    weight: np.ndarray,
    inputs: np.ndarray,
    sequences: int,
    bits: int,
    group_size: int,
    damp: float = 0.01,
    lambda_salience: float = 1.0,
    as_published: bool = False,
):
    """(restored weight [O, I], bits of each group, divergence for 1, 2, ... pairs)."""
    W, X = weight.astype(np.float64).copy(), inputs.astype(np.float64)
    rows, columns = W.shape
    H = 2 / sequences * X.T @ X
    for i in range(columns):
        if H[i, i] == 0:
            H[i, i] = 1
            if not as_published:
                W[:, i] = 0
    absolute = 0.01 if as_published else damp * mean_diagonal(H)
    ranking = ranked(W, upper(H + absolute * np.eye(columns)), group_size)
    divergences = search(W, X, weight.astype(np.float64) @ X.T, ranking, bits, group_size)
    pairs = 1 + divergences.index(min(divergences)) if divergences else 0
    if as_published:
        H = H + absolute * np.eye(columns)
    U = upper(H + damp * mean_diagonal(H) * np.eye(columns))
    widths = allotted(ranked(W, U, group_size), pairs, bits, -(-columns // group_size))

    restored, sym = np.zeros((rows, columns)), as_published
    for group, width in enumerate(widths):
        start, stop = group * group_size, min((group + 1) * group_size, columns)
        sym = sym and width < bits
        grids = fitted(W[:, start:stop], U, start, width, lambda_salience, sym)
        for j in range(start, stop):
            for row in range(rows):
                restored[row, j] = nearest(W[row, j], grids[row], width)
                error = (W[row, j] - restored[row, j]) / U[j, j]
                for later in range(j, columns):
                    W[row, later] -= error * U[j, later]
    return restored, widths, divergences


def mean_diagonal(H: np.ndarray) -> float:
    return float(np.mean([H[i, i] for i in range(len(H))]))


def upper(H: np.ndarray) -> np.ndarray:
    """U with U^T U = H^-1."""
    return np.linalg.cholesky(np.linalg.inv(H)).T


def ranked(W: np.ndarray, U: np.ndarray, group_size: int) -> list[int]:
    """Whole groups, least salient first."""
    saliences = []
    for group in range(W.shape[1] // group_size):
        members = range(group * group_size, (group + 1) * group_size)
        saliences.append(
            sum(W[row, j] ** 2 / U[j, j] ** 2 for row in range(len(W)) for j in members)
        )
    return sorted(range(len(saliences)), key=lambda group: saliences[group])


def allotted(ranking: list[int], pairs: int, bits: int, groups: int) -> list[int]:
    widths = [bits] * groups
    for group in ranking[:pairs]:
        widths[group] = bits - 1
    for group in ranking[len(ranking) - pairs :]:
        widths[group] = bits + 1
    return widths


def search(
    W: np.ndarray, X: np.ndarray, Y: np.ndarray, ranking: list[int], bits: int, group_size: int
) -> list[float]:
    """Divergence of the rounded outputs from Y [O, T], for 1, 2, ... pairs."""
    groups = -(-W.shape[1] // group_size)
    found = []
    for pairs in range(1, groups // 2):
        rounded = np.zeros_like(W)
        for group, width in enumerate(allotted(ranking, pairs, bits, groups)):
            part = slice(group * group_size, (group + 1) * group_size)
            for row in range(len(W)):
                grid = (
                    two_levels(W[row, part])
                    if width == 1
                    else grid_of(*range_of(W[row, part]), width)
                )
                rounded[row, part] = [nearest(w, grid, width) for w in W[row, part]]
        total = 0.0
        for t in range(len(X)):
            p, r = softmax(rounded @ X[t]), softmax(Y[:, t])
            total += sum(p[o] * (math.log(p[o]) - math.log(r[o])) for o in range(len(p)))
        found.append(total)
    return found


def softmax(y: np.ndarray) -> list[float]:
    powers = [math.exp(v - max(y)) for v in y]
    return [max(v / sum(powers), 1e-6) for v in powers]


def range_of(w: np.ndarray) -> tuple[float, float]:
    low, high = min(0.0, min(w)), max(0.0, max(w))
    return (-1.0, 1.0) if low == high else (low, high)


def grid_of(low: float, high: float, width: int, sym: bool = False) -> tuple[float, float]:
    """(scale, zero)."""
    scale = (high - low) / (2**width - 1)
    return scale, 2.0 ** (width - 1) if sym else float(np.round(-low / scale))


def two_levels(w: np.ndarray) -> tuple[float, float]:
    """(half the distance, mean)."""
    return float(np.mean(np.abs(w))), float(np.mean(w))


def nearest(w: float, grid: tuple[float, float], width: int) -> float:
    scale, zero = grid
    if width == 1:
        return scale * float(np.sign(w - zero)) + zero
    return scale * (min(max(float(np.round(w / scale)) + zero, 0.0), 2.0**width - 1) - zero)


def fitted(
    part: np.ndarray, U: np.ndarray, start: int, width: int, lambda_salience: float, sym: bool
) -> list[tuple[float, float]]:
    """The grid of each row."""
    if width == 1:
        return [two_levels(row) for row in part]
    salience = np.array(
        [
            [part[row, j] ** 2 / U[start + j, start + j] ** 2 for j in range(part.shape[1])]
            for row in range(len(part))
        ]
    )
    spread = np.std(salience, ddof=1)
    outliers = [s for s in salience.flatten() if abs(s - np.mean(salience)) > 2 * spread]
    threshold = min(outliers, default=math.inf)
    grids = []
    for row in range(len(part)):
        low, high = range_of(part[row])
        best, least = (1.0, 0.0), math.inf
        for share in SHARES:
            grid = grid_of(share * low, share * high, width, sym)
            error = 0.0
            for j, w in enumerate(part[row]):
                times = lambda_salience if salience[row, j] >= threshold else 1.0
                error += times * abs(nearest(w, grid, width) - w) ** 2.4
            if error < least:
                best, least = grid, error
        grids.append(best)
    return grids
