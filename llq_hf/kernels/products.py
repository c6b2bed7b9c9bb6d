"""Products of torch with weights that are decoded for one call.

Legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CUDA_ROWS = 32  # CUDA's integer product needs more than 16


def decoded_product(
    x: Tensor, dense: Callable[[torch.dtype], Tensor], bias: Tensor | None
) -> Tensor:
    """F.linear(x, dense(x.dtype), bias), whose backward pass decodes again: autograd would
    otherwise keep the decoded weights of all linears, which are as large as the dense model.
    """
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _DecodedTwice.apply(x, bias, dense)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, dense(x.dtype), bias)


class _DecodedTwice(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        return F.linear(x, dense(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dense = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y_gradient,) = gradients
        x_gradient = y_gradient @ ctx.dense(y_gradient.dtype)
        bias_gradient = None
        if ctx.needs_input_grad[1]:
            bias_gradient = y_gradient.reshape(-1, y_gradient.shape[-1]).sum(0)
        return x_gradient, bias_gradient, None


def integer_product(codes_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """codes_TI @ weight_OI.T of int8 codes, int32 [T, O]. On CUDA, sides of the weight must be
    multiples of 8.
    """
    tokens = len(codes_TI)
    if codes_TI.is_cuda and tokens < CUDA_ROWS:
        codes_TI = F.pad(codes_TI, (0, 0, 0, CUDA_ROWS - tokens))
    return torch._int_mm(codes_TI, weight_OI.T)[:tokens]
