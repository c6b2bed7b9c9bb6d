"""`llq diagnose`: every figure against its direct computation; the model is as before; the page."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llq_hf import Calibration, LLQError, build, cli
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.models.decoder import hidden_of
from llq_hf.study.diagnose import (
    BLOCK,
    Diagnosis,
    Part,
    Rounding,
    concentration,
    correlations,
    diagnose,
    spearman,
)
from llq_hf.study.diagnose_page import diagnosis_page, tables

IDS_NS = torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(2))
ROUNDING = Rounding((4, 2), 32)


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def found(model) -> Diagnosis:
    return diagnose("tiny", model, IDS_NS, ROUNDING)


def inputs_of(model, name: str) -> torch.Tensor:
    """The inputs of a linear, [T, I] in fp64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), hook:
        model(input_ids=IDS_NS)
    return seen[0].flatten(0, 1).double()


def part(found: Diagnosis, name: str) -> Part:
    return next(each for each in found.parts if each.name == name)


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_figures_of_linears(model, found: Diagnosis, name: str) -> None:
    name = f"model.layers.1.{name}"
    figures = part(found, name).figures
    w = model.get_parameter(f"{name}.weight").detach().double()
    x_TI = inputs_of(model, name)
    rms_I = x_TI.square().mean(0).sqrt()
    power = torch.linalg.eigvalsh(x_TI.T @ x_TI)
    direct = {
        "weight_kurtosis": w.pow(4).mean() / w.square().mean() ** 2,
        "weight_outlier": w.abs().max() / w.square().mean().sqrt(),
        "input_kurtosis": x_TI.pow(4).mean() / x_TI.square().mean() ** 2,
        "input_outlier": rms_I.max() / rms_I.median(),
        "input_rank": power.sum() ** 2 / power.square().sum() / len(power),
    }
    assert figures == {key: pytest.approx(float(value), rel=1e-4) for key, value in direct.items()}
    assert 0 < figures["input_rank"] <= 1


def test_massive_activations(model, found: Diagnosis) -> None:
    states = []
    hook = model.model.layers[0].register_forward_hook(
        lambda block, args, out: states.append(hidden_of(out).abs())
    )
    with torch.no_grad(), hook:
        model(input_ids=IDS_NS)
    massive = part(found, "model.layers.0").figures["massive"]
    assert massive == pytest.approx(float(states[0].max() / states[0].median()), rel=1e-4)


# --- losses ---------------------------------------------------------------------------------------


