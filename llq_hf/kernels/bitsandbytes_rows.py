"""The rows of bitsandbytes' CUDA kernels: 4-bit codes whose levels that library knows, in the very
bytes that it reads.

Legend: O out_features, I in_features, N = O I weights, B blocks (groups of the flat matrix).
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import ALL, MANY, Row
from .views import TableCodes

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for


def multiply(x: Tensor, stored: TableCodes, bias: Tensor | None) -> Tensor:
    """F.linear by bitsandbytes' 4-bit product."""
    codes, state = _quantized(stored, x.dtype)
    y: Tensor = _library().matmul_4bit(x, codes.t(), quant_state=state, bias=bias)
    return y


def multiply_shifted(x: Tensor, stored: TableCodes, bias: Tensor | None) -> Tensor:
    """F.linear with the weight that bitsandbytes decodes, plus the shift of each block, which it
    does not know.
    """
    assert stored.shift is not None
    codes, state = _quantized(stored, x.dtype)
    weight_OI = _library().functional.dequantize_4bit(codes, state)
    shift_B1 = stored.shift.decoded()[:, None].to(x.dtype)
    weight_BK = weight_OI.view(-1, stored.group_size) + shift_B1
    return F.linear(x, weight_BK.view(stored.rows, stored.columns), bias)


def _quantized(stored: TableCodes, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """What bitsandbytes takes: codes uint8 [ceil(N / 2), 1], and how they are to be read."""
    codes = stored.weight.view(torch.uint8)[: -(-stored.rows * stored.columns // 2), None]
    state = _library().functional.QuantState(
        absmax=stored.scale.decoded(),
        shape=torch.Size((stored.rows, stored.columns)),
        dtype=dtype,
        blocksize=stored.group_size,
        quant_type=stored.levels_name,
        code=stored.levels,
    )
    return codes, state


@cache
def _library() -> Any:
    return importlib.import_module("bitsandbytes")


@cache
def available() -> bool:
    """Whether bitsandbytes and a CUDA device are there."""
    return importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available()


def _known(stored: TableCodes) -> bool:
    """Whether bitsandbytes knows the levels and the block size, and no block crosses rows."""
    size = stored.group_size
    known = stored.bits == 4 and stored.levels_name is not None
    return known and size in BLOCK_SIZES and stored.columns % size == 0


def _plain(stored: TableCodes) -> bool:
    return _known(stored) and stored.shift is None


def _shifted(stored: TableCodes) -> bool:
    return _known(stored) and stored.shift is not None


ROWS = (
    Row(TableCodes, "cuda", MANY, ALL, available, _plain, multiply, differentiable=True),
    Row(TableCodes, "cuda", MANY, ALL, available, _shifted, multiply_shifted, differentiable=True),
)
