"""The compiled kernels on a real GPU against torch on the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from storages import METHODS, error, generator, random_packed
from torch.nn import functional as F

from llq_hf import kernels
from llq_hf.kernels.gpu import ready
from llq_hf.methods import build

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ready.problem() is not None,
    reason="there is no GPU that the kernels run on",
)
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}


@pytest.mark.parametrize(("name", "options", "few"), METHODS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_methods_multiply_what_they_dequantize(
    name: str, options: dict[str, Any], few: list[str], dtype: torch.dtype, tokens: int
):
    method, columns = build(name, **options), 768 if "48" in str(options) else 1024
    packed = random_packed(method, 64, columns)
    weight_OI = method.dequantize(packed, 64, columns).double()
    x = torch.randn(tokens, columns, generator=generator(tokens)).to(dtype)
    there = kernels.CachedTensors({key: tensor.cuda() for key, tensor in packed.items()})
    with torch.no_grad():
        y = method.linear(x.cuda(), there, None, 64).cpu()
    codes = 0.02 if "tokens" in few else 0.0  # activations have 8 or 4 bits
    tolerance = ROUNDING[dtype] + (codes if options.get("bits") != 4 else 15 * codes)
    assert error(y, F.linear(x.double(), weight_OI)) < tolerance
