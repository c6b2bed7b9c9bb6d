"""Where torch decodes under autograd: the gradients are those of a dense linear, and no decoded
weight is kept for them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import checks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llq_hf.kernels import product
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import METHODS, build

OUT, IN = 48, 256


def packed_linear(name: str, dtype: torch.dtype, bias: bool) -> QuantLinear:
    dense = nn.Linear(IN, OUT, bias=bias)
    dense.weight.data = checks.weight(OUT, IN)
    method = build(name)
    packed = checks.quantize(method, dense.weight.data)
    return QuantLinear.from_packed(method, dense, packed).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 5, IN)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_a_dense_linear(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool
):
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(OUT, IN, generator=random)
    ours = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    b, c = (nn.Parameter(torch.ones(OUT, dtype=dtype)) if bias else None for _ in range(2))
    y = product(ours, None, lambda: weight_OI, b)
    expected = nn.functional.linear(theirs, weight_OI.to(dtype), c)
    assert torch.equal(y, expected)
    gradient = torch.randn(y.shape, generator=random).to(dtype)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)
    assert b is None or torch.equal(b.grad, c.grad)


def test_under_autocast_as_without_it():
    """peft trains fp32 adapters under autocast."""
    weight_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    grads = []
    for linear in (
        lambda x: product(x, None, lambda: weight_OI),
        lambda x: nn.functional.linear(x, weight_OI),
    ):
        x = torch.ones(3, IN, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
        y.sum().backward()
        grads.append((y.detach(), x.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("name", METHODS)
def test_autograd_keeps_no_decoded_weight(name: str):
    linear = packed_linear(name, torch.float32, bias=False)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(1, IN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear(x)
    assert max(kept, default=0) < OUT * IN
    y.sum().backward()
    dense: Any = x.detach().clone().requires_grad_()
    if linear.method.weight_only:
        (dense @ linear.dequantized().T).sum().backward()
        assert torch.allclose(x.grad, dense.grad, rtol=1e-3, atol=1e-3)


def test_gradients_of_gradients_and_torch_func():
    weight_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        product(x, None, lambda: weight_OI).square().sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.allclose(second, (2 * weight_OI.T @ weight_OI).sum(0).expand(2, -1), rtol=1e-4)
    pull = torch.func.vjp(lambda x: product(x, None, lambda: weight_OI), x.detach())[1]
    assert torch.allclose(pull(torch.ones(2, OUT))[0], weight_OI.sum(0).expand(2, -1), atol=1e-4)
