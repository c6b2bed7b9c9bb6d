"""One block is read, quantized, written and dropped before the next: never the whole model."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from llq_hf.checkpoints.dense import INDEX, SINGLE, Checkpoint
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.common.progress import PassListener
from llq_hf.data.calibration import Calibration
from llq_hf.engine import base
from llq_hf.engine.blocks import LiveBlocks, StreamedBlocks
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions
from llq_hf.engine.stream import Activations, Stream
from llq_hf.methods import build
from llq_hf.models.decoder import quantizable
from llq_hf.models.load import build_skeleton

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
BLOCKS = 5


def digests(out: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())
    }


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(num_hidden_layers=BLOCKS, seed=3)


@pytest.fixture(scope="module")
def quantize(model: Path, calibration_npy: Path) -> Callable[..., dict[str, Any]]:
    def quantize(out: Path, method: str = "gptq", base: Path = model, **run: Any) -> dict[str, Any]:
        data = Calibration(str(calibration_npy), samples=8, seqlen=32)
        return quantize_checkpoint(str(base), out, build(method, bits=3), data, RunOptions(**run))

    return quantize


@pytest.fixture(scope="module")
def whole(quantize: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPTQ at 3 bits of the model as it is: one file, activations in memory."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(out)
    return out


def sharded(model: Path, folder: Path, files: int, prefix: str = "part") -> Path:
    """The same checkpoint in several files, tensors dealt out so that every block is torn apart."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / SINGLE)
    weight_map: dict[str, str] = {}
    for i in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[i::files]}
        save_file(part, folder / f"{prefix}-{i}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"{prefix}-{i}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq", "quip"])
def test_never_more_than_one_block(quantize, model, tmp_path, monkeypatch, method):
    """The memory of what was read is watched while it lives: that of two blocks never does at the
    same time.
    """
    alive: dict[str, StorageWeakRef] = {}
    most = 0
    read = Checkpoint.read

    def living() -> set[str]:
        return {
            name.split(".")[2]
            for name, storage in alive.items()
            if not storage.expired() and ".layers." in name
        }

    def recording_read(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        nonlocal most
        tensors = read(self, names)
        gc.collect()  # modules are in cycles of their own; what it frees was not held by us
        alive.update(
            {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in tensors.items()}
        )
        most = max(most, len(living()))
        return tensors

    monkeypatch.setattr(Checkpoint, "read", recording_read)
    # Reads tensor by tensor
    monkeypatch.setattr(Checkpoint, "scan", lambda self, on_tensor=None: ("0" * 64, []))
    monkeypatch.setattr(base, "LARGEST_COMPARED", 0)  # as of a model that is not small
    quantize(tmp_path / "out", method)
    assert most == 1
    gc.collect()
    assert living() == set()


def test_reads_are_of_one_block_or_of_what_is_outside(quantize, tmp_path, monkeypatch):
    reads: list[list[str]] = []
    read = Checkpoint.read

    def recording_read(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        reads.append(list(names))
        return read(self, reads[-1])

    monkeypatch.setattr(Checkpoint, "read", recording_read)
    monkeypatch.setattr(Checkpoint, "scan", lambda self, on_tensor=None: ("0" * 64, []))
    monkeypatch.setattr(base, "LARGEST_COMPARED", 0)  # as of a model that is not small
    quantize(tmp_path / "out")
    places = [
        {name.split(".")[2] if ".layers." in name else "outside" for name in names}
        for names in reads
        if names
    ]
    assert all(len(place) == 1 for place in places)
    linear = "model.layers.{}.mlp.down_proj.weight"
    counts = [sum(linear.format(block) in names for names in reads) for block in range(BLOCKS)]
    assert counts == [2] + [1] * (BLOCKS - 1)  # the first block also for the trial pass


def test_a_streamed_block_is_the_live_block(model):
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(str(model))
    skeleton = build_skeleton(checkpoint.path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    streamed = StreamedBlocks(checkpoint, skeleton, torch.float32, torch.device("cpu"))
    live = LiveBlocks(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert streamed.prefixes == live.prefixes
    ids = torch.arange(64).view(2, 32)
    inputs: list[tuple[Tensor, nn.Module]] = []
    for blocks in (streamed, live):
        stream = Stream(blocks, ids, None, PassListener())
        block = blocks.load(3)
        assert not any(tensor.is_meta for tensor in block.state_dict().values())
        stream.advance(block, "block 3")
        inputs.append((stream.activations[slice(0, 2)], block))
    assert torch.equal(inputs[0][0], inputs[1][0])
    # The skeleton was copied, not filled
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("files", [2, 7])
def test_a_sharded_base_gives_the_same_bytes(quantize, model, whole, tmp_path, files):
    quantize(tmp_path / "out", base=sharded(model, tmp_path / model.name, files))
    assert digests(tmp_path / "out") == digests(whole)


def test_a_base_with_both_an_index_and_a_single_file(quantize, model, whole, tmp_path):
    """The index decides, as in transformers; the other file is not carried along."""
    base = sharded(model, tmp_path / model.name, 3)
    shutil.copyfile(model / SINGLE, base / SINGLE)
    quantize(tmp_path / "out", base=base)
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize("method", ["gptq", "quip"])
def test_offload_gives_the_same_bytes_and_leaves_nothing(quantize, tmp_path, monkeypatch, method):
    opened: list[bool] = []
    make = Activations.__init__

    def recording_make(
        self: Activations, shape: Any, dtype: torch.dtype, offload: Path | None, *device: Any
    ) -> None:
        make(self, shape, dtype, offload, *device)
        opened.append(self._file is not None)
        assert not offload or not list(offload.iterdir()), "a kill would leave it"

    monkeypatch.setattr(Activations, "__init__", recording_make)
    quantize(tmp_path / "a", method)
    quantize(tmp_path / "b", method, offload=tmp_path / "offload" / "deeper")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert opened == [False, True]
    gc.collect()
    assert list((tmp_path / "offload" / "deeper").iterdir()) == []


def test_offload_leaves_nothing_when_a_run_fails(quantize, tmp_path, monkeypatch):
    class FailedError(Exception):
        pass

    def fail(*arguments: Any) -> None:
        raise FailedError

    monkeypatch.setattr("llq_hf.engine.execute.quantize_step", fail)
    with pytest.raises(FailedError):
        quantize(tmp_path / "out", offload=tmp_path / "offload")
    gc.collect()
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq", "quip"])
def test_bf16_on_the_cpu(quantize, tiny_llama_bf16, tmp_path, method):
    from transformers import AutoModelForCausalLM

    report = quantize(tmp_path / "out", method, base=tiny_llama_bf16)
    assert report["identity"]["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "out" / SINGLE)
    base = load_file(tiny_llama_bf16 / SINGLE)
    rest = {name: stored[name] for name in OUTSIDE}
    assert all(
        torch.equal(tensor, base[name]) and tensor.dtype == torch.bfloat16
        for name, tensor in rest.items()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert torch.isfinite(loaded(torch.arange(16)[None]).logits).all()


def test_calibration_in_another_dtype_than_the_files(quantize, tiny_llama_bf16, tmp_path):
    """dtype is that of the forward passes; what is not quantized is copied as it is."""
    report = quantize(tmp_path / "out", base=tiny_llama_bf16, dtype="float32")
    assert report["identity"]["dtype"] == "float32"
    stored = load_file(tmp_path / "out" / SINGLE)
    assert {stored[name].dtype for name in OUTSIDE} == {torch.bfloat16}


@pytest.mark.parametrize("fixture", ["tiny_llama_tied", "tiny_llama_biased"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_tied_and_biased_models_load(quantize, request, tmp_path, fixture, method):
    from transformers import AutoModelForCausalLM

    base = request.getfixturevalue(fixture)
    quantize(tmp_path / "out", method, base=base)
    dense = AutoModelForCausalLM.from_pretrained(base)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, linear in quantizable(dense).items():
        found = packed.get_submodule(name)
        assert type(found) is not nn.Linear
        assert (found.bias is None) == (linear.bias is None)
        assert linear.bias is None or torch.equal(found.bias, linear.bias)
    ids = torch.arange(2, 34)[None]
    difference = (dense(ids).logits - packed(ids).logits).norm() / dense(ids).logits.norm()
    # Three bits of a random model: far from exact, far from unrelated (1.4)
    assert difference < 0.8


def test_the_same_as_in_memory(quantize, model, whole, calibration_ids):
    """A model quantized in place has the packed tensors that the checkpoint run wrote."""
    from transformers import AutoModelForCausalLM

    from llq_hf.engine.in_memory import quantize_model
    from llq_hf.layers.linear import QuantLinear

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantize_model(live, build("gptq", bits=3), calibration_ids)
    stored = {
        name: tensor
        for file in whole.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    modules = {
        name: module for name, module in live.named_modules() if isinstance(module, QuantLinear)
    }
    assert len(modules) == 7 * BLOCKS
    for name, module in modules.items():
        for key, tensor in module.packed().items():
            assert torch.equal(tensor, stored[f"{name}.{key}"]), f"{name}.{key}"


def test_the_folder_one_is_in_is_a_folder_to_write(
    tiny_llama, calibration_npy, tmp_path, monkeypatch
):
    """`llq quantize MODEL .`: the run's own files lie beside that folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    calibration = Calibration(str(calibration_npy), samples=8)
    quantize_checkpoint(str(tiny_llama), Path("."), build("rtn", bits=3), calibration)
    assert inspect_checkpoint(tmp_path / "here")["quantized_linears"] == 14
    assert (tmp_path / "here.journal.jsonl").is_file()
