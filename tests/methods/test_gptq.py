"""GPTQ: equal to the literal solver, its order of columns and of linears, its ladder of damping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import checks
from reference.gptq import gptq

from llq_hf.common.errors import LLQError
from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels.bitpack import unpack
from llq_hf.method import Flow, Job, stored_bits
from llq_hf.methods import build
from llq_hf.numerics.aim import aimed
from llq_hf.numerics.cholesky import factorize
from llq_hf.numerics.error_feedback import by_columns
from llq_hf.numerics.stats import PairedHessian

VARIANTS = {
    "one group a row": {"group_size": -1},
    "symmetric": {"group_size": -1, "sym": True},
    "groups of 16 that see stale weights": {"group_size": 16},
    "groups of 48 that do not divide": {"group_size": 48},
    "symmetric groups of 128": {"group_size": 128, "sym": True},
    "act order": {"group_size": -1, "act_order": True},
    "act order in groups of 16": {"group_size": 16, "act_order": True},
    "static groups of 16": {"group_size": 16, "static_groups": True},
    "act order in static groups of 16": {
        "group_size": 16,
        "static_groups": True,
        "act_order": True,
    },
    "static but one group a row": {"group_size": -1, "static_groups": True, "act_order": True},
    "group-aware order in groups of 16": {"group_size": 16, "act_group_aware": True},
    "group-aware order in groups of 48 that do not divide": {
        "group_size": 48,
        "act_group_aware": True,
    },
    "group-aware order, one group a row": {"group_size": -1, "act_group_aware": True},
    "aiming at other outputs": {"group_size": 16, "gptaq": 0.25},
    "aiming at other outputs in group-aware order": {
        "group_size": 48,
        "gptaq": 1.0,
        "act_group_aware": True,
    },
    "half the damping": {"group_size": 32, "damp": 0.005},
}


def well_conditioned(in_features: int, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Inputs [T, I] with correlations but no tiny eigenvalue, so that fp32 and fp64 round alike."""
    random = torch.Generator().manual_seed(in_features)
    mix_II = (
        torch.eye(in_features)
        + 0.3 * torch.randn(in_features, in_features, generator=random) / in_features**0.5
    )
    x_TI = torch.randn(4 * in_features, in_features, generator=random) @ mix_II
    # All diagonals of H differ: one act order
    x_TI *= 0.5 + torch.rand(in_features, generator=random)
    x_TI[:, list(dead)] = 0
    return x_TI


def hessian_of(x_TI: torch.Tensor) -> PairedHessian:
    """Of a linear whose inputs are a little off those of the full-precision model."""
    stat = PairedHessian(x_TI.shape[1], x_TI.device)
    stat.update(x_TI, 4)
    random = torch.Generator().manual_seed(5)
    stat.pair(x_TI, x_TI + 0.1 * torch.randn(x_TI.shape, generator=random) * x_TI.abs().amax(0))
    return stat


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(16, 32), (12, 160)], ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dead", [(), (3, 20)], ids=["all channels alive", "dead channels"])
def test_equals_the_literal_solver(
    options: dict, shape: tuple[int, int], bits: int, dead: tuple[int, ...]
):
    weight_OI, x_TI = checks.weight(*shape), well_conditioned(shape[1], dead)
    method, job = build("gptq", bits=bits, scale_bits=32, **options), checks.job()
    packed = method.quantize(weight_OI, hessian_of(x_TI), job)
    assert job.notes["dead_columns"] == len(dead)
    assert job.notes["damp"] == method.damp
    stat = hessian_of(x_TI)
    restored, codes, order = gptq(
        weight_OI.numpy(),
        stat.H_II.numpy(),
        bits,
        cross=stat.C_II.numpy(),
        **options,
        scale_bits=32,
    )
    mine = unpack(packed["weight"], bits, shape[1]).numpy()
    if "order" in packed:
        alive = [i for i in order if i not in dead]
        assert [i for i in packed["order"].tolist() if i not in dead] == alive
    else:
        back = np.empty_like(codes)
        back[:, order] = codes
        codes = back
    assert (mine != codes).mean() <= 0.002, "a tie or two may round differently in fp32"
    restored_OI = checks.restore(method, packed, weight_OI)
    off = (restored_OI.double() - torch.from_numpy(restored)).abs() > 1e-5
    assert off.double().mean() <= 0.002


@pytest.mark.parametrize(
    ("name", "order"),
    [("gptq", "act_group_aware"), ("slim_llm", "act_group_aware"), ("spinquant", "act_order")],
)
@pytest.mark.parametrize("refine", [0, 2])
def test_to_aim_is_to_solve_for_another_weight(name: str, order: str, refine: int):
    """The codes are those of the aimed weight, solved and refined without a second model."""
    weight_OI, x_TI = checks.weight(12, 160), well_conditioned(160, (3, 20))
    options = {"bits": 3, "group_size": 32, "refine": refine, order: True}
    aiming, plain = build(name, aim=0.5, **options), build(name, **options)
    stat = hessian_of(x_TI)
    other_OI = aimed(weight_OI, stat, 0.5)
    assert (other_OI - weight_OI).norm() > 0.01 * weight_OI.norm()

    def packed(method: Any, weight_OI: torch.Tensor) -> Any:
        if name == "slim_llm":
            return method._quantize_linear(weight_OI, hessian_of(x_TI), 0, checks.job())
        return method.quantize(weight_OI, hessian_of(x_TI), checks.job())

    checks.check_same_bits(packed(aiming, weight_OI), packed(plain, other_OI))
    assert (aiming.flow, plain.flow) == (Flow.BOTH, Flow.QUANTIZED)


