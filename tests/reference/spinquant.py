"""Spec 1.6 and 1.7 as literal loops: the symmetric grids of one slice, and the GPTQ solver on them,
in fp64.

As in reference.gptq, the rest of the matrix sees a block's repair when the block is finished, and
group grids are read from the matrix without the repair of the running block.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128


def step_of(slice_: list[float], bits: int, levels: str, shrink: float = 1.0) -> float:
    largest = max(abs(x) for x in slice_) * shrink or 1.0  # an all-zero slice: any step
    if levels == "absmax":
        return float(np.float32(largest / max(2 ** (bits - 1) - 1, 1)))
    return float(np.float32(2 * largest / (2**bits - 1)))


def nearest(x: float, step: float, bits: int, levels: str) -> float:
    """The level nearest to x: k * step, or (k + 1/2) * step, k in -2**(b-1) .. 2**(b-1) - 1."""
    shift = 0.5 if levels == "halves" else 0.0
    k = round(x / step - shift)
    return step * (min(max(k, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) + shift)


def searched(slice_: list[float], bits: int, levels: str) -> float:
    """The best of 80 shrunken ranges by the sum of |error| ** 2.4."""
    steps = [step_of(slice_, bits, levels, 1 - i / 100) for i in range(80)]
    errors = [sum(abs(nearest(x, step, bits, levels) - x) ** 2.4 for x in slice_) for step in steps]
    return steps[errors.index(min(errors))]


def spinquant(
    weight: np.ndarray,
    hessian: np.ndarray | None,
    bits: int,
    group_size: int = -1,
    levels: str = "absmax",
    w_clip: bool = True,
    act_order: bool = False,
    damp: float = 0.01,
) -> np.ndarray:
    """Restored weight [O, I]; hessian None: rounded to nearest."""
    W = weight.astype(np.float64).copy()
    rows, columns = W.shape
    size = columns if group_size == -1 else group_size
    find = searched if w_clip else step_of

    def steps_of(part: np.ndarray) -> list[float]:
        return [find(row.tolist(), bits, levels) for row in part]

    static = [steps_of(W)] if group_size == -1 else []
    order, U = list(range(columns)), np.eye(columns)
    if hessian is not None:
        H = hessian.astype(np.float64).copy()
        for i in range(columns):
            if H[i, i] == 0:
                H[i, i] = 1
                W[:, i] = 0
        if act_order:
            order = sorted(order, key=lambda i: -H[i, i])
            H = H[np.ix_(order, order)]
        H = H + damp * np.mean(np.diag(H)) * np.eye(columns)
        U = np.linalg.cholesky(np.linalg.inv(H)).T
    if act_order and group_size != -1:
        static = [steps_of(W[:, start : start + size]) for start in range(0, columns, size)]
    W = W[:, order]

    restored = np.zeros((rows, columns))
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        W1, errors = W[:, first:last].copy(), np.zeros((rows, last - first))
        for i in range(first, last):
            if static:
                current = static[order[i] // size]
            elif i % size == 0:
                current = steps_of(W[:, i : i + size])
            for row in range(rows):
                restored[row, i] = nearest(W1[row, i - first], current[row], bits, levels)
                error = (W1[row, i - first] - restored[row, i]) / U[i, i]
                errors[row, i - first] = error
                if hessian is not None:
                    W1[row, i - first :] -= error * U[i, i:last]
        if hessian is not None:
            W[:, last:] -= errors @ U[first:last, last:]
    back = np.empty_like(restored)
    back[:, order] = restored
    return back


def dynamic(x: list[float], bits: int, sym: bool = False, zero_inside: bool = True) -> list[float]:
    """What one token (or one head of it) becomes: spec 1.6."""
    if sym:
        top = 2 ** (bits - 1) - 1
        scale = max(max(abs(v) for v in x) / top, 1e-5)
        return [scale * min(max(round(v / scale), -top - 1), top) for v in x]
    low, high = (min(*x, 0.0), max(*x, 0.0)) if zero_inside else (min(x), max(x))
    scale = max((high - low) / (2**bits - 1), 1e-5)
    zero = round(-low / scale)
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in x]
