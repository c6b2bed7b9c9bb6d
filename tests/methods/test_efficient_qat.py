"""EfficientQAT: equal to its literal training, starts that keep codes, scales alone in E2E-QP, runs
that are killed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import checks
from reference.efficient_qat import block_ap, value
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llq_hf.checkpoints.packed import read_report
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.blocks import LiveBlocks
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.walk import walk
from llq_hf.kernels.bitpack import unpack
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import State, Step, stored_bits
from llq_hf.methods import build
from llq_hf.methods.efficient_qat import EfficientQAT, UniformLinear, _Linear, divergence
from llq_hf.numerics.grids import Grid

FAST: dict[str, Any] = {
    "epochs": 2,
    "weight_lr": 5e-3,
    "grid_lr": 1e-3,
    "relative": True,
    "tune_batch": 4,
}


def test_stored_bits_are_those_of_the_paper():
    for bits, size, expected in ((2, 64, 2.28), (2, 128, 2.14), (3, 128, 3.15), (4, 128, 4.16)):
        layout = build("efficient_qat", bits=bits, group_size=size).layout(4096, 4096)
        assert stored_bits(layout, 4096, 4096) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_forward_pass_and_its_gradients_are_the_formula(bits: int):
    """Of every weight, scale and zero point, some of them outside the code range; against loops."""
    random = torch.Generator().manual_seed(bits)
    weight_OI = torch.randn(5, 12, generator=random)
    scale_OG = torch.tensor([0.1, 0.5, 1.0]).expand(5, 3).half().float()
    zero_OG = torch.tensor([[0.4, 1.6, 2.2]]).expand(5, 3) * (2**bits - 1) / 3 - 0.3
    slope_OI = torch.randn(5, 12, generator=random)
    part = _Linear(
        weight_OI, Grid(scale_OG, zero_OG), None, build("efficient_qat", bits=bits, group_size=4)
    )
    restored_OI = part(torch.eye(12)).T
    (restored_OI * slope_OI).sum().backward()
    for o in range(5):
        for k in range(3):
            by_scale = by_zero = 0.0
            for i in range(4 * k, 4 * k + 4):
                s, z = float(scale_OG[o, k]), float(zero_OG[o, k])
                _, found, by = value(float(weight_OI[o, i]), s, z, bits)
                assert float(restored_OI[o, i].detach()) == pytest.approx(found, abs=1e-6)
                slope = float(slope_OI[o, i])
                gradient = float(part.weight_OGg.grad[o, k, i - 4 * k])
                assert gradient == pytest.approx(slope * by[0], abs=1e-5)
                by_scale, by_zero = by_scale + slope * by[1], by_zero + slope * by[2]
            assert float(part.scale_OG1.grad[o, k]) == pytest.approx(by_scale, abs=1e-4)
            assert float(part.zero_OG1.grad[o, k]) == pytest.approx(by_zero, abs=1e-4)


VARIANTS = {
    "one group a row": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "groups of 12 that do not divide": {"group_size": 12},
    "one at a time": {"group_size": 16, "batch": 1},
    "relative": {"group_size": 12, "relative": True, "weight_lr": 0.02, "grid_lr": 0.01},
    "no training": {"group_size": 16, "epochs": 0},
}


class Parted(checks.Data):
    """Calibration data whose targets are not what the block makes of its inputs: two streams that
    have parted.
    """

    def targets(self, rows: slice) -> Tensor:
        return super().targets(rows) + 0.3 * torch.sin(
            50 * self.x_NSI[rows][..., : len(self.weight_OI)]
        )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_equals_the_literal_training(options: dict, bits: int):
    """Three sequences, two a step, four epochs; a code or two may round differently in fp32."""
    weight_OI, x_NSI = checks.weight(6, 32), checks.inputs(32)[:24].view(3, 8, 32) / 10
    settings = {
        "epochs": 4,
        "batch": 2,
        "weight_lr": 3e-3,
        "grid_lr": 2e-3,
        "relative": False,
        **options,
    }
    method = build("efficient_qat", bits=bits, **settings)
    step = replace(
        checks.step(method, weight_OI, x_NSI.flatten(0, 1)), data=Parted(x_NSI, weight_OI)
    )
    packed = method.quantize_block(step)["test"]
    targets = step.data.targets(slice(None)).numpy()
    codes, scales, zeros, losses = block_ap(
        weight_OI.numpy(), x_NSI.numpy(), targets, bits=bits, **settings
    )
    notes = step.jobs["test"].notes
    if losses:
        assert notes["first_loss"] == pytest.approx(losses[0], rel=1e-4)
        assert notes["last_loss"] == pytest.approx(losses[-1], rel=1e-3)
    assert np.allclose(packed["scale"].float(), scales, rtol=2e-3)
    assert np.array_equal(unpack(packed["zero"], bits, zeros.size).numpy(), zeros.flatten())
    assert (unpack(packed["weight"], bits, 32).numpy() != codes).mean() <= 0.01


def test_a_solved_start_has_the_codes_of_the_solver():
    """No training: the codes are those of GPTQ with the same options; each weight lies in its
    code's cell.
    """
    weight_OI, x_TI = checks.weight(48, 192), checks.inputs(192)
    start = build("efficient_qat", solved=True, epochs=0)
    same = {"search_range": True, "act_group_aware": True, "refine": 2}
    gptq = build("gptq", bits=2, group_size=64, **same)
    checks.check_same_bits(
        checks.quantize(start, weight_OI, x_TI), checks.quantize(gptq, weight_OI, x_TI)
    )


def test_training_lowers_the_output_error():
    still, trained = (
        checks.loss_of(
            build("efficient_qat", **{**FAST, "epochs": n}), checks.weight(), checks.inputs()
        )
        for n in (0, 30)
    )
    assert trained < 0.7 * still


def test_zero_points_move_only_through_clipped_weights_and_stay_codes():
    """All weights positive and far from zero: they are clipped at the upper end until the zero
    point is 0.
    """
    weight_OI = checks.weight(6, 64).abs() + 0.5
    packed = checks.quantize(build("efficient_qat", bits=4, group_size=32), weight_OI)
    assert not unpack(packed["zero"], 4, 12).any()


@torch.no_grad()
def test_a_loss_that_is_not_finite_is_an_error():
    weight_OI = checks.weight(8, 64)
    method = build("efficient_qat", epochs=2)
    step = replace(
        checks.step(method, weight_OI),
        data=checks.Data(torch.full((2, 4, 64), torch.inf), weight_OI),
    )
    with pytest.raises(
        LLQError, match=r"training loss of model.layers.0 is not finite in epoch 1; lower weight_lr"
    ):
        method.quantize_block(step)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits=5"),
        ({"epochs": -1}, "epochs=-1"),
        ({"batch": 0}, "batch=0"),
        ({"weight_lr": -0.1}, "weight_lr=-0.1"),
        ({"tune_epochs": -1}, "tune_epochs=-1"),
        ({"tune_batch": 0}, "tune_batch=0"),
        ({"refine": -1}, "refine=-1"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_options_are_checked(options: dict, words: str):
    with pytest.raises(LLQError, match=f"efficient_qat: .*{words}"):
        build("efficient_qat", **options)


# --- E2E-QP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [16, 24, -1])
def test_the_gradient_of_a_scale_is_that_of_the_restored_weight(group_size: int):
    weight_OI = checks.weight(6, 40)
    method = build("efficient_qat", bits=3, group_size=group_size, epochs=0, relative=True)
    packed = checks.quantize(method, weight_OI)
    part = UniformLinear(QuantLinear.from_packed(method, nn.Linear(40, 6), packed), method)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    part(x1).square().sum().backward()
    factor = torch.ones_like(packed["scale"], dtype=torch.float32).requires_grad_()
    scaled = {**packed, "scale": packed["scale"].float() * factor}
    grid = replace(method.grid, scale_bits=32)
    zero_OG = unpack(packed["zero"], 3, factor.numel()).view_as(factor).float()
    spread = grid.spread(Grid(scaled["scale"], zero_OG), 40)
    restored_OI = spread.values(unpack(packed["weight"], 3, 40).float())
    F.linear(x2, restored_OI, part.bias.detach()).square().sum().backward()
    assert torch.allclose(x1.grad, x2.grad, atol=1e-5)
    assert torch.allclose(part.factor.grad[..., 0], factor.grad, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_the_formula():
    random = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 6, 9, generator=random) * 2 for _ in range(2))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    assert float(divergence(student, teacher)) == pytest.approx(
        float((p * (p / q).log()).sum(-1).mean()), rel=1e-5
    )


@pytest.mark.parametrize("distill", [False, True])
def test_only_scales_change_and_the_model_gets_better(
    tiny_llama: Path, calibration_ids: Tensor, distill: bool
):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    models, losses = [], []
    for tune_epochs in (0, 8):
        models.append(AutoModelForCausalLM.from_pretrained(tiny_llama).eval())
        options = {**FAST, "tune_epochs": tune_epochs, "tune_lr": 0.02, "distill": distill}
        records = quantize_model(models[-1], build("efficient_qat", **options), calibration_ids)
        assert all(record.get("tuned", False) is (tune_epochs > 0) for record in records)
        with torch.no_grad():
            logits = models[-1](calibration_ids).logits
            labels = F.cross_entropy(logits[:, :-1].flatten(0, 1), calibration_ids[:, 1:].flatten())
            losses.append(
                float(divergence(logits, teacher(calibration_ids).logits) if distill else labels)
            )
    assert losses[1] < 0.97 * losses[0]
    before, after = (
        dict(model.named_buffers()) | dict(model.named_parameters()) for model in models
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is not name.endswith("_proj.scale"), name


# --- on a model -----------------------------------------------------------------------------------


class Memory(State):
    def __init__(self) -> None:
        self.saved: dict[str, Tensor] | None = None
        self.saves = 0

    def load(self) -> dict[str, Tensor] | None:
        return self.saved

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.saved, self.saves = copy.deepcopy(tensors), self.saves + 1


class StopAfter(Progress):
    """Raises when `count` units of the `number`-th stage called `name` are done."""

    def __init__(self, name: str, number: int, count: int) -> None:
        self.name, self.number, self.count, self.inside = name, number, count, False

    def stage(self, text: str, total: int = 0) -> None:
        self.inside = text == self.name
        self.number -= self.inside

    def advance(self, count: int = 1) -> None:
        if self.inside and self.number == 0:
            self.count -= count
            if self.count <= 0:
                raise KeyboardInterrupt


def block_step(folder: Path, ids_NS: Tensor, method: EfficientQAT) -> Step:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return next(next(walk(LiveBlocks(model), ids_NS, method)).steps())


@pytest.mark.parametrize("options", [{}, {"solved": True}], ids=str)
@torch.no_grad()
def test_block_training_brings_the_block_nearer(
    tiny_llama: Path, calibration_ids: Tensor, options: dict
):
    """By more than 40 % of the loss it starts with."""
    method = build("efficient_qat", **{**FAST, **options, "epochs": 30, "weight_lr": 2e-2})
    step = block_step(tiny_llama, calibration_ids, method)
    method.quantize_block(step)
    notes = step.jobs["mlp.up_proj"].notes
    assert notes["last_loss"] < (0.6 if not options else 0.8) * notes["first_loss"]


@torch.no_grad()
def test_a_training_that_stopped_inside_a_block_goes_on(tiny_llama: Path, calibration_ids: Tensor):
    """Stopped in the third of four epochs: the same bits, and only two epochs are done again."""
    method = build("efficient_qat", **{**FAST, "epochs": 4, "solved": True})
    unbroken = method.quantize_block(block_step(tiny_llama, calibration_ids, method))
    state = Memory()
    stopped = replace(
        block_step(tiny_llama, calibration_ids, method),
        state=state,
        listener=StopAfter("training", 1, 2 * 8 + 3),
    )
    with pytest.raises(KeyboardInterrupt):
        method.quantize_block(stopped)
    assert state.saves == 2
    resumed = method.quantize_block(
        replace(block_step(tiny_llama, calibration_ids, method), state=state)
    )
    assert state.saves == 4
    for name in unbroken:
        checks.check_same_bits(unbroken[name], resumed[name])


@pytest.fixture
def files(tiny_llama: Path, calibration_npy: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Run (or go on with) a run into a folder; the digests of its files."""

    def run(name: str, method: EfficientQAT, progress: Progress | None = None) -> dict[str, str]:
        out = tmp_path / name
        quantize_checkpoint(
            str(tiny_llama),
            out,
            method,
            Calibration(str(calibration_npy), samples=8),
            None,
            progress,
        )
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(out.iterdir())
        }

    return run


@pytest.mark.parametrize("options", [{}, {"rotated": True, "distill": True}], ids=str)
def test_a_run_stopped_in_both_phases_ends_in_the_same_bytes(
    files: Callable[..., dict[str, str]], tmp_path: Path, options: dict
):
    method = build("efficient_qat", **{**FAST, "tune_epochs": 17, "tune_batch": 2, **options})
    whole = files("whole", method)
    with pytest.raises(KeyboardInterrupt):
        files("out", method, StopAfter("training", 2, 8 + 3))
    assert (tmp_path / "out.training.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):  # of 68 steps, 64 are kept
        files("out", method, StopAfter("training the scales", 1, 66))
    assert files("out", method) == whole
    report = read_report(tmp_path / "out")
    assert all(
        record["tuned"] and record["last_loss"] < record["first_loss"]
        for record in report["linears"]
    )
    # Of the weights that were quantized
    assert all(record["weight_error"] < 0.5 for record in report["linears"])
    assert not (tmp_path / "out.training.safetensors").exists()
