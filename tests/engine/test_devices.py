"""Where tensors of a run lie: on the device of their block, on a GPU that has room, in no void.

There is no GPU here. "meta" stands for a second device, and functions that ask a GPU are replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.engine import estimates, prepare, stream
from llq_hf.engine.blocks import LiveBlocks
from llq_hf.engine.estimates import check_memory
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.options import RunOptions
from llq_hf.engine.stream import Activations, Stream
from llq_hf.engine.whole_model import resolve_method
from llq_hf.methods import build
from llq_hf.models.decoder import input_groups
from llq_hf.numerics.stats import Hessian

GPU = torch.device("meta")
GIB = 2**30


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_statistics_and_inputs_are_on_the_device_of_their_block(
    model: Any, calibration_ids: Tensor
):
    blocks = LiveBlocks(model)
    activations = Stream(blocks, calibration_ids, None, Progress())
    first, second = model.model.layers
    groups = input_groups(first, *activations.inputs(slice(0, 1)))
    observes = dict.fromkeys([name for group in groups for name in group], Hessian)
    for index, (block, device) in enumerate(((first, torch.device("cpu")), (second.to(GPU), GPU))):
        activations.enter(index, block)
        hidden_BSD, kwargs = activations.inputs(slice(0, 2))
        assert hidden_BSD.device.type == device.type
        assert {part.device.type for part in kwargs["position_embeddings"]} == {device.type}
        stats = activations.observe(block, groups, observes, None)
        assert {stat.upper_II.device.type for stat in stats.values()} == {device.type}


def test_what_is_offloaded_is_refused_with_the_cure(model: Any, calibration_ids: Tensor):
    model.model.layers[1].to("meta")
    for method in (build("rtn"), build("gptq"), build("spinquant", rotations="learned")):
        with pytest.raises(LLQError, match=r"9 tensors .* model\.layers\.1\..*llq quantize"):
            quantize_model(model, method, calibration_ids)
        with pytest.raises(LLQError, match="device_map"):
            resolve_method(model, method, calibration_ids)


@pytest.mark.parametrize(
    ("free", "place"),
    [(None, "cpu"), (4 * 8 * 32 * 96 * 4, "meta"), (4 * 8 * 32 * 96 * 4 - 1, "cpu")],
)
def test_activations_stay_on_the_gpu_where_they_fit(
    free: int | None, place: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "gpu_free_bytes", lambda device: free)
    activations = Activations((8, 32, 96), torch.float32, None, GPU)
    assert activations.tensor_NSD.device.type == place
    assert activations.copy(None).tensor_NSD.device.type == place


def test_activations_in_a_file_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "gpu_free_bytes", lambda device: 10**9)
    assert Activations((8, 32, 96), torch.float32, tmp_path, GPU).tensor_NSD.device.type == "cpu"


def test_the_memory_of_a_gpu_is_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(estimates, "gpu_free_bytes", lambda device: 8 * GIB)
    run = RunOptions("cuda:0")
    check_memory(9 * GIB, GIB, run)  # activations go to the CPU's memory where they must
    with pytest.raises(
        LLQError, match=r"8\.5 GiB of memory are needed on cuda:0 and 8\.0 are free"
    ):
        check_memory(9 * GIB, GIB // 2, run)
    with pytest.raises(LLQError, match="use offload"):
        check_memory(2**60, 2**60, run)
    monkeypatch.setattr(estimates, "gpu_free_bytes", lambda device: None)
    with pytest.raises(LLQError, match="use offload"):
        check_memory(2**60, 0, RunOptions())


def test_the_fingerprint_names_the_gpu(monkeypatch: pytest.MonkeyPatch):
    def identity() -> dict[str, Any]:
        return prepare._identity({}, build("rtn"), None, torch.float32, RunOptions("cuda:0"))

    assert "gpu" not in identity()  # here
    monkeypatch.setattr(prepare, "gpu_name", lambda device: f"card {device.index}")
    assert identity()["gpu"] == "card 0"
