"""DB-LLM: levels and first scales against loops, the gradient of its scales, distillation that
helps, runs that are killed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import checks
from reference import db_llm as slow
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llq_hf.checkpoints.journal import Journal
from llq_hf.checkpoints.packed import read_report
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels.bitpack import unpack
from llq_hf.method import State, stored_bits
from llq_hf.methods import build
from llq_hf.methods.db_llm import DBLLM, DualLinear, continue_ids, planes
from llq_hf.models.sequences import Batch, TextSequences

FAST: dict[str, Any] = {"steps": 8, "group_size": 32, "batch": 2}


def test_stored_bits_of_llama_shapes():
    for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        assert stored_bits(build("db_llm").layout(*shape), *shape) <= 2.26


@pytest.mark.parametrize("mirrored", [False, True])
def test_two_thresholds_choose_the_nearest_of_four_levels(mirrored: bool):
    random = torch.Generator().manual_seed(0)
    a1 = torch.rand(200, generator=random) + 0.5
    # |a2| <= |a1|, and not only half of it, because scales are trained.
    a2 = -a1 * torch.rand(200, generator=random)
    scale = torch.stack([a1, a2], dim=-1) * (-1 if mirrored else 1)
    weight = torch.randn(200, generator=random) * 1.5
    first, second = planes(weight, scale)
    for w, pair, b1, b2 in zip(
        weight.tolist(), scale.tolist(), first.tolist(), second.tolist(), strict=True
    ):
        n1, n2 = slow.nearest_level(w, *pair)
        assert abs(w - pair[0] * b1 - pair[1] * b2) <= abs(w - pair[0] * n1 - pair[1] * n2) + 1e-6


@pytest.mark.parametrize("group_size", [16, 24, -1])
def test_codes_and_scales_equal_the_slow_start(group_size: int):
    weight_OI = checks.weight(4, 40)
    method = build("db_llm", group_size=group_size, scale_bits=32)
    packed = method.quantize(weight_OI, None, checks.job())
    restored_OI = checks.restore(method, packed, weight_OI)
    size = 40 if group_size == -1 else group_size
    for row in range(4):
        for g, begin in enumerate(range(0, 40, size)):
            group = weight_OI[row, begin : begin + size].tolist()
            a1, a2, error = slow.start(group)
            assert packed["scale"][row, g].tolist() == pytest.approx([a1, a2], rel=1e-5)
            part = slice(begin, begin + size)
            own_error = (restored_OI[row, part] - weight_OI[row, part]).square().sum()
            assert float(own_error) == pytest.approx(error, rel=1e-4)


def test_a_group_of_negative_weights_takes_the_mirrored_levels():
    weight_OI = torch.tensor([[-1.0, -0.5, 0.5, 0.0] * 8, [1.0, 0.5, -0.5, 0.0] * 8])
    method = build("db_llm", group_size=32)
    packed = method.quantize(weight_OI, None, checks.job())
    assert packed["scale"][:, 0].tolist() == [[-1.0, 0.5], [1.0, -0.5]]
    assert torch.equal(checks.restore(method, packed, weight_OI), weight_OI)


def test_feedback_lowers_the_output_error_on_the_same_scales():
    weight_OI, x_TI = checks.weight(), checks.inputs()
    plain, fed = (build("db_llm", group_size=32, feedback=on) for on in (False, True))
    assert checks.loss_of(fed, weight_OI, x_TI) < 0.7 * checks.loss_of(plain, weight_OI, x_TI)
    first, second = checks.quantize(plain, weight_OI), checks.quantize(fed, weight_OI)
    assert torch.equal(first["scale"], second["scale"])


class Packed(nn.Linear):
    """A stand-in for QuantLinear that has what DualLinear reads."""


@pytest.mark.parametrize("group_size", [16, 24])
def test_the_gradient_is_that_of_the_restored_weight(group_size: int):
    weight_OI, method = checks.weight(6, 40), build("db_llm", group_size=group_size)
    stored = method.quantize(weight_OI, None, checks.job())
    linear = Packed(40, 6)
    linear.weight = nn.Parameter(stored["weight"], requires_grad=False)
    linear.scale = stored["scale"]
    dual = DualLinear(linear, group_size)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    dual(x1).square().sum().backward()

    factor = torch.ones_like(dual.factor).requires_grad_()
    codes_OI = unpack(stored["weight"], 2, 40)
    scale_OI2 = (stored["scale"].float() * factor).repeat_interleave(group_size, dim=1)[:, :40]
    restored_OI = (codes_OI & 1) * scale_OI2[..., 0] + (codes_OI >> 1) * scale_OI2[..., 1]
    F.linear(x2, restored_OI, linear.bias.detach()).square().sum().backward()
    assert torch.allclose(x1.grad, x2.grad, atol=1e-5)
    assert torch.allclose(dual.factor.grad, factor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dad", "gamma", "labels"), [(1.0, 0.1, True), (0.5, 1.0, False), (0.0, 0.1, True)]
)
def test_the_loss_is_the_formula(dad: float, gamma: float, labels: bool):
    class Fixed(nn.Module):
        def __init__(self, logits_BSV: Tensor) -> None:
            super().__init__()
            self.logits = logits_BSV

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self

    random = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(2, 6, 9, generator=random) * 2 for _ in range(2))
    ids_BS = torch.randint(9, (2, 6), generator=random)
    method = DBLLM(dad=dad, gamma=gamma, labels=labels)
    found = method._loss(Fixed(student), Fixed(teacher), Batch({"input_ids": ids_BS}))
    expected = [
        slow.dad_loss(
            teacher[b].tolist(), student[b].tolist(), ids_BS[b].tolist(), dad, gamma, labels
        )
        for b in (0, 1)
    ]
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_sampling_with_a_cache_is_sampling_without(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        ids = continue_ids(model, torch.tensor([[5], [9]]), 12, torch.Generator().manual_seed(0))
        assert torch.equal(
            ids, continue_ids(model, torch.tensor([[5], [9]]), 12, torch.Generator().manual_seed(0))
        )
        assert ids.shape == (2, 12)
        greedy = model(ids[:, :3]).logits[:, -1].argmax(-1)
        assert torch.equal(greedy, ids[:, 3])
        logits, random = model(ids).logits, torch.Generator().manual_seed(0)
        for t in range(4, 12):
            drawn = torch.multinomial(logits[:, t - 1].softmax(-1), 1, generator=random)
            assert torch.equal(drawn[:, 0], ids[:, t]), t


# --- on a model -----------------------------------------------------------------------------------


def divergence(model: nn.Module, teacher: nn.Module, ids_NS: Tensor) -> float:
    """KL divergence of a model's predictions from the full-precision ones, in nats per token."""
    with torch.no_grad():
        t, s = (m(ids_NS).logits.log_softmax(-1) for m in (teacher, model))
    return float((t.exp() * (t - s)).sum(-1).mean())


