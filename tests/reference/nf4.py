"""Specs 5.1, 5.2 and 6.1: NormalFloat, double quantization and information calibration, block by
block in floats of 32 bits (numpy), candidate by candidate.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np

F = np.float32


def codebook(bits: int) -> list[np.float32]:
    """Quantiles of the normal distribution: 2**(bits - 1) of them above zero, one less below, and
    zero itself.
    """
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    tail = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    up = [quantile(tail + (0.5 - tail) * i / half) for i in range(half)]
    down = [-quantile(tail + (0.5 - tail) * i / (half - 1)) for i in range(half - 1)]
    return sorted(F(F(v) / F(max(up))) for v in [*down, 0.0, *up])


def dynamic_map() -> list[np.float32]:
    values = [F(0), F(1)]
    for i in range(7):
        edges = [0.1 + 0.9 * j / 2**i for j in range(2**i + 1)]
        for a, b in pairwise(edges):
            values += [F((a + b) / 2 * 10.0 ** (i - 6)), F(-(a + b) / 2 * 10.0 ** (i - 6))]
    return sorted(values)


def nearest(value: np.float32, book: list[np.float32]) -> int:
    """The lower one of two that are equally near."""
    return min(range(len(book)), key=lambda i: (abs(float(book[i]) - float(value)), i))


def coded(block: list[np.float32], book: list[np.float32]) -> tuple[list[int], np.float32]:
    """(codes, absmax) of one block."""
    absmax = max(abs(w) for w in block)
    if absmax == 0:
        return [nearest(F(0), book)] * len(block), absmax
    inverse = F(1) / absmax
    return [nearest(w * inverse, book) for w in block], absmax


def eight_bits(values: list[np.float32]) -> list[np.float32]:
    """Every value as the dynamic map restores it, in super-blocks of 256."""
    book, restored = dynamic_map(), []
    for start in range(0, len(values), 256):
        part = values[start : start + 256]
        absmax = max(abs(v) for v in part)
        inverse = F(1) / absmax if absmax else F(0)
        restored += [book[nearest(v * inverse, book)] * absmax for v in part]
    return restored


def entropy(codes: list[int]) -> float:
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    return -sum(p * math.log2(p) for p in shares)


def shift_of(
    block: list[np.float32], book: list[np.float32], bits: int, reach: float, steps: int
) -> np.float32:
    """tau of the highest entropy; of equally good ones the smallest shift, of two as small the
    negative one.
    """
    tail = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    sigma = 1 / NormalDist().inv_cdf(tail)
    median = sorted(block)[(len(block) - 1) // 2]
    span = max(abs(w - median) for w in block)
    best, most = median, -1.0
    for i in sorted(range(-steps, steps + 1), key=lambda i: (abs(i), i)):
        tau = median + F(F(reach * sigma * i / steps) * span)
        found = entropy(coded([w - tau for w in block], book)[0])
        if found > most + 1e-9:
            best, most = tau, found
    return best


def nf4(
    weights: list[float],
    bits: int,
    block_size: int = 64,
    double_quant: bool = True,
    shift: tuple[float, int] | None = None,
) -> tuple[list[int], list[float]]:
    """(codes, restored weights) of a matrix given row after row. shift: (reach, steps) of
    information calibration.
    """
    book = codebook(bits)
    codes, scales, taus = [], [], []
    for start in range(0, len(weights), block_size):
        block = [F(w) for w in weights[start : start + block_size]]
        taus.append(shift_of(block, book, bits, *shift) if shift else F(0))
        found, absmax = coded([w - taus[-1] for w in block], book)
        codes += found
        scales.append(absmax)
    if double_quant:
        mean = F(np.mean(np.array(scales, dtype=np.float64)))
        scales = [restored + mean for restored in eight_bits([s - mean for s in scales])]
    taus = eight_bits(taus) if shift else taus
    restored = [
        float(book[code] * scales[i // block_size] + taus[i // block_size])
        for i, code in enumerate(codes)
    ]
    return codes, restored
