"""Quantizing on a GPU: the bytes of the CPU, few launches, few waits of the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device import checks
from device.ceilings import SOLVERS, Solver
from device.pretended import PretendedGPU, exact_attention, needs_cuda_build

from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.options import RunOptions
from llq_hf.methods import METHODS, build

pytestmark = needs_cuda_build


def test_every_method_has_a_row():
    assert {solver.method for solver in SOLVERS} == set(METHODS)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(
            row,
            id=str(row),
            marks=pytest.mark.xfail(bool(row.fails), reason=row.fails, strict=False),
        )
        for row in SOLVERS
    ],
)
def test_a_block_in_memory(solver: Solver):
    checks.check_quantizing(solver)


# --- a checkpoint on disk -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(
        hidden_size=32,
        intermediate_size=72,
        num_attention_heads=2,
        num_key_value_heads=1,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("gptq", 3, {"group_size": 16, "act_order": True}),
        ("quip", 2, {}),
        ("pb_llm", 1.7, {}),
        ("omniquant", 4, {"epochs": 1}),
        (
            "spinquant",
            4,
            {"rotations": "learned", "learn_steps": 1, "w_clip": False},
        ),  # on the whole model
        ("efficient_qat", 2, {"epochs": 1, "tune_batch": 4}),  # tunes the whole model
        ("nf4", 4, {"icq": True, "tau_steps": 10}),
        ("hybrid", 3, {"candidates": "rtn:2+rtn:4", "samples": 2}),
    ],
)
@exact_attention()
def test_a_streamed_run_writes_the_bytes_of_the_cpu(
    base: Path,
    calibration_npy: Path,
    tmp_path: Path,
    name: str,
    bits: float,
    options: dict[str, Any],
):
    method, data = build(name, bits=bits, **options), Calibration(str(calibration_npy), samples=4)
    quantize_checkpoint(str(base), tmp_path / "cpu", method, data)
    with PretendedGPU() as gpu:
        run = RunOptions(device=checks.GPU)
        quantize_checkpoint(str(base), tmp_path / "gpu", method, data, run)
    assert gpu.faults == []
    assert gpu.launches.total() > 1000
    cpu, far = (stored(tmp_path / folder) for folder in ("cpu", "gpu"))
    assert cpu
    assert far == cpu


def stored(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


# --- several GPUs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("rtn", 4, {}),
        ("gptq", 4, {}),
        ("awq", 4, {"ratios": 2}),
        ("omniquant", 4, {"epochs": 1}),
    ],
    ids=["rtn", "gptq", "awq", "omniquant"],
)
@exact_attention()
def test_a_dense_model_over_two_gpus(name: str, bits: float, options: dict[str, Any]):
    """Each block stays where it is, and gets the bytes of the CPU."""
    method, cpu, far = (
        build(name, bits=bits, **options),
        checks.llama(layers=2),
        checks.llama(layers=2),
    )
    quantize_model(cpu, method, checks.ids())
    with PretendedGPU() as gpu:
        quantize_model(checks.spread(far), method, checks.ids())
    found = checks.packed_tensors(far)
    checks.check_same(found, checks.packed_tensors(cpu))
    for key, tensor in found.items():
        assert str(tensor.device) == ("cuda:1" if ".layers.1." in key else "cuda:0")
    assert gpu.faults == []
