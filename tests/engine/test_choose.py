"""A budget chooses the method that lost least when it was measured, among those that fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from families import BY_NAME, save_model
from typer.testing import CliRunner

from llq_hf import LLQError, cli
from llq_hf.checkpoints.packed import read_report
from llq_hf.engine import choose
from llq_hf.engine.choose import Budget, Choice, Measured, bytes_of, evidence
from llq_hf.methods import METHODS, build


def measured(method: str, kl: float, preset: str = "study", **options: Any) -> Measured:
    return Measured(method, preset, options, 0.0, {"a": kl, "b": 4 * kl}, 1.0)


CELLS = (
    measured("rtn", 0.9, bits=2),
    measured("rtn", 0.4, bits=3),
    measured("rtn", 0.1, bits=4),
    measured("quip", 0.3, bits=3),
    measured("gptq", 0.2, bits=3, group_size=32),
    measured("gptq", 0.001, "best", bits=3),
)


def chosen(model: Path, preset: str = "study", **budget: Any) -> Choice:
    return Choice.of(str(model), Budget(**budget), preset, measured=CELLS)


def test_the_least_loss_within_the_bits(tiny_llama: Path) -> None:
    """Groups of 32 cost this model 3.6 bits, and rows of 32 to 64 weights cost QuIP 3.3 and more:
    bits are those of the model at hand.
    """
    wide = chosen(tiny_llama, bits=20)
    assert [each.measured.loss for each in wide.ranked] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.8])
    by_words = {each.measured.words: each.bits for each in wide.ranked}
    assert by_words["gptq bits=3 group_size=32"] >= 3.5
    for budget in sorted(by_words.values()):
        best = chosen(tiny_llama, bits=budget).best
        assert best.bits <= budget
        allowed = [each for each in wide.ranked if each.bits <= budget]
        assert best.measured == allowed[0].measured


def test_presets_do_not_mix(tiny_llama: Path) -> None:
    assert [each.method.name for each in chosen(tiny_llama, "best", bits=8).ranked] == ["gptq"]
    assert chosen(tiny_llama, "best", bits=8).best.method == build("gptq", "best", bits=3)


def test_the_loss_is_the_geometric_mean() -> None:
    assert Measured("rtn", "study", {}, 4.1, {"a": 0.1, "b": 0.4}, 1).loss == pytest.approx(0.2)
    assert Measured("rtn", "study", {}, 4.1, {"a": 0.0, "b": 0.4}, 1).loss < 1e-4


def test_bits_and_bytes_are_those_of_the_file(
    tiny_llama: Path, calibration_npy: Path, tmp_path: Path
) -> None:
    from llq_hf.data.calibration import Calibration
    from llq_hf.engine.execute import quantize_checkpoint

    data = Calibration(str(calibration_npy))
    for each in chosen(tiny_llama, bits=20).ranked:
        out = tmp_path / each.measured.words
        quantize_checkpoint(str(tiny_llama), out, each.method, data)
        bits = read_report(out)["bits"]
        assert each.bits == pytest.approx(bits["stored"], abs=1e-9)
        tensors = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert 0 <= tensors - each.bytes < 64 << 10  # headers of the files


def test_a_size_and_a_memory(tiny_llama: Path) -> None:
    every = chosen(tiny_llama, bits=20).ranked
    small = min(each.bytes for each in every)
    large = max(each.bytes for each in every)
    assert chosen(tiny_llama, size=large).best.measured == every[0].measured
    assert [each.bytes for each in chosen(tiny_llama, size=small).ranked] == [small]
    # keys and values of 2 layers, and a tenth of the size to work in
    cache = every[0].cache_bytes
    config = json.loads((tiny_llama / "config.json").read_text())
    heads, width = config["num_key_value_heads"], config["head_dim"]
    tokens = min(8192, config["max_position_embeddings"])
    assert cache == 2 * config["num_hidden_layers"] * heads * width * tokens * 2
    memory = int(1.1 * small + cache) + 1
    assert [each.bytes for each in chosen(tiny_llama, memory=memory).ranked] == [small]
    with pytest.raises(LLQError, match="the smallest is rtn bits=2"):
        chosen(tiny_llama, memory=memory - 2)


def test_what_fits_nowhere_says_what_would(tiny_llama: Path) -> None:
    with pytest.raises(LLQError, match=r"fits in 1\.5 stored bits; the smallest is rtn bits=2"):
        chosen(tiny_llama, bits=1.5)
    with pytest.raises(LLQError, match="nothing says how to quantize"):
        Budget()
    for bits in (0, float("inf"), float("nan")):
        with pytest.raises(LLQError, match="is none; give a number"):
            Budget(bits=bits)


def test_what_a_model_cannot_have_is_left_out(tmp_path: Path) -> None:
    """Gemma 2 has norms behind its blocks' parts, through which no rotation goes."""
    save_model(BY_NAME["Gemma 2"], tmp_path / "gemma2")
    cells = (measured("spinquant", 0.01, bits=4), measured("rtn", 0.5, bits=4))
    model = str(tmp_path / "gemma2")
    choice = Choice.of(model, Budget(bits=9), "study", measured=cells)
    assert [each.method.name for each in choice.ranked] == ["rtn"]
    assert list(choice.refused) == ["spinquant bits=4"]
    with pytest.raises(LLQError, match=r"nothing that was measured fits .* spinquant bits=4: "):
        Choice.of(model, Budget(bits=9), "study", measured=cells[:1])


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24e9), ("5.5 GiB", 5.5 * 2**30), ("900m", 900e6), ("123", 123), ("2TB", 2e12)],
)
def test_sizes(text: str, count: float) -> None:
    assert bytes_of(text) == int(count)


@pytest.mark.parametrize("text", ["", "GB", "24 XB", "-3GB", "1e9", "4ib"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(LLQError, match="is no size; write it as 24GB"):
        bytes_of(text)


def test_the_evidence_is_sound() -> None:
    """Every measured way is one that there is, was measured on all texts, and is there once."""
    found = evidence()
    assert {each.preset for each in found} == {"study", "best"}
    assert len({each.words for each in found}) == len(found)
    for each in found:
        assert each.method in METHODS
        build(each.method, each.preset, **each.options)
        assert set(each.kl) == set(found[0].kl)
        assert all(value >= 0 for value in each.kl.values())
        assert each.seconds is None or each.seconds > 0
        assert each.stored_bits >= 1


def test_quantize_without_a_method(
    tiny_llama: Path, calibration_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "evidence", lambda: CELLS)
    model, data = str(tiny_llama), str(calibration_npy)

    def run(out: str, *flags: str) -> str:
        words = ["quantize", model, str(tmp_path / out), "--calibration", data, *flags]
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    shown = run("a", "--bits", "20", "--device", "cpu")
    assert "the first is taken" in shown
    assert shown.index("rtn bits=4") < shown.index("gptq bits=3 group_size=32")
    assert read_report(tmp_path / "a")["identity"]["method"] == "rtn"
    run("b", "--preset", "best", "--size", "1MB", "--device", "cpu")
    assert read_report(tmp_path / "b")["identity"]["config"]["refine"] == 2
    for flags, message in (
        (["--group-size", "64"], "--group-size is an option of a method; give --method"),
        ([], "give --method, or a budget that chooses one"),
        (["--method", "rtn", "--size", "1MB"], "--size and --memory choose a method"),
    ):
        words = ["quantize", model, str(tmp_path / "c"), *flags]
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 2  # as every program that is called wrongly
        assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", result.output).split())
