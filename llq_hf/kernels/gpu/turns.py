"""Transforms and token grids on a GPU: what the kernels of tokens.py are given.

Legend: n numbers of a vector, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..views import Division, TokenGrid, Transform, Turn

COLUMNS, DEPTH = 16, 64  # of a program: columns of the result, and of what it sums at a time
WIDTH = 1024  # numbers that one program divides
WIDEST = 1 << 16  # numbers of a token that one program holds
LARGEST_FACTOR = 256  # rows of the left factor that one program holds


def transform(x: Tensor, by: Turn, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    """factor * (the transform `by` of x / divisor), computed in fp32, in the dtype of x."""
    from .tokens import turn

    x = x.contiguous()
    y = torch.empty_like(x)
    a, b = by.left.shape[0], by.right.shape[0]
    source = back = by.left
    shuffled = isinstance(by, Transform)
    if isinstance(by, Transform):
        source = by.source
        back = by.once("inverse", lambda: torch.argsort(by.target).int())
    turn[(x.numel() // by.columns, -(-b // COLUMNS))](
        x,
        source,
        by.left,
        by.right,
        back,
        x if divisor is None else divisor,
        x if factor is None else factor,
        y,
        A=a,
        B=b,
        AP=max(16, 1 << (a - 1).bit_length()),
        NB=COLUMNS,
        KB=min(DEPTH, max(16, 1 << (b - 1).bit_length())),
        SHUFFLED=shuffled,
        DIVIDE=divisor is not None,
        FACTOR=factor is not None,
        num_warps=8 if a > 64 else 4,
    )
    return y


def fits(by: Turn) -> bool:
    """Whether a program can hold the left factor."""
    return by.left.shape[0] <= LARGEST_FACTOR


def tokens(x: Tensor, by: TokenGrid, divisor: Tensor | None, values: bool) -> Any:
    """Codes int8 [..., n] and steps fp32 [..., 1], or with `values` the rounded x."""
    from .tokens import token_codes

    x = x.contiguous()
    codes = torch.empty_like(x, dtype=x.dtype if values else torch.int8)
    step = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    token_codes[(x.numel() // by.columns,)](
        x,
        x if divisor is None else divisor,
        codes,
        step,
        by.columns,
        float(2 ** (by.bits - 1) - 1),
        by.least,
        DIVIDE=divisor is not None,
        VALUES=values,
        WIDE=1 << (by.columns - 1).bit_length(),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return codes if values else (codes, step)


def divided(x: Tensor, by: Division) -> Tensor:
    """x / the divisor, computed in fp32, in the dtype of x."""
    from .tokens import divide

    x = x.contiguous()
    y = torch.empty_like(x)
    size = by.columns
    divide[(-(-size // WIDTH), x.numel() // size)](x, by.divisor, y, size, DEPTH=WIDTH)
    return y


def fits_one_program(by: TokenGrid) -> bool:
    return by.columns <= WIDEST
