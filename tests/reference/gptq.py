"""Spec 3.3: the GPTQ solver of one linear, one row and one column at a time, in fp64; GAR and GPTAQ
(improvements 3.1).

Kept literally: the block of 128 columns whose updates the rest of the matrix sees only when it is
finished, and the group grids that are read from the matrix *without* the updates of the running
block.
"""

from __future__ import annotations

import numpy as np
from reference.grid import code_of, grid_of, value_of

BLOCK = 128


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    scale_bits: int = 32,
    act_group_aware: bool = False,
    gptaq: float = 0.0,
    cross: np.ndarray | None = None,
):
    """(restored weight [O, I], codes [O, I] in the order of solving, order [I])."""
    W, H = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    rows, columns = W.shape

    def grids_of(part: np.ndarray) -> list:
        return [grid_of(row.tolist(), bits, sym, scale_bits) for row in part]

    current = grids_of(W)  # 1. the whole row, before dead columns are zeroed
    for i in range(columns):  # 2. dead columns
        if H[i, i] == 0:
            H[i, i] = 1
            W[:, i] = 0
    grouped = group_size != -1
    static = []
    if static_groups and grouped:  # 3. grids of the original slices
        static = [
            grids_of(W[:, start : start + group_size]) for start in range(0, columns, group_size)
        ]
    order = list(range(columns))
    if act_order:  # 4.
        order = sorted(order, key=lambda i: -H[i, i])  # stable
    if act_group_aware:
        size = group_size if grouped else columns
        groups = [list(range(start, start + size)) for start in range(0, columns - size + 1, size)]
        groups = [sorted(group, key=lambda i: -H[i, i]) for group in groups]
        tail = sorted(range(len(groups) * size, columns), key=lambda i: -H[i, i])
        groups = sorted(groups, key=lambda group: -H[group[0], group[0]])
        order = [i for group in groups for i in group] + tail
    W, H = W[:, order], H[np.ix_(order, order)]
    D = None if cross is None else cross[np.ix_(order, order)].T.astype(np.float64) - H
    H = H + damp * np.mean([H[i, i] for i in range(columns)]) * np.eye(columns)  # 5.
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # 6. U^T U = H^-1

    P = np.zeros_like(H)
    if gptaq:
        strict = np.array(
            [[(D @ U.T)[i, j] if j > i else 0.0 for j in range(columns)] for i in range(columns)]
        )
        P = gptaq * strict @ U

    codes, restored = np.zeros((rows, columns), dtype=int), np.zeros((rows, columns))
    # GAR finds a group's grid when nothing is owed to it: blocks of a group instead of 128.
    block = group_size if act_group_aware and grouped else BLOCK
    for first in range(0, columns, block):  # 7.
        last = min(first + block, columns)
        W1, errors = W[:, first:last].copy(), np.zeros((rows, last - first))
        before = np.zeros_like(errors)
        for i in range(first, last):
            if grouped and static_groups:
                current = static[order[i] // group_size]
            elif grouped and i % group_size == 0:
                current = grids_of(W[:, i : i + group_size])  # stale inside the block, by the rule
            for row in range(rows):
                scale, zero = current[row]
                codes[row, i] = code_of(W1[row, i - first], scale, zero, bits)
                restored[row, i] = value_of(codes[row, i], scale, zero)
                error = (W1[row, i - first] - restored[row, i]) / U[i, i]
                before[row, i - first] = W1[row, i - first]
                for later in range(i, last):
                    W1[row, later - first] -= (
                        error * U[i, later] - before[row, i - first] * P[i, later]
                    )
                errors[row, i - first] = error
        for row in range(rows):
            for later in range(last, columns):
                for i in range(first, last):
                    W[row, later] -= (
                        errors[row, i - first] * U[i, later] - before[row, i - first] * P[i, later]
                    )
    back = np.empty_like(restored)
    back[:, order] = restored  # 8.
    return back, codes, order
