"""Deliberate faults: each must make the checks of this folder fail, or the suite would not notice
what a GPU refuses, or what makes it slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from device import checks
from device.ceilings import DECODERS, SOLVERS, Decoder, Solver
from device.measure import with_ceilings
from device.pretended import needs_cuda_build
from torch import Tensor

from llq_hf.method import Packed
from llq_hf.methods import METHODS

pytestmark = needs_cuda_build


def row(rows: tuple[Any, ...], method: str) -> Any:
    return next(row for row in rows if row.method == method)


# --- in a step of decoding ------------------------------------------------------------------------

DECODING_FAULTS: dict[str, tuple[Callable[[Tensor, Packed], object], str]] = {
    "a product of two devices": (lambda x, packed: x * torch.ones(x.shape[-1]), "cuda:0 and cpu"),
    "a value that is read": (lambda x, packed: x.sum().item(), "waits for the GPU: 1 x"),
    "a comparison of tensors": (lambda x, packed: bool((x > 0).all()), "waits for the GPU: 1 x"),
    "a tensor that is sent": (
        lambda x, packed: x * torch.tensor([2.0], device=x.device),
        "sends tensors: 1 x",
    ),
    "a product of integers": (lambda x, packed: x.int() @ x.int().T, "no kernel for CUDA"),
    "a launch more": (lambda x, packed: x + 1, "launches: measured"),
    "a matrix more": (lambda x, packed: x.new_zeros(64, 512, dtype=torch.float32), "moved: meas"),
}


@pytest.mark.parametrize(("fault", "words"), DECODING_FAULTS.values(), ids=DECODING_FAULTS)
def test_a_fault_in_decoding(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor, Packed], object], words: str
):
    decoder: Decoder = replace(row(DECODERS, "rtn"), kernels=False)
    gpu, _ = checks.decoding(decoder)
    tight = with_ceilings(decoder, checks.decoder_costs(gpu))
    checks.check_decoding(tight)
    linear = METHODS["rtn"].linear

    def faulty(self: Any, x: Tensor, packed: Packed, bias: Any, out_features: int) -> Tensor:
        fault(x, packed)
        return linear(self, x, packed, bias, out_features)

    monkeypatch.setattr(METHODS["rtn"], "linear", faulty)
    with pytest.raises((AssertionError, RuntimeError), match=words):
        checks.check_decoding(tight)


# --- in a solver ----------------------------------------------------------------------------------


def a_launch_a_column_more(weight_OI: Tensor) -> None:
    for weight_O in weight_OI.T:
        weight_O + 1


def changed_last_bits(weight_OI: Tensor) -> None:
    weight_OI *= 1 + 2**-8


SOLVER_FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a launch a column more": (a_launch_a_column_more, "column: measured"),
    "many launches a linear more": (
        lambda weight_OI: [weight_OI + 1 for _ in range(100)],
        "block: measured",
    ),
    "a sum by atomics": (
        lambda weight_OI: torch.zeros_like(weight_OI).index_add_(
            1, torch.zeros(weight_OI.shape[1], dtype=torch.long, device=weight_OI.device), weight_OI
        ),
        "by atomics",
    ),
    "values that are read": (
        lambda weight_OI: [weight_OI[0, i].item() for i in range(8)],
        "syncs: measured",
    ),
    "tensors that are sent": (
        lambda weight_OI: [torch.ones(3).to(weight_OI.device) for _ in range(2)],
        "uploads: measured",
    ),
    "random numbers of the GPU": (lambda weight_OI: torch.rand_like(weight_OI), "other numbers"),
    "a mask of the CPU": (
        lambda weight_OI: torch.where(torch.ones(weight_OI.shape) > 0, weight_OI, 0),
        "cuda:0 and cpu",
    ),
    "other values on a GPU": (
        lambda weight_OI: changed_last_bits(weight_OI) if weight_OI.is_cuda else None,
        "is not what it is on a CPU",
    ),
}


@pytest.mark.parametrize(("fault", "words"), SOLVER_FAULTS.values(), ids=SOLVER_FAULTS)
def test_a_fault_in_a_solver(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], object], words: str
):
    solver: Solver = row(SOLVERS, "rtn")
    tight = with_ceilings(solver, checks.solver_costs(solver)[0])
    quantize = METHODS["rtn"].quantize

    def faulty(self: Any, weight_OI: Tensor, stat: Any, job: Any) -> Packed:
        fault(weight_OI)
        return quantize(self, weight_OI, stat, job)

    monkeypatch.setattr(METHODS["rtn"], "quantize", faulty)
    with pytest.raises((AssertionError, RuntimeError), match=words):
        checks.check_quantizing(tight)


def test_a_message_holds_the_measured_number_and_its_lines():
    solver: Solver = replace(row(SOLVERS, "rtn"), block=1)
    with pytest.raises(AssertionError, match=r"block: measured \d+, ceiling 1\b.*bitpack\.py:"):
        checks.check_quantizing(solver)
