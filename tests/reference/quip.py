"""Spec 6.1 as literal loops in fp64: rescale, project, damp, grid 'b', LDLQ, greedy passes, and the
way back.

Rotations are handed in as dense matrices: which random ones are drawn is ours to choose, what is
done with them is not.
"""

from __future__ import annotations

import math

import numpy as np
from reference.grid import grid_of


def balance(W: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Step 1: s by column, rounded to fp16 as stored."""
    top = np.abs(H).max()
    s = []
    for j in range(W.shape[1]):
        hd = max(H[j, j] / top, 1e-8)
        wd = max(sum(w * w for w in W[:, j]), 1e-8)
        s.append(float(np.float16((hd / wd) ** 0.25)))
    return np.array(s)


def continuous_codes(W: np.ndarray, bits: int, sigmas: float) -> tuple[np.ndarray, float]:
    """Step 4: (codes before rounding, clamped; half-range c)."""
    top, c = 2**bits - 1, sigmas * math.sqrt(np.mean(W**2)) + 1e-16
    return np.clip((W / c + 1) / 2 * top, 0, top), c


def ldlq(t: np.ndarray, H: np.ndarray, bits: int) -> np.ndarray:
    """Step 5: columns from last to first; halves round up; only processed columns feed back."""
    top, columns = 2**bits - 1, t.shape[1]
    L = np.linalg.cholesky(H)
    L = L / np.diagonal(L)[None, :] - np.eye(columns)
    k = np.zeros(t.shape)
    for i in reversed(range(columns)):
        for row in range(len(t)):
            feedback = sum((t[row, j] - k[row, j]) * L[j, i] for j in range(i + 1, columns))
            k[row, i] = min(max(math.floor(t[row, i] + feedback + 0.5), 0), top)
    return k


def greedy(k: np.ndarray, t: np.ndarray, H: np.ndarray, bits: int, passes: int) -> np.ndarray:
    """Step 6, with the clamp inside the pass (the spec's improvement over [BUG-ish])."""
    k, top = k.copy(), 2**bits - 1
    for _ in range(passes):
        before = k.copy()
        for i in reversed(range(t.shape[1])):
            for row in range(len(t)):
                slope = sum((k[row, j] - t[row, j]) * H[j, i] for j in range(t.shape[1]))
                k[row, i] = min(max(round(k[row, i] - slope / H[i, i]), 0), top)
        if (k == before).all():
            break
    return k


def quip_rows(
    weight: np.ndarray, hessian: np.ndarray, bits: int, scale_bits: int = 16, damp: float = 0.01
):
    """qfn 'a' without preprocessing: grid 1.1 per row; codes are clamped before the rounding, as in
    grid 'b'.

    (restored weight [O, I], codes [O, I])
    """
    H = hessian.astype(np.float64)
    H = H + damp * np.mean(np.diagonal(H)) * np.eye(len(H))
    grids = [grid_of(row, bits, False, scale_bits) for row in weight.tolist()]
    t = np.array(
        [
            [x / scale + zero for x in row]
            for row, (scale, zero) in zip(weight.tolist(), grids, strict=True)
        ]
    )
    k = ldlq(np.clip(t, 0, 2**bits - 1), H, bits)
    return np.array([scale * (row - zero) for row, (scale, zero) in zip(k, grids, strict=True)]), k


def quip(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    U: np.ndarray,
    V: np.ndarray,
    rescale: bool = True,
    passes: int = 0,
    sigmas: float = 2.4,
    damp: float = 0.01,
):
    """(restored weight [O, I], codes [O, I])."""
    W, H = weight.astype(np.float64), hessian.astype(np.float64)
    columns, s = W.shape[1], np.ones(W.shape[1])
    if rescale:
        s = balance(W, H)
        W, H = W * s, H / np.abs(H).max() / np.outer(s, s)
    H = H * columns / (np.trace(H) + 1e-8) + 0.01 * np.eye(columns)
    W, H = U @ W @ V.T, V @ H @ V.T
    damped = H + damp * np.mean(np.diagonal(H)) * np.eye(columns)
    t, c = continuous_codes(W, bits, sigmas)
    # Ours: the second damping is for the factorization alone. The authors' greedy passes see the
    # damped H.
    k = greedy(ldlq(t, damped, bits), t, H, bits, passes)
    restored = c * (2 * k / (2**bits - 1) - 1)
    return (U.T @ restored @ V) / s, k
