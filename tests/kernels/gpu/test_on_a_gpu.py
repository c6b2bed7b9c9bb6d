"""The compiled kernels on a real GPU against torch on the CPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from storages import METHODS, ROUNDING, Linear

from llq_hf.kernels.gpu import ready

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ready.problem() is not None,
    reason="there is no GPU that the kernels run on",
)


@pytest.mark.parametrize(("name", "options", "kernels"), METHODS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_methods_multiply_what_they_dequantize(
    name: str, options: dict[str, Any], kernels: list[str], dtype: torch.dtype, tokens: int
):
    Linear.of(name, options, 64, kernels).check(tokens, dtype, "cuda")
