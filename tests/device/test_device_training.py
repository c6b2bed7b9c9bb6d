"""A LoRA step on a GPU: an adapter on a packed model trains there, and the host neither waits nor
sends anything.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import checks
from device.ceilings import SOLVERS, Solver
from device.pretended import PretendedGPU, exact_attention, near, needs_cuda_build
from peft import LoraConfig, get_peft_model
from torch import Tensor

from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels import reference
from llq_hf.methods import METHODS

pytestmark = needs_cuda_build

each_method = pytest.mark.parametrize(
    "solver", [next(row for row in SOLVERS if row.method == name) for name in METHODS], ids=METHODS
)


def adapted(model: Any) -> Any:
    """The packed model with an adapter, whose numbers are the same at each call."""
    linears = {name.rpartition(".")[2] for name in checks.packed_linears(model)}
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=sorted(linears), task_type="CAUSAL_LM")
    lora = get_peft_model(model, config)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # else the gradients of every A are zero
            torch.nn.init.normal_(parameter, std=0.1)
    return lora


def step(model: Any, ids_BS: Tensor) -> dict[str, Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def second_step(model: Any) -> dict[str, Tensor]:
    """The gradients on a GPU. What is computed once for a linear is there by the second step."""
    with PretendedGPU() as gpu:
        ids_BS = checks.ids().to(checks.GPU)
        step(model.to(checks.GPU), ids_BS)
        gpu.reset()
        found = step(model, ids_BS)
    checks.check_idle_host(gpu)
    return found


@each_method
@exact_attention()
def test_a_step(solver: Solver):
    packed = checks.llama()
    quantize_model(packed, solver.build(), checks.ids())
    model = adapted(packed)
    twin = copy.deepcopy(model)
    with reference():
        expected = step(model, checks.ids())
        found = second_step(twin)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7
    for name, gradient in found.items():
        error = (near(gradient) - expected[name]).norm()
        assert error <= 1e-2 * expected[name].norm(), name  # activations are bf16
    with checks.kernels():
        assert second_step(model).keys() == expected.keys()
