"""Weights of every storage with random bits, and the rows of the GPU kernels as rows for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llq_hf.kernels import dispatch
from llq_hf.kernels.gpu import rows, turns
from llq_hf.kernels.rows import Row
from llq_hf.method import Method, Packed

# Options, and the kernels that serve 3 tokens of bf16.
METHODS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rtn", {"bits": 3}, ["uniform"]),
    ("gptq", {"bits": 4, "act_order": True}, ["uniform"]),
    ("gptq", {"bits": 4, "group_size": 32}, ["uniform"]),
    ("gptq", {"bits": 4, "group_size": 48}, ["multiply"]),
    ("awq", {"bits": 4}, ["uniform"]),
    ("efficient_qat", {"bits": 2}, ["uniform"]),
    ("quip", {"bits": 2}, ["transform", "uniform", "transform"]),
    ("quip", {"bits": 2, "incoherence": False}, ["uniform"]),
    ("spinquant", {"bits": 4}, ["uniform"]),
    ("omniquant", {"bits": 2}, ["uniform"]),
    ("smoothquant", {"bits": 8, "a_bits": 16}, ["uniform"]),
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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_packed(method: Method, out_features: int, in_features: int) -> Packed:
    """Random tensors of a method's layout, valid where not all values are."""
    random, packed = generator(5), {}
    for key, spec in method.layout(out_features, in_features).items():
        if key == "order":
            packed[key] = torch.randperm(in_features, generator=random).to(spec.dtype)
        elif key == "widths":
            cycle = torch.tensor([0, -1, 0, 1]) + int(method.bits)
            packed[key] = cycle.repeat(-(-spec.shape[0] // 4))[: spec.shape[0]].to(spec.dtype)
        elif spec.dtype.is_floating_point:
            packed[key] = (torch.rand(spec.shape, generator=random) + 0.5).to(spec.dtype)
        elif key == "seeds":
            packed[key] = torch.randint(0, 2**31 - 1, spec.shape, generator=random).to(spec.dtype)
        else:
            info = torch.iinfo(spec.dtype)
            bits = torch.randint(info.min, info.max, spec.shape, generator=random)
            packed[key] = bits.to(spec.dtype)
    if "position" in packed:  # a list of positions: only one that belongs to a mask can be read
        positions = method._positions(out_features, in_features)
        mask_N = torch.zeros(positions.total, dtype=torch.bool)
        mask_N[torch.randperm(positions.total, generator=random)[: positions.count]] = True
        packed.update(positions.pack(mask_N))
    return packed


def use_gpu_rows(monkeypatch: Any) -> list[str]:
    """Let the GPU's rows alone serve tensors on the CPU. Returns the names of those called."""
    served: list[str] = []

    def counted(row: Row) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            served.append(row.kernel.__name__)
            return row.kernel(*args, **more)

        return call

    monkeypatch.setattr(rows, "_there", lambda stored: True)
    always: dict[Any, Callable[[Any], bool]] = {
        turns.transform: lambda by: True,
        rows.decode.multiply: lambda stored: row_fits(stored),
    }

    def row_fits(stored: Any) -> bool:
        checks = {"TableCodes": rows._table, "SalientCodes": rows._short_rows}
        return bool(checks.get(type(stored).__name__, lambda stored: True)(stored))

    monkeypatch.setattr(
        dispatch,
        "TABLE",
        tuple(
            row._replace(
                device="cpu",
                available=lambda: True,
                fits=always.get(row.kernel.__wrapped__, row.fits),
                kernel=counted(row),
            )
            for row in rows.ROWS
        ),
    )
    return served


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())
