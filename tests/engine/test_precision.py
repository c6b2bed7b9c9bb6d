"""The host's settings of TF32 and the like neither reach a run nor are lost by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.precision import _settings, full_precision
from llq_hf.methods import build

HOSTS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "no reduced sums": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "the newer setting": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions in fp32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}


def found() -> list[Any]:
    return [setting.kept() for setting in _settings()]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """The settings of a host program."""
    at_first = [(setting, setting.kept()) for setting in _settings()]
    HOSTS[request.param]()
    yield found()
    for setting, value in at_first:
        setting.write(value)


@pytest.mark.parametrize("host", HOSTS, indirect=True)
def test_settings_are_pinned_and_restored(host: list[Any]):
    pinned = [setting.inside for setting in _settings()]
    with full_precision():
        assert found() == pinned
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        with full_precision():
            assert found() == pinned
        assert found() == pinned
    assert found() == host


@pytest.mark.parametrize("host", ["high"], indirect=True)
def test_they_are_restored_after_an_error(host: list[Any]):
    @full_precision()
    def fails() -> None:
        raise ValueError("for example")

    for _ in range(2):
        with pytest.raises(ValueError, match="for example"):
            fails()
    assert found() == host


@pytest.mark.parametrize("host", ["medium"], indirect=True)
def test_a_run_is_inside(
    host: list[Any], tiny_llama: Any, calibration_ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    from llq_hf.methods.gptq import GPTQ

    seen = []
    quantize = GPTQ.quantize

    def spy(self: GPTQ, *args: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return quantize(self, *args)

    monkeypatch.setattr(GPTQ, "quantize", spy)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    quantize_model(model, build("gptq", bits=4, group_size=32), calibration_ids[:2])
    assert set(seen) == {"highest"}
    assert found() == host
