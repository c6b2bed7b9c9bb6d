"""Weights of every storage with random bits, and the rows of the GPU kernels as rows for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from contract.random_weights import error, generator, random_packed
from torch import Tensor
from torch.nn import functional as F

from llq_hf.kernels import CachedTensors, dispatch
from llq_hf.kernels.gpu import rows
from llq_hf.kernels.rows import Row
from llq_hf.kernels.views import View
from llq_hf.method import Method, Packed
from llq_hf.methods import build

# Options, and the kernels that serve 3 tokens of bf16.
METHODS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rtn", {"bits": 3}, ["uniform"]),
    ("gptq", {"bits": 4, "act_order": True}, ["uniform"]),
    ("gptq", {"bits": 4, "group_size": 32}, ["uniform"]),
    ("gptq", {"bits": 4, "group_size": 48}, ["multiply"]),
    ("awq", {"bits": 4}, ["divided", "uniform"]),
    ("efficient_qat", {"bits": 2}, ["uniform"]),
    ("quip", {"bits": 2}, ["transform", "uniform", "transform"]),
    ("quip", {"bits": 2, "incoherence": False}, ["divided", "uniform"]),
    ("spinquant", {"bits": 4}, ["uniform"]),
    ("omniquant", {"bits": 2}, ["uniform"]),
    ("smoothquant", {"bits": 8, "a_bits": 16}, ["divided", "uniform"]),
    ("smoothquant", {"bits": 8}, ["tokens", "uniform_codes"]),
    ("smoothquant", {"bits": 4}, ["tokens", "uniform_codes"]),
    ("slim_llm", {"bits": 2}, ["uniform"]),
    ("slim_llm", {"bits": 4, "group_size": 256, "scale_bits": 32}, ["uniform"]),
    ("slim_llm", {"bits": 3, "group_size": 64}, []),
    ("db_llm", {}, ["levels"]),
    ("db_llm", {"group_size": 64}, ["levels"]),
    ("db_llm", {"group_size": -1, "scale_bits": 32}, ["multiply"]),
    ("billm", {}, ["levels"]),
    ("billm", {"block_size": 256}, ["levels"]),
    ("billm", {"scale_bits": 32}, ["multiply"]),
    ("pb_llm", {"bits": 1.7}, ["multiply_salient"]),
    ("pb_llm", {"bits": 2.0, "group_size": -1}, ["multiply_salient"]),
    ("nf4", {}, ["table"]),
    ("nf4", {"bits": 3}, ["multiply"]),
    ("nf4", {"icq": True, "block_size": 128}, ["table"]),
    ("nf4", {"double_quant": False, "block_size": 32}, ["table"]),
]


# Of inputs, levels and y, relative; fp32: of sums.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}


class Linear(NamedTuple):
    """A method's packed linear with random bits, and the weight that torch decodes."""

    method: Method
    packed: Packed
    weight_OI: Tensor
    tolerance: float  # beyond rounding: of activations with 8 or 4 bits

    @classmethod
    def of(cls, name: str, options: dict[str, Any], rows: int, kernels: list[str]) -> Linear:
        """kernels: that serve 3 tokens, of `METHODS`."""
        columns = 768 if "48" in str(options) else 1024
        method = build(name, **options)
        packed = random_packed(method, rows, columns)
        weight_OI = method.dequantize(packed, rows, columns).double()
        coarse = 15 if options.get("bits") == 4 else 1
        return cls(method, packed, weight_OI, 0.02 * coarse if "tokens" in kernels else 0.0)

    def check(self, tokens: int, dtype: torch.dtype, device: str = "cpu") -> None:
        """The product is that of the decoded weight, in the dtype of the activations."""
        rows, columns = self.weight_OI.shape
        x = torch.randn(tokens, columns, generator=generator(tokens)).to(dtype)
        there = CachedTensors({key: tensor.to(device) for key, tensor in self.packed.items()})
        with torch.no_grad():
            y = self.method.linear(x.to(device), there, None, rows).cpu()
        assert y.dtype == dtype
        expected = F.linear(x.double(), self.weight_OI)
        assert error(y, expected) < ROUNDING[dtype] + self.tolerance


def anywhere(view: View) -> bool:
    return True


def use_gpu_rows(monkeypatch: Any) -> list[str]:
    """Let the GPU's rows alone serve tensors on the CPU. Returns the names of those called."""
    served: list[str] = []

    def counted(row: Row) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            served.append(row.kernel.__name__)
            return row.kernel(*args, **more)

        return call

    there = rows._there
    monkeypatch.setattr(rows, "_there", anywhere)
    monkeypatch.setattr(
        dispatch,
        "TABLE",
        tuple(
            row._replace(
                device="cpu",
                available=lambda: True,
                fits=anywhere if row.fits is there else row.fits,
                kernel=counted(row),
            )
            for row in rows.ROWS
        ),
    )
    return served