def nearest(weight_OI: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rounded to nearest, group by group, with scales in fp16."""
    out = weight_OI.clone()
    for row in out:
        for start in range(0, len(row), group):
            w = row[start : start + group]
            low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = min(max(round(-low / scale), 0), 2**bits - 1)
            codes = [min(max(round(float(v) / scale) + zero, 0), 2**bits - 1) for v in w]
            w.copy_(torch.tensor([(code - zero) * scale for code in codes]))
    return out


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"])
def test_the_loss_of_a_linear(model, found: Diagnosis, name: str) -> None:
    check_loss(model, found, name, [name])


def test_the_loss_of_a_block(model, found: Diagnosis) -> None:
    linears = [each.name for each in found.of_kind(block=False) if each.block == 1]
    assert len(linears) == 7
    check_loss(model, found, "model.layers.1", linears)


def check_loss(model, found: Diagnosis, name: str, linears: list[str]) -> None:
    """Against a copy of the model that is run as a whole."""
    for bits in ROUNDING.bits:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for linear in linears:
                weight = other.get_parameter(f"{linear}.weight")
                weight.copy_(nearest(weight, bits, 32))
            p, q = (each(input_ids=IDS_NS).logits.double() for each in (model, other))
        difference = p.log_softmax(-1) - q.log_softmax(-1)
        direct = float((p.softmax(-1) * difference).sum(-1).mean())
        assert part(found, name).kl[bits] == pytest.approx(direct, rel=1e-3, abs=1e-7)


def test_the_model_is_as_before(tiny_llama: Path, model, found: Diagnosis) -> None:
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS_NS).logits, model(input_ids=IDS_NS).logits)
    assert not any("forward" in block.__dict__ for block in model.model.layers)


# --- what tells -----------------------------------------------------------------------------------


def test_rank_correlation() -> None:
    from scipy.stats import spearmanr

    one, other = [3.0, 1.0, 1.0, 7.0, 5.0], [0.2, 0.1, 0.4, 0.9, 0.9]
    assert spearman(one, other) == pytest.approx(float(spearmanr(one, other).statistic))
    assert spearman(one, one) == pytest.approx(1)
    assert math.isnan(spearman([1.0, 2.0], [1.0, 2.0]))


def test_a_figure_that_decides_the_loss_is_seen() -> None:
    names = ("input_kurtosis", "input_outlier", "input_rank", "weight_kurtosis", "weight_outlier")
    parts = [
        Part(
            f"b.{i}", i, "up_proj", {**dict.fromkeys(names, float(-i)), "input_rank": i / 9}, {3: i}
        )
        for i in range(6)
    ]
    blocks = [Part(f"b{i}", i, BLOCK, {"massive": float(i)}, {3: -float(i)}) for i in range(6)]
    found = correlations(Diagnosis("m", 1, Rounding((3,)), [*parts, *blocks]), 3)
    assert found["input_rank"] == pytest.approx(1)
    assert found["weight_outlier"] == pytest.approx(-1)
    assert found["massive"] == pytest.approx(-1)


def test_concentration() -> None:
    losses = {str(i): 1.0 for i in range(19)} | {"most": 21.0}
    assert concentration(losses, 0.05) == pytest.approx(21 / 40)


# --- the page and the command ---------------------------------------------------------------------


def test_the_page_shows_both_models_as_text(found: Diagnosis) -> None:
    other = copy.deepcopy(found)
    other.model = "<script>alert(1)</script>"
    text = diagnosis_page([found, other])
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.findall(r"""(src|href)=["']?(https?:)?//|url\(["']?http|@import""", text)
    assert text.count("<svg") == 8
    assert "mathdefault" not in text
    worst = max(found.of_kind(block=False), key=lambda each: each.kl[2])
    assert worst.name in text
    summary = tables([found, other])[0]
    assert [[value.text for value in line.values[:2]] for line in summary.lines][:2] == [
        ["tiny", "4"],
        ["tiny", "2"],
    ]
    blocks = [each.kl[2] for each in found.of_kind(block=True)]
    assert float(summary.lines[1].values[4].text) == pytest.approx(sum(blocks), rel=1e-3)


def test_the_command(tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    arguments = ["diagnose", str(tiny_llama), str(tiny_llama_tied), "--out", str(out)]
    arguments += [
        "--calibration",
        "demo",
        "--calibration-samples",
        "1",
        "--calibration-seqlen",
        "16",
    ]
    arguments += ["--bits", "3", "--group-size", "32", "--device", "cpu"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    held = json.loads(out.with_suffix(".json").read_text())["models"]
    assert [len(each["parts"]) for each in held] == [16, 16]
    assert {each["tokens"] for each in held} == {16}
    assert out.read_text().startswith("<!doctype html>")


def test_what_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    quantize_checkpoint(str(tiny_llama), packed, build("rtn", bits=4), Calibration())
    out = ["--out", str(tmp_path / "page.html")]
    for arguments, said in (
        ([str(packed), *out], r"is quantized already \(llq_rtn\); give the full-precision model"),
        ([str(tiny_llama), "--out", str(tmp_path / "page")], r"ends in \.html"),
        ([str(tiny_llama), *out, "--bits", "9"], r"bits=\(9,\) are no widths"),
        (
            [str(tiny_llama), *out, "--calibration-seqlen", "999", "--calibration", "demo"],
            "context",
        ),
    ):
        with pytest.raises(LLQError, match=said):
            CliRunner().invoke(cli.app, ["diagnose", *arguments], catch_exceptions=False)
    assert not list(tmp_path.glob("page*"))
    shutil.rmtree(packed)