@pytest.mark.parametrize("options", [{}, {"feedback": True}, {"generated": 16}], ids=str)
def test_distillation_brings_predictions_nearer(
    options: dict, tiny_llama: Path, calibration_ids: Tensor
):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    found = []
    for steps in (0, 24):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        method = build("db_llm", **{**FAST, **options, "steps": steps, "labels": False})
        records = quantize_model(model, method, calibration_ids)
        assert all(record.get("tuned", False) is (steps > 0) for record in records)
        found.append(divergence(model, teacher, calibration_ids))
    assert found[1] < 0.97 * found[0]


def test_only_scales_change_and_all_of_them(tiny_llama: Path, calibration_ids: Tensor):
    models = []
    for steps in (0, 8):
        models.append(AutoModelForCausalLM.from_pretrained(tiny_llama).eval())
        quantize_model(models[-1], build("db_llm", **{**FAST, "steps": steps}), calibration_ids)
    before, after = (
        dict(model.named_buffers()) | dict(model.named_parameters()) for model in models
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is not name.endswith("_proj.scale"), name


class SavedState(State):
    """State in memory, which raises KeyboardInterrupt at the `stop`-th save."""

    def __init__(self, stop: int = 10**9) -> None:
        self.saved: dict[str, Tensor] | None = None
        self.stop = stop

    def load(self) -> dict[str, Tensor] | None:
        return self.saved

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}
        self.stop -= 1
        if self.stop == 0:
            raise KeyboardInterrupt


