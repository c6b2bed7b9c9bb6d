"""Spec 2: Block-AP of one linear, with the straight-through derivatives written out, weight by
weight, in fp64.

value = s (c - z), c = clamp(round(w / s) + z, 0, L). Inside the range: by w 1, by s round(w / s) -
w / s, by z 0. Clipped: by w 0, by s c - z, by z -s. s counts as it is stored in fp16; its rounding,
and that of z, pass derivatives through; z outside 0..L gets none.
"""

from __future__ import annotations

import math

import numpy as np

BETA1, BETA2, EPSILON, DECAYED = 0.9, 0.999, 1e-8, 1 / 20


def start(part: list[float], bits: int) -> tuple[float, float]:
    """(scale, zero) of a group that spans its weights and zero."""
    low, high = min(0.0, *part), max(0.0, *part)
    scale = float(np.float16((high - low) / (2**bits - 1)))
    return scale, float(np.clip(np.rint(-low / scale), 0, 2**bits - 1))


def value(
    w: float, s: float, z: float, bits: int
) -> tuple[float, float, tuple[float, float, float]]:
    """(code, value, derivatives of the value by w, s and z)."""
    levels, z_code = 2**bits - 1, float(np.clip(np.rint(z), 0, 2**bits - 1))
    unclipped = np.rint(w / s) + z_code
    code = float(np.clip(unclipped, 0, levels))
    if code == unclipped:
        derivatives = (1.0, float(np.rint(w / s)) - w / s, 0.0)
    else:
        derivatives = (0.0, code - z_code, -s if 0 <= np.rint(z) <= levels else 0.0)
    return code, s * (code - z_code), derivatives


class AdamW:
    """Without decay; one learning rate for all of an array."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.first, self.second, self.steps = np.zeros(shape), np.zeros(shape), 0

    def step(self, gradient: np.ndarray, lr: float) -> np.ndarray:
        """What to add."""
        self.steps += 1
        self.first = BETA1 * self.first + (1 - BETA1) * gradient
        self.second = BETA2 * self.second + (1 - BETA2) * gradient**2
        unbiased = self.second / (1 - BETA2**self.steps)
        return -lr * self.first / (1 - BETA1**self.steps) / (np.sqrt(unbiased) + EPSILON)


def block_ap(
    weight: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    bits: int,
    group_size: int,
    epochs: int,
    batch: int,
    weight_lr: float,
    grid_lr: float,
    relative: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """(codes [O, I], scales and zeros [O, G], mean loss of each epoch) for inputs [N, S, I],
    targets [N, S, O].
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    group = np.arange(columns) // size
    grids = [
        [start(weight[o, group == k].tolist(), bits) for k in range(group[-1] + 1)]
        for o in range(rows)
    ]
    first_scale, zero = np.array(grids)[..., 0], np.array(grids)[..., 1]
    unit = first_scale if relative else np.ones_like(first_scale)
    # What is trained: in units
    u, r = (
        weight.astype(np.float64) / unit[:, group],
        first_scale / unit,
    )
    adam_u, adam_r, adam_z = AdamW(u.shape), AdamW(r.shape), AdamW(zero.shape)
    parts = [slice(i, i + batch) for i in range(0, len(inputs), batch)]
    losses: list[float] = []

    def rounded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes, values, by = np.zeros_like(u), np.zeros_like(u), np.zeros((*u.shape, 3))
        for o in range(rows):
            for i in range(columns):
                k = group[i]
                stored = float(np.float16(r[o, k] * unit[o, k]))
                codes[o, i], values[o, i], by[o, i] = value(
                    u[o, i] * unit[o, k], stored, zero[o, k], bits
                )
        return codes, values, by

    for epoch in range(epochs):
        total = 0.0
        for number, part in enumerate(parts):
            x, target = inputs[part].astype(np.float64), targets[part].astype(np.float64)
            _, values, by = rounded()
            error = x @ values.T - target
            total += float(np.mean(error**2)) * len(x)
            slope = 2 / error.size * np.einsum("nso,nsi->oi", error, x)
            spans = range(group[-1] + 1)
            by_scale, by_zero = (
                np.stack([(slope * by[..., j])[:, group == k].sum(1) for k in spans], axis=1)
                for j in (1, 2)
            )
            done = (epoch * len(parts) + number) / (epochs * len(parts))
            share = DECAYED + (1 - DECAYED) * (1 + math.cos(math.pi * done)) / 2
            u = u + adam_u.step(slope * by[..., 0] * unit[:, group], weight_lr * share)
            r = r + adam_r.step(by_scale * unit, grid_lr * share)
            zero = zero + adam_z.step(by_zero, grid_lr * share)
        losses.append(total / len(inputs))
    codes, _, _ = rounded()
    return codes, np.float16(r * unit), np.clip(np.rint(zero), 0, 2**bits - 1), losses
