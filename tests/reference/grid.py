"""Spec 1.1 as literal loops: the grid of one slice of one row. Written from the spec, in fp32 as it
says: the end of a symmetric range lies exactly between two codes, where another precision rounds
the other way.
"""

from __future__ import annotations

import math

import numpy as np


def round_half_even(x: float) -> int:
    return round(x)  # Python's round is half to even, as torch.round


def stored(scale: float, scale_bits: int) -> float:
    """The scale as the file will hold it; never below the smallest fp16, which is ours and not the
    spec's.
    """
    scale = max(scale, 2.0**-24)
    return float(np.float16(scale)) if scale_bits == 16 else float(np.float32(scale))


def ratio(x: float, scale: float) -> float:
    return float(np.float32(x) / np.float32(scale))


def grid_of(
    slice_: list[float], bits: int, sym: bool = False, scale_bits: int = 32, shrink: float = 1.0
):
    """(scale, zero) of a slice. The symmetric range is symmetric always: the spec's [OPT] in place
    of its [BUG].
    """
    top = 2**bits - 1
    low, high = min(*slice_, 0.0), max(*slice_, 0.0)
    low, high = (
        float(np.float32(low) * np.float32(shrink)),
        float(np.float32(high) * np.float32(shrink)),
    )
    if sym:
        high = max(abs(low), high)
        low = -high
    if low == 0 and high == 0:
        low, high = -1.0, 1.0
    scale = stored(ratio(float(np.float32(high) - np.float32(low)), top), scale_bits)
    zero = 2 ** (bits - 1) if sym else min(max(round_half_even(ratio(-low, scale)), 0), top)
    return scale, zero


def code_of(x: float, scale: float, zero: int, bits: int) -> int:
    """Rounded before the zero is added."""
    return min(max(round_half_even(ratio(x, scale)) + zero, 0), 2**bits - 1)


def value_of(code: int, scale: float, zero: int) -> float:
    return scale * (code - zero)


def searched(slice_: list[float], bits: int, sym: bool, scale_bits: int = 32):
    """The option `mse`: 80 shrunken ranges, error |q - x| ** 2.4, and the neighbours of an
    asymmetric zero point.
    """
    best, best_error = None, math.inf
    for step in range(80):
        scale, zero = grid_of(slice_, bits, sym, scale_bits, 1 - step / 100)
        for offset in (0,) if sym else (0, -1, 1):
            moved = min(max(zero + offset, 0), 2**bits - 1)
            error = sum(
                abs(value_of(code_of(x, scale, moved, bits), scale, moved) - x) ** 2.4
                for x in slice_
            )
            if error < best_error:
                best, best_error = (scale, moved), error
    return best, best_error
