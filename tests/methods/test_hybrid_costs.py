"""The knapsack against all possible choices, and costs against the KL that they measure or
predict.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener
from llq_hf.methods.hybrid.costs import Measured, Predicted, observe, output_gradients
from llq_hf.methods.hybrid.knapsack import Option, knapsack
from llq_hf.models.decoder import quantizable
from llq_hf.models.sequences import TextSequences
from llq_hf.numerics.stats import Hessian


def some_units(seed: int, step: int) -> list[list[Option]]:
    random = torch.Generator().manual_seed(seed)
    units = []
    for _ in range(6):
        bits = torch.randint(1, 40, (3,), generator=random) * step
        losses = torch.rand(3, generator=random, dtype=torch.float64)
        units.append([Option(int(b), float(loss)) for b, loss in zip(bits, losses, strict=True)])
    return units


def brute(units: list[list[Option]], budget: int) -> float:
    """The least loss of all choices within the budget."""
    totals = (
        [sum(option.bits for option in choice), sum(option.loss for option in choice)]
        for choice in itertools.product(*units)
    )
    return min(loss for bits, loss in totals if bits <= budget)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("step", [1, 4096])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.5])
def test_the_knapsack_finds_the_best_of_all_choices(seed: int, step: int, share: float):
    units = some_units(seed, step)
    cheapest, dearest = (
        sum(pick(option.bits for option in unit) for unit in units) for pick in (min, max)
    )
    budget = cheapest + int(share * (dearest - cheapest))
    chosen = [unit[pick] for unit, pick in zip(units, knapsack(units, budget), strict=True)]
    assert sum(option.bits for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == pytest.approx(brute(units, budget))


def test_with_few_buckets_the_budget_still_holds(monkeypatch: pytest.MonkeyPatch):
    # Not by its dotted name: in the package, `knapsack` is the function.
    monkeypatch.setattr(sys.modules[knapsack.__module__], "BUCKETS", 16)
    for seed in range(8):
        units = some_units(seed, 1)
        budget = sum(min(option.bits for option in unit) for unit in units) + 61
        chosen = [unit[pick] for unit, pick in zip(units, knapsack(units, budget), strict=True)]
        assert sum(option.bits for option in chosen) <= budget
        assert sum(option.loss for option in chosen) <= 1.3 * brute(units, budget)


def test_a_budget_below_the_cheapest_is_refused():
    with pytest.raises(LLQError, match="below the 7 of the cheapest"):
        knapsack([[Option(3, 0.1), Option(9, 0.0)], [Option(4, 0.1)]], 6)


def test_the_gradients_are_those_of_the_model_s_own_draws(
    tiny_llama: Path, calibration_ids: Tensor
):
    """Compared with a loop that asks autograd for one linear's output."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    linears = quantizable(model)
    ids_NS = calibration_ids[:2, :6]
    found = output_gradients(model, linears, TextSequences(ids_NS), 3, PassListener())
    name, random = "model.layers.0.mlp.up_proj", torch.Generator().manual_seed(3)
    model.requires_grad_(True)
    total_O = torch.zeros(linears[name].out_features)
    for row_S in ids_NS:
        outputs: list[Tensor] = []
        handle = linears[name].register_forward_hook(
            lambda m, a, output, kept=outputs: kept.append(output)
        )
        logits_SV = model(row_S[None]).logits[0]
        handle.remove()
        drawn_S = torch.multinomial(logits_SV.detach().softmax(-1), 1, generator=random)[:, 0]
        loss = -sum(logits_SV.log_softmax(-1)[t, token] for t, token in enumerate(drawn_S.tolist()))
        (slope_1SO,) = torch.autograd.grad(loss, outputs[0])
        total_O += slope_1SO[0].square().sum(0)
    assert torch.allclose(found[name], total_O / ids_NS.numel(), rtol=1e-3)


@torch.no_grad()
def test_costs_are_the_divergence_measured_and_predicted(tiny_llama: Path, calibration_ids: Tensor):
    """For small random changes of one linear, the measured cost is the literal KL.

    The predicted one is within a factor of 2 of it.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    linears, listener = quantizable(model), PassListener()
    data = TextSequences(calibration_ids)
    names = [
        f"model.layers.{layer}.{linear}"
        for layer in (0, 1)
        for linear in ("self_attn.o_proj", "mlp.down_proj")
    ]
    with torch.enable_grad():
        predict = Predicted(model, linears, data, 0, listener)
    measure = Measured(model, data, listener)
    stats = observe(model, {name: [Hessian] for name in names}, data, listener)
    before = model(calibration_ids).logits.log_softmax(-1)
    for scale, name in zip((0.01, 0.02, 0.04, 0.08), names, strict=True):
        weight_OI, random = linears[name].weight.clone(), torch.Generator().manual_seed(5)
        changed_OI = weight_OI + scale * weight_OI.std() * torch.randn(
            weight_OI.shape, generator=random
        )
        predicted, measured = (cost({name: changed_OI}, stats[name]) for cost in (predict, measure))
        assert torch.equal(linears[name].weight, weight_OI), "a cost leaves the model as it was"
        linears[name].weight.copy_(changed_OI)
        after = model(calibration_ids).logits.log_softmax(-1)
        linears[name].weight.copy_(weight_OI)
        assert measured == pytest.approx(
            float((before.exp() * (before - after)).sum(-1).mean()), rel=0.02
        )
        assert 0.5 < predicted / measured < 2


def test_measuring_keeps_within_its_memory(
    tiny_llama: Path, calibration_ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    one = model(calibration_ids[:1]).logits.numel() * 4
    monkeypatch.setattr(Measured, "BYTES", 3 * one)
    measured = Measured(model, TextSequences(calibration_ids), PassListener())
    assert len(measured.full) == 3
