"""Every method's linear by the rows of the GPU kernels: few tokens in the emulator, what is beside
them in Triton's interpreter. test_interpreter.py runs this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from storages import METHODS, Linear, use_gpu_rows


@pytest.mark.parametrize(("name", "options", "kernels"), METHODS, ids=str)
def test_methods_multiply_what_they_dequantize(
    emulated: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    kernels: list[str],
):
    served = use_gpu_rows(monkeypatch)
    linear = Linear.of(name, options, 32, kernels)
    for dtype in (torch.bfloat16, torch.float16):
        served.clear()
        linear.check(3, dtype)
        assert served == kernels
