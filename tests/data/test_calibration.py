"""CalibrationOptions: every place where a user asks for a quantization takes them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llq_hf import Calibration, LLQError, QuantizedLlama, cli
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import CalibrationOptions
from llq_hf.demo import MODELS, resolve
from llq_hf.hosts.hf_quantizer import CONFIGS, check_quantized
from llq_hf.hosts.model_args import ModelArgs
from llq_hf.study.cell import Setup, _quantize
from llq_hf.study.plan import expand

# --- the options ----------------------------------------------------------------------------------


def test_what_is_left_open_is_the_studys_setting_or_the_bundled_models_own_text() -> None:
    options = CalibrationOptions()
    assert options.for_model("meta-llama/Meta-Llama-3-8B") == Calibration("wikitext2", 128, 2048, 0)
    for name, folder in MODELS.items():
        own = Calibration(name, 128, 256, 0)
        assert options.for_model(name) == own
        assert options.for_model(str(folder)) == own
        assert options.for_model(f"{folder}/") == own


def test_what_is_given_stands() -> None:
    given = CalibrationOptions("c4", 8, 64, 3)
    assert given.for_model("demo") == Calibration("c4", 8, 64, 3)
    assert CalibrationOptions(seed=7).for_model("demo") == Calibration("demo", 128, 256, 7)


def test_the_fields_are_those_of_a_calibration() -> None:
    names = [each.name for each in fields(CalibrationOptions)]
    assert names == [each.name for each in fields(Calibration)]
    assert list(CalibrationOptions.option_names().values()) == names


def test_options_are_split_from_others() -> None:
    found = CalibrationOptions.split({"bits": 2, "calibration": "c4", "calibration_seed": 1})
    assert found == (CalibrationOptions("c4", seed=1), {"bits": 2})


# --- the doors ------------------------------------------------------------------------------------


class ReachedError(Exception):
    """Carries the calibration that a door hands to the engine, and ends the run there."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration


def by_llq_quantize(model: str, options: dict[str, Any]) -> None:
    run_llq("quantize", model, "/none/out", "--method", "gptq", "--device", "cpu", *flags(options))


def by_llq_finetune(model: str, options: dict[str, Any]) -> None:
    run_llq("finetune", model, "/none/out", "--base-method", "gptq", *flags(options))


def by_model_args(model: str, options: dict[str, Any]) -> None:
    args = {"pretrained": model, "method": "gptq", **options}
    ModelArgs.split(args, "demo", set())[0].loadable("cpu", None)


def by_quantization_config(model: str, options: dict[str, Any]) -> None:
    config = CONFIGS["gptq"](**options)
    AutoModelForCausalLM.from_pretrained(resolve(model), quantization_config=config)


def by_model_class(model: str, options: dict[str, Any]) -> None:
    QuantizedLlama.from_pretrained(model, method="gptq", **options)


def by_study_plan(model: str, options: dict[str, Any]) -> None:
    """A plan has them as a mapping, and the seeds of its own."""
    given = {
        "source" if name == "calibration" else name.removeprefix("calibration_"): value
        for name, value in options.items()
    }
    plan = {
        "models": [model],
        "tasks": ["llq_demo"],
        "methods": [{"method": "gptq"}],
        "baseline": False,
        "seeds": [given.pop("seed", 0)],
        "calibration": given,
    }
    cell = expand([plan])[0]
    _quantize(cell, Setup("cpu"), Progress())


def run_llq(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llq", *arguments])
        cli.main()


def flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


DOORS = [
    by_llq_quantize,
    by_llq_finetune,
    by_model_args,
    by_quantization_config,
    by_model_class,
    by_study_plan,
]
each_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
Door = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine is asked to do with a calibration raises ReachedError."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise ReachedError(next(each for each in args if isinstance(each, Calibration)))

    for place in (
        "engine.execute.quantize_checkpoint",
        "engine.prepare.prepare",
        "engine.cached.cached",
        "hosts.model_args.cached",
        "hosts.hf_quantizer.calibration_data",
    ):
        monkeypatch.setattr(f"llq_hf.{place}", stop)


@pytest.mark.usefixtures("reached")
@each_door
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calibration": "c4", "calibration_samples": 8},
        {"calibration_seqlen": 64, "calibration_seed": 3},
    ],
    ids=["nothing", "source", "seed"],
)
def test_every_door_asks_for_the_same_data(
    door: Door, options: dict[str, Any], tiny_llama: Path
) -> None:
    for model in ("demo", str(tiny_llama)):
        with pytest.raises(ReachedError) as found:
            door(model, options)
        asked = CalibrationOptions.split(options)[0]
        assert found.value.calibration == asked.for_model(model)


def refusal(door: Door, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The text of the error at a door."""
    with pytest.raises((LLQError, SystemExit)) as found:
        door("demo", options)
    if isinstance(found.value, LLQError):
        return str(found.value)
    assert found.value.code  # the command line: not 0
    return capsys.readouterr().err


@pytest.mark.usefixtures("reached")
@each_door
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration": "wikitxt2"}, ["'wikitxt2'", "'wikitext2'"]),
        ({"calibration": 5}, ["5", "give one of wikitext2"]),
        ({"calibration_samples": 0}, ["calibration_samples=0", "give 1 or more"]),
        ({"calibration_seqlen": -1}, ["calibration_seqlen=-1", "give 1 or more"]),
        ({"calibration_sample": 8}, ["sample", "samples"]),
    ],
    ids=["source", "type", "samples", "seqlen", "name"],
)
def test_every_door_refuses_what_makes_no_sense(
    door: Door, options: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = refusal(door, options, capsys)
    for word in words:
        assert word in text


@pytest.mark.usefixtures("reached")
@pytest.mark.parametrize("door", [door for door in DOORS if door is not by_study_plan])
def test_every_door_refuses_a_negative_seed(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(door, {"calibration_seed": -1}, capsys)
    assert "calibration_seed=-1 cannot seed the calibration draws" in text


def test_calibration_options_without_a_method_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(LLQError, match=r"calibration_samples is an option of .* give method="):
        QuantizedLlama.from_pretrained(tiny_llama, calibration_samples=2)


def test_the_demo_is_calibrated_on_its_own_text() -> None:
    model = QuantizedLlama.from_pretrained("demo", method="gptq", bits=2, calibration_samples=4)
    config = check_quantized(model)
    assert config.calibration == Calibration("demo", 4, 256, 0)
    assert config.calibration_used is not None
    assert (config.calibration_used["samples"], config.calibration_used["seqlen"]) == (4, 256)