def test_without_a_factor_it_is_rtn():
    """The fallback is the very codes of RTN, and is noted."""
    weight_OI = checks.weight(8, 40)
    stat = PairedHessian(40, torch.device("cpu"))
    stat.sum_II, stat.sequences = -torch.eye(40) * 1e6 + torch.ones(40, 40), 1
    for aim, options in (
        (0.0, {"group_size": 16}),
        (0.5, {"group_size": 16}),
        (0.5, {"group_size": -1, "sym": True}),
    ):
        job = checks.job()
        packed = build("gptq", bits=3, aim=aim, **options).quantize(weight_OI, stat, job)
        assert job.notes["fallback"] == "rtn"
        checks.check_same_bits(packed, checks.quantize(build("rtn", bits=3, **options), weight_OI))


def test_a_repair_that_overflows_is_an_error():
    """uint8 codes cannot show that the values they were rounded from are none."""
    W_OI, U_II = torch.full((4, 200), 10.0), torch.eye(200)
    U_II[0, 5:], U_II[1, 5:] = 3e38, -3e38  # one infinity, and then the other
    with pytest.raises(LLQError, match="overflows fp32"):
        by_columns(W_OI, U_II, lambda j, w_O: torch.zeros_like(w_O))


@pytest.mark.parametrize("name", ["gptq", "slim_llm"])
def test_a_scale_that_fp16_cannot_hold_is_refused_after_the_feedback(name: str):
    """The error says so, and not that the feedback overflows."""
    with pytest.raises(LLQError, match="too large"):
        checks.quantize(build(name, bits=3, group_size=16), checks.weight(4, 64) * 1e9)


def test_the_damping_ladder_is_climbed_and_noted():
    """A Hessian of rank 1 with no damping asked for cannot be factorized as it is."""
    x_TI = torch.ones(4, 64) * torch.linspace(1, 2, 64)
    for name in ("gptq", "quip"):
        job = Job("x")
        method = build(name, bits=4, damp=0.01)
        packed = method.quantize(checks.weight(8, 64), hessian_of(x_TI), job)
        assert "fallback" not in job.notes
        assert job.notes["damp"] >= 0.01
        assert torch.isfinite(checks.restore(method, packed, checks.weight(8, 64))).all()
    notes: dict = {}
    H_II = -0.3 * torch.eye(6) + torch.ones(6, 6)  # five eigenvalues of -0.3, mean diagonal 0.7
    assert factorize(H_II, 0.01, notes, inverse=True) is not None
    assert notes["damp"] == pytest.approx(0.64)  # the first rung with 0.7 * damp > 0.3
    assert factorize(H_II * float("nan"), 0.01, {}, inverse=True) is None


def test_act_order_stores_the_order_in_16_bits_and_static_groups_store_none():
    assert "order" not in build("gptq", act_order=True, static_groups=True).layout(8, 256)
    assert build("gptq", act_order=True).layout(8, 256)["order"].dtype == torch.int16
    assert build("gptq", act_order=True).layout(8, 1 << 15)["order"].dtype == torch.int32
    stored = stored_bits(build("gptq", bits=4, act_order=True).layout(4096, 4096), 4096, 4096)
    assert stored == pytest.approx(4 + 20 / 128 + 16 / 4096)


def test_true_sequential_sees_what_the_previous_group_left(
    tiny_llama, calibration_ids, monkeypatch
):
    """q, k, v, then o, gate and up, down: o's Hessian comes from quantized q, k, v; without the
    option it does not.
    """
    from transformers import AutoModelForCausalLM

    from llq_hf.methods.gptq import GPTQ

    seen: dict[str, list[str]] = {}
    hessians: dict[tuple[bool, str], torch.Tensor] = {}
    original = GPTQ.quantize

    def spy(self, weight_OI, stat, job):
        seen.setdefault(str(self.true_sequential), []).append(job.name)
        hessians[self.true_sequential, job.name] = stat.sum_II.clone()
        return original(self, weight_OI, stat, job)

    monkeypatch.setattr(GPTQ, "quantize", spy)
    for sequential in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize_model(model, build("gptq", bits=2, true_sequential=sequential), calibration_ids)
    block = "model.layers.0."
    names = [name.removeprefix(block) for name in seen["True"] if name.startswith(block)]
    assert {*names[:3]} == {f"self_attn.{p}_proj" for p in "qkv"}
    assert names[3] == "self_attn.o_proj"
    assert {*names[4:6]} == {"mlp.gate_proj", "mlp.up_proj"}
    assert names[6] == "mlp.down_proj"
    for name, same in (
        ("self_attn.q_proj", True),
        ("self_attn.o_proj", False),
        ("mlp.down_proj", False),
    ):
        assert torch.equal(hessians[False, block + name], hessians[True, block + name]) is same, (
            name
        )
    # the next block sees quantized predecessors either way
    assert not torch.equal(
        hessians[False, "model.layers.1.self_attn.q_proj"],
        hessians[True, "model.layers.1.self_attn.q_proj"],
    )
