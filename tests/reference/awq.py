"""Spec 4.2 to 4.4 as literal loops, for a linear that is alone: scale search, clip search, rounding
to nearest.
"""

from __future__ import annotations

import math

import numpy as np
from reference.grid import code_of, grid_of, value_of


def groups_of(columns: int, group_size: int) -> list[range]:
    size = columns if group_size == -1 else group_size
    return [range(start, min(start + size, columns)) for start in range(0, columns, size)]


def rounded(
    row: list[float], bits: int, sym: bool, limit: float = math.inf
) -> tuple[list[float], list[int]]:
    """(values, codes) of one group of one row, on the grid of the group clipped to +-limit."""
    scale, zero = grid_of([max(min(w, limit), -limit) for w in row], bits, sym)
    codes = [code_of(w, scale, zero, bits) for w in row]
    return [value_of(code, scale, zero) for code in codes], codes


def scales(mean: np.ndarray, ratio: float, share: np.ndarray | None = None) -> np.ndarray:
    s = mean**ratio
    if share is not None:
        s = s / (share ** (1 - ratio) + 1e-4)
    s = np.maximum(s, 1e-4)
    return (s / math.sqrt(s.max() * s.min())).astype(np.float32).astype(np.float64)


def share_of(W: np.ndarray, group_size: int) -> np.ndarray:
    """AutoAWQ: |w| as a share of the largest of its group, mean over the rows."""
    share = np.zeros(W.shape[1])
    for row in W:
        for group in groups_of(W.shape[1], group_size):
            largest = max(abs(row[j]) for j in group)
            for j in group:
                share[j] += abs(row[j]) / (largest + 1e-6) / len(W)
    return share


def restored(W: np.ndarray, s: np.ndarray, bits: int, group_size: int, sym: bool) -> np.ndarray:
    """Q(W s) / s, without clipping."""
    values = np.zeros_like(W)
    for o, row in enumerate(W * s):
        for group in groups_of(W.shape[1], group_size):
            values[o, group] = rounded(row[group].tolist(), bits, sym)[0]
    return values / s


def awq(W, x, bits, group_size=-1, sym=False, ratios=20, clip=True, duo=False):
    """(weight as restored [O, I], codes [O, I], s [I], ratio chosen) for tokens x [T, I], all in
    fp64.
    """
    W, x = W.astype(np.float64), x.astype(np.float64)
    mean = np.abs(x).mean(0)
    best = (math.inf, 0.0, mean)
    for i in range(ratios):
        for share in (None, share_of(W, group_size)) if duo else (None,):
            s = scales(mean, i / ratios, share)
            loss = ((x @ (restored(W, s, bits, group_size, sym) - W).T) ** 2).mean()
            if loss < best[0]:
                best = (loss, i / ratios, s)
    s = best[2]
    W, x = W * s, x / s
    values, codes = np.zeros_like(W), np.zeros(W.shape, dtype=int)
    for o, row in enumerate(W):
        for group in groups_of(W.shape[1], group_size):
            weights = row[group].tolist()
            limit, least = math.inf, math.inf
            for i in range(10) if clip else ():
                tried = max(abs(w) for w in weights) * (1 - i / 20)
                error = np.array(rounded(weights, bits, sym, tried)[0]) - weights
                loss = ((x[:, group] @ error) ** 2).mean()
                if loss < least:
                    limit, least = tried, loss
            values[o, group], codes[o, group] = rounded(weights, bits, sym, limit)
    return values / s, codes, s, best[1]