def packed_model(tiny_llama: Path, method: DBLLM) -> tuple[nn.Module, nn.Module]:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    quantize_model(student, DBLLM(**{**method.to_dict(), "steps": 0}), None)
    for module in student.modules():
        if hasattr(module, "method"):
            module.method = method
    return student, AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def test_a_stopped_training_goes_on_to_the_same_bits(tiny_llama: Path, calibration_ids: Tensor):
    method, data = DBLLM(**{**FAST, "steps": 70}), TextSequences(calibration_ids)
    whole = method.tune(*packed_model(tiny_llama, method), data, Progress(), SavedState())
    state = SavedState(stop=2)
    with pytest.raises(KeyboardInterrupt):
        method.tune(*packed_model(tiny_llama, method), data, Progress(), state)
    assert state.saved is not None
    assert int(state.saved["step"]) == 64
    resumed = method.tune(*packed_model(tiny_llama, method), data, Progress(), state)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Stop(Progress):
    """Raises KeyboardInterrupt when a stage of this name begins, or after `advances` in it."""

    def __init__(self, stage: str, advances: int = 0) -> None:
        self.name = stage
        self.left = advances
        self.inside = False

    def stage(self, text: str, total: int = 0) -> None:
        self.inside = text.startswith(self.name)
        self.check()

    def advance(self, count: int = 1) -> None:
        self.left -= self.inside
        self.check()

    def check(self) -> None:
        if self.inside and self.left <= 0:
            raise KeyboardInterrupt


def files(out: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())
    }


@pytest.fixture
def calibration(tmp_path: Path, calibration_ids: Tensor) -> Calibration:
    np.save(tmp_path / "ids.npy", calibration_ids.numpy())
    return Calibration(str(tmp_path / "ids.npy"), len(calibration_ids), calibration_ids.shape[1])


def test_killed_while_and_after_tuning_the_files_are_the_same(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    method = build("db_llm", **{**FAST, "steps": 40, "feedback": True})
    whole, out = tmp_path / "whole", tmp_path / "out"
    report = quantize_checkpoint(str(tiny_llama), whole, method, calibration)
    assert all(record["tuned"] and "output_error" not in record for record in report["linears"])
    assert not list(tmp_path.glob("whole.t*.safetensors")), "nothing of the training stays behind"

    # Killed in the middle of training, after its state was saved once.
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            str(tiny_llama), out, method, calibration, progress=Stop("training the scales", 36)
        )
    assert (tmp_path / "out.training.safetensors").exists()
    assert not (out / "config.json").exists()

    # Killed while tuned tensors are written: the journal's line is written, but they are not.
    real = Journal.replace_block

    def dies(self: Journal, line: dict) -> None:
        real(self, line)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "replace_block", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(str(tiny_llama), out, method, calibration)
    monkeypatch.setattr(Journal, "replace_block", real)
    quantize_checkpoint(str(tiny_llama), out, method, calibration)
    assert files(out) == files(whole)
    assert read_report(out) == report


def test_a_block_damaged_after_tuning_is_done_again_with_all_others(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path
):
    method, out = build("db_llm", **{**FAST, "feedback": True}), tmp_path / "out"
    quantize_checkpoint(str(tiny_llama), out, method, calibration)
    before = files(out)
    victim = out / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-8] + bytes(8))
    quantize_checkpoint(str(tiny_llama), out, method, calibration)
    assert files(out) == before


def test_live_and_streamed_runs_agree(
    tiny_llama: Path, calibration: Calibration, calibration_ids: Tensor, tmp_path
):
    method = build("db_llm", **FAST)
    live = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    quantize_model(live, method, calibration_ids)
    quantize_checkpoint(str(tiny_llama), tmp_path / "out", method, calibration)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(live(calibration_ids).logits, loaded(calibration_ids).logits)


def test_an_exploding_learning_rate_is_an_error(
    tiny_llama: Path, calibration_ids: Tensor, monkeypatch
):
    monkeypatch.setattr(DBLLM, "_loss", lambda self, *args: torch.tensor(float("nan")))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(LLQError, match=r"smaller lr"):
        quantize_model(model, build("db_llm", **FAST), calibration_ids)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"group_size": 0},
        {"scale_bits": 8},
        {"steps": -1},
        {"batch": 0},
        {"lr": 0.0},
        {"labels": False, "dad": 0.0},
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict):
    with pytest.raises(LLQError, match="db_llm"):
        build("db_llm", **options)
