"""The base is taken as transformers takes it: its files, its heads, all that decides the result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llq_hf import Calibration, LLQError, build
from llq_hf.checkpoints.hashes import is_whole
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.engine import base as engine_base
from llq_hf.engine.cached import cached
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions

IDS_BS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(3))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS_BS).logits


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL, nats per token."""
    difference = one.log_softmax(-1) - other.log_softmax(-1)
    return float((one.softmax(-1) * difference).sum(-1).mean())


def edit(folder: Path, tensors=None, **config) -> Path:
    """Change tensors and fields of a checkpoint; a field that is None goes."""
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "base")


def quantized(base: Path, out: Path, method: str = "rtn", **options) -> Path:
    data = Calibration("demo", 2, 16)
    quantize_checkpoint(str(base), out, build(method, bits=8, **options), data)
    return out


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "spinquant"])
@pytest.mark.parametrize("head", ["own, untied", "own, said to be tied", "the embedding's, tied"])
def test_the_head_is_that_which_transformers_loads(
    base: Path, tmp_path: Path, head: str, method: str
) -> None:
    same = head.startswith("the embedding's")
    edit(
        base,
        lambda t: t.update({HEAD: t[EMBEDDING].clone()}) if same else None,
        tie_word_embeddings=head != "own, untied",
    )
    options = {"w_clip": False} if method == "spinquant" else {}
    out = quantized(base, tmp_path / "out", method, **options)
    assert divergence(logits(base), logits(out)) < 1e-3
    if not same:
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


# --- files ----------------------------------------------------------------------------------------


def test_a_single_file_counts_before_an_index(base: Path, tmp_path: Path) -> None:
    """As in transformers; the index and its shards are left from before."""
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    edit(base, lambda t: t.update({n: w.flip(0) for n, w in t.items() if "down_proj" in n}))
    shutil.copy(base / "model.safetensors", sharded)
    shutil.copy(base / "tokenizer.json", sharded)
    shutil.copy(base / "tokenizer_config.json", sharded)
    assert torch.equal(logits(sharded), logits(base))
    out = quantized(sharded, tmp_path / "out")
    assert divergence(logits(base), logits(out)) < 1e-3


def test_weights_that_the_config_names(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    edit(base, lambda t: t.update({n: w.flip(0) for n, w in t.items() if "down_proj" in n}))
    (base / "model.safetensors").rename(base / "flipped.safetensors")
    (base / "other.safetensors").rename(base / "model.safetensors")
    edit(base, transformers_weights="flipped.safetensors")
    assert divergence(logits(base), logits(quantized(base, tmp_path / "out"))) < 1e-3


# --- what decides the result ----------------------------------------------------------------------


CHANGES = {
    "rotary scaling": lambda base: edit(
        base, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "epsilon": lambda base: edit(base, rms_norm_eps=0.1),
    "tokenizer": lambda base: _append(base / "tokenizer_config.json"),
    "chat template": lambda base: (base / "chat_template.jinja").write_text("{{ messages }}"),
    "generation config": lambda base: _append(base / "generation_config.json"),
}


def _append(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_of_the_same_weights_is_another_result(
    base: Path, tmp_path: Path, change: str
) -> None:
    method, data, run = build("rtn", bits=8), Calibration("demo", 2, 16), RunOptions()
    before = cached(str(base), method, data, run, tmp_path / "cache")
    out = quantized(base, tmp_path / "out")
    CHANGES[change](base)
    after = cached(str(base), method, data, run, tmp_path / "cache")
    assert before != after
    assert divergence(logits(base), logits(after)) < 1e-3
    with pytest.raises(LLQError, match=r"base_files\.[a-z_]+\.(json|jinja) was"):
        quantized(base, out)
    assert cached(str(base), method, data, run, tmp_path / "cache") == after


# --- the proof ------------------------------------------------------------------------------------


def test_tensors_that_transformers_would_not_load_are_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llq_hf.checkpoints.dense import Checkpoint

    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint,
        "read",
        lambda self, names: {
            name: tensor.flip(0) if "down_proj" in name else tensor
            for name, tensor in read(self, names).items()
        },
    )
    edit(base, rms_norm_eps=2e-5)  # not compared before in this process
    with pytest.raises(
        LLQError, match=r"transformers loads another model\.layers\.0\.mlp\.down_proj"
    ):
        quantized(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_that_transformers_would_not_compute_are_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked = engine_base._walked
    monkeypatch.setattr(engine_base, "_walked", lambda *args: 1.001 * walked(*args))
    edit(base, rms_norm_eps=3e-5)
    with pytest.raises(LLQError, match=r"computes other activations .* \(by 0\.1% of the largest"):
        quantized(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- saved again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["100KB", "5GB"])
def test_save_pretrained_into_the_folder_that_it_came_from(
    base: Path, tmp_path: Path, first: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = quantized(base, tmp_path / "out")
    before, stored = logits(out), inspect_checkpoint(out)["stored_bits"]
    for size in (first, "5GB"):
        AutoModelForCausalLM.from_pretrained(out).save_pretrained(out, max_shard_size=size)
        assert torch.equal(logits(out), before)
        assert inspect_checkpoint(out)["stored_bits"] == stored
        assert is_whole(out)
