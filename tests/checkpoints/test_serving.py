"""What `llq info` says about the kernels that serve a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from llq_hf.checkpoints.serving import served
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.kernels import native
from llq_hf.methods import build

NEEDS = "digits needs groups of a multiple of 16 columns"


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By group size: a packed checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    for size in (16, 24):
        quantize_checkpoint(
            str(tiny_llama), folder / str(size), build("rtn", group_size=size), Calibration()
        )
    return {size: folder / str(size) for size in (16, 24)}


def test_every_linear_is_in_one_kind(packed: dict[int, Path]) -> None:
    kinds = served(packed[16])
    names = sorted(name for kind in kinds for name in kind["linears"])
    assert names == sorted(
        [*(f"{letter}_proj" for letter in "qkvo"), "gate_proj", "up_proj", "down_proj"]
    )
    shapes = {name: kind["shape"] for kind in kinds for name in kind["linears"]}
    assert shapes["gate_proj"] == shapes["up_proj"] == shapes["down_proj"][::-1]


@pytest.mark.skipif(not native.compiled(), reason="the kernels are not compiled")
def test_a_slower_kernel_has_its_reason(packed: dict[int, Path]) -> None:
    for kind in served(packed[16]):
        assert (kind["one_token"], kind["few_tokens"], kind["more_tokens"]) == (
            "digits",
            "digits",
            "tiles",
        )
        assert kind["reasons"] == []
    for kind in served(packed[24]):
        assert (kind["one_token"], kind["few_tokens"]) == ("floats", "tiles")
        assert kind["reasons"] == [NEEDS]


def test_without_a_library_torch_serves(
    packed: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "backend", lambda: None)
    for kind in served(packed[16]):
        assert kind["one_token"] == kind["few_tokens"] == kind["more_tokens"] == "torch"
        assert "digits: not available here" in kind["reasons"]
