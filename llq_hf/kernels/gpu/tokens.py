"""What happens to activations beside a product, each in one launch: QuIP's and Hadamard transforms,
and the quantization of tokens.

Legend: n = A * B numbers of a vector; M tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    x_ptr, source_ptr, left_ptr, right_ptr, back_ptr, divisor_ptr, factor_ptr, y_ptr,
    A: tl.constexpr, B: tl.constexpr, AP: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr,
    SHUFFLED: tl.constexpr, DIVIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """y[target] = factor * left @ (x / divisor)[source] @ right, x seen as [A, B]. A program makes
    NB columns of a token's result: x times its columns of `right`, then `left` times that.

    back: where number i of the product goes in y, the inverse of `target`. AP: a power of two of
    at least 16 and A.
    """
    token = tl.program_id(0)
    a, k = tl.arange(0, AP), tl.arange(0, KB)
    b = tl.program_id(1) * NB + tl.arange(0, NB)
    # What the end needs is loaded first: one wait for memory instead of three.
    square = (a < A)[:, None] & (a < A)[None, :]
    left = tl.load(left_ptr + a[:, None] * A + a[None, :], mask=square, other=0)
    live = (a < A)[:, None] & (b < B)[None, :]
    to = a[:, None] * B + b[None, :]
    if SHUFFLED:
        to = tl.load(back_ptr + to, mask=live, other=0)
    z = tl.zeros((AP, NB), tl.float32)
    for first in range(0, B, KB):
        there = (a < A)[:, None] & (first + k < B)[None, :]
        at = a[:, None] * B + (first + k)[None, :]
        if SHUFFLED:
            at = tl.load(source_ptr + at, mask=there, other=0)
        inside = (first + k < B)[:, None] & (b < B)[None, :]
        right = tl.load(right_ptr + (first + k)[:, None] * B + b[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + token * (A * B) + at, mask=there, other=0).to(tl.float32)
        if DIVIDE:
            x = x / tl.load(divisor_ptr + at, mask=there, other=1).to(tl.float32)
        z = tl.dot(x, right, z, input_precision="tf32x3")
    y = tl.dot(left, z, input_precision="tf32x3")
    if FACTOR:
        y *= tl.load(factor_ptr)
    tl.store(y_ptr + token * (A * B) + to, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def token_codes(
    x_ptr, divisor_ptr, codes_ptr, step_ptr, n, top, least,
    DIVIDE: tl.constexpr, VALUES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """int8 codes [M, n] of x / divisor on each token's symmetric grid, and their steps [M]; with
    VALUES the quantized values in the dtype of `codes` instead.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDE)
    live = i < n
    x = tl.load(x_ptr + token * n + i, mask=live, other=0).to(tl.float32)
    if DIVIDE:
        x = tl.div_rn(x, tl.load(divisor_ptr + i, mask=live, other=1).to(tl.float32))
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), top), least)
    steps = tl.div_rn(x, step + x * 0)
    codes = (steps + 12582912.0) - 12582912.0  # half to even
    codes = tl.clamp(codes, -top - 1, top)
    if VALUES:
        tl.store(
            codes_ptr + token * n + i, (codes * step).to(codes_ptr.dtype.element_ty), mask=live
        )
    else:
        tl.store(codes_ptr + token * n + i, codes.to(tl.int8), mask=live)
        tl.store(step_ptr + token, step)


@triton.jit
def divide(x_ptr, divisor_ptr, y_ptr, n, DEPTH: tl.constexpr):
    """y [M, n] = x / divisor [n], in fp32 between."""
    token = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    x = tl.load(x_ptr + token * n + i, mask=i < n, other=0).to(tl.float32)
    y = tl.div_rn(x, tl.load(divisor_ptr + i, mask=i < n, other=1).to(tl.float32))
    tl.store(y_ptr + token * n + i, y.to(y_ptr.dtype.element_ty), mask=i < n)
