"""PB-LLM's salient weights on a GPU: a list by rows of what they add to the plain ones.

Legend: O rows, K columns, G groups, M tokens, S salient weights; E entries of a row at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_value(code, row, own_scale_ptr, own_zero_ptr, live):
    """fp32 value of 8-bit codes in their row's grid."""
    zero = tl.load(own_zero_ptr + row).to(tl.float32)
    scale = tl.load(own_scale_ptr + row).to(tl.float32)
    return scale * (code.to(tl.float32) - zero)


@triton.jit
def add_salient(
    x_ptr, first_ptr, column_ptr, code_ptr, scale_ptr, mean_ptr, own_scale_ptr, own_zero_ptr,
    plain_ptr, bias_ptr, y_ptr, M, O, K, G,
    GROUP: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """y [M, O] = plain [M, O], the product with all weights as plain ones, and what salient weights
    add to it: x times the difference of the two values. first: of each row's entries, [O + 1].
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(row, O - 1)
    token = tl.program_id(1)
    first, last = tl.load(first_ptr + safe), tl.load(first_ptr + safe + 1)
    most = tl.max(last - first, 0)
    sums = tl.zeros((BN, E), tl.float32)
    for start in range(0, most, E):
        at = (first + start)[:, None] + tl.arange(0, E)[None, :]
        live = at < last[:, None]
        column = tl.load(column_ptr + at, mask=live, other=0).to(tl.int32) & 0xFFFF
        code = tl.load(code_ptr + at, mask=live, other=0)
        value = own_value(code, safe[:, None], own_scale_ptr, own_zero_ptr, live)
        group = safe[:, None] * G + column * 0
        if GROUP:
            group = safe[:, None] * G + tl.minimum(column // GROUP, G - 1)
        scale = tl.load(scale_ptr + group, mask=live, other=0).to(tl.float32)
        mean = tl.load(mean_ptr + group, mask=live, other=0).to(tl.float32)
        plain = mean + tl.where(code > 127, scale, -scale)
        x = tl.load(x_ptr + token * K + column, mask=live, other=0).to(tl.float32)
        sums += tl.where(live, (value - plain) * x, 0.0)
    y = tl.load(plain_ptr + token * O + safe) + tl.sum(sums, 1)
    if BIAS:
        y += tl.load(bias_ptr + safe).to(tl.float32)
    tl.store(y_ptr + token * O + row, y.to(y_ptr.dtype.element_ty), mask=row < O)


@triton.jit
def put_salient(
    first_ptr, column_ptr, code_ptr, own_scale_ptr, own_zero_ptr, y_ptr, O, K,
    BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write the salient weights into the dense y [O, K]."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    safe = tl.minimum(row, O - 1)
    first, last = tl.load(first_ptr + safe), tl.load(first_ptr + safe + 1)
    last = tl.where(row < O, last, first)
    for start in range(0, tl.max(last - first, 0), E):
        at = (first + start)[:, None] + tl.arange(0, E)[None, :]
        live = at < last[:, None]
        column = tl.load(column_ptr + at, mask=live, other=0).to(tl.int32) & 0xFFFF
        code = tl.load(code_ptr + at, mask=live, other=0)
        value = own_value(code, safe[:, None], own_scale_ptr, own_zero_ptr, live)
        to = y_ptr + safe.to(tl.int64)[:, None] * K + column
        tl.store(to, value.to(y_ptr.dtype.element_ty), mask=live)
