"""Every method's linear by the rows of the GPU kernels: few tokens in the emulator, what is beside
them in Triton's interpreter. test_interpreter.py runs this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from storages import METHODS, error, generator, random_packed, use_gpu_rows
from torch.nn import functional as F

from llq_hf import kernels
from llq_hf.methods import build

HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of inputs, levels and y


@pytest.mark.parametrize(("name", "options", "kernels_of_three"), METHODS, ids=str)
def test_methods_multiply_what_they_dequantize(
    emulated: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    kernels_of_three: list[str],
):
    served = use_gpu_rows(monkeypatch)
    method = build(name, **options)
    packed = random_packed(method, 32, 768 if "48" in str(options) else 1024)
    columns = 768 if "48" in str(options) else 1024
    weight_OI = method.dequantize(packed, 32, columns).double()
    for dtype in HALVES:
        x = torch.randn(3, columns, generator=generator(1)).to(dtype)
        served.clear()
        with torch.no_grad():
            y = method.linear(x, kernels.CachedTensors(packed), None, 32)
        assert served == kernels_of_three
        assert y.dtype == dtype
        codes = 0.02 if "tokens" in served else 0.0  # activations have 8 or 4 bits
        tolerance = ROUNDING[dtype] + (codes if options.get("bits") != 4 else 15 * codes)
        assert error(y, F.linear(x.double(), weight_OI)) < tolerance
