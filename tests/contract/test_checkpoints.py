"""The contract of a checkpoint: what a streamed run writes loads, in all ways in which people load
models.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.cases import CHECKPOINTS
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llq_hf.checkpoints.dense import Checkpoint, Rewritten
from llq_hf.checkpoints.format import HASHES
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.hf_quantizer import CONFIGS, check_quantized, count_quantized
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Method, field_types
from llq_hf.methods import METHODS, build
from llq_hf.models.load import build_skeleton

LINEARS = 2 * 7
Run = Callable[..., Path]

each_checkpoint = pytest.mark.parametrize(
    ("name", "bits", "options"),
    CHECKPOINTS,
    ids=[f"{name}-{bits}-bits" for name, bits, _ in CHECKPOINTS],
)
once_per_method = pytest.mark.parametrize(
    ("name", "bits", "options"),
    [next(row for row in CHECKPOINTS if row[0] == name) for name in METHODS],
    ids=list(METHODS),
)


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, calibration_npy: Path
) -> Callable[[Path, str, int, dict[str, Any]], Path]:
    """Makes packed checkpoints by streamed runs, each once, and gives their folders."""
    made: dict[str, Path] = {}

    def make(base: Path, name: str, bits: int, options: dict[str, Any]) -> Path:
        key = json.dumps([str(base), name, bits, options])
        if key not in made:
            out = tmp_path_factory.mktemp("packed") / "out"
            quantize_checkpoint(
                str(base),
                out,
                build(name, bits=bits, **options),
                Calibration(str(calibration_npy), samples=8),
            )
            made[key] = out
        return made[key]

    return make


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def packed_of(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor of every quantized linear, by its name in the file."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for key, tensor in module.packed().items()
    }


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def bound_method(base: Path, name: str, bits: float, options: dict[str, Any]) -> Method:
    """The method with the facts of this model filled in, as in a run."""
    return build(name, bits=bits, **options).bound_to(build_skeleton(base))


def rewritten(base: Path, method: Method) -> Checkpoint:
    """The dense checkpoint after the method's rewrite, which most methods do not have."""
    checkpoint = Checkpoint.open(str(base))
    return Rewritten.of(checkpoint, method.rewrite(build_skeleton(checkpoint.path), {}))


def file_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@each_checkpoint
def test_loading_twice_sharded_and_dispatched_gives_the_same_logits(
    quantized: Run,
    tiny_llama: Path,
    calibration_ids: Tensor,
    tmp_path: Path,
    name: str,
    bits: int,
    options: dict,
):
    folder = quantized(tiny_llama, name, bits, options)
    first = load(folder)
    assert count_quantized(first) == LINEARS
    assert check_quantized(first).method == bound_method(tiny_llama, name, bits, options)
    expected = logits(first, calibration_ids)
    assert torch.isfinite(expected).all()
    stored = packed_of(first)
    assert_same_tensors(
        stored, {key: t for key, t in file_tensors(folder).items() if key in stored}
    )

    def same(model: nn.Module) -> None:
        assert_same_tensors(stored, packed_of(model))
        assert torch.equal(logits(model, calibration_ids), expected)

    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    same(second)
    second.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    same(load(tmp_path / "sharded"))
    same(load(folder, device_map="auto"))
    same(load(folder, device_map={"": "cpu"}))
    section = json.loads((tmp_path / "sharded" / "config.json").read_text())["quantization_config"]
    assert section == json.loads((folder / "config.json").read_text())["quantization_config"]


@each_checkpoint
def test_a_streamed_run_equals_quantizing_on_loading(
    quantized: Run,
    tiny_llama: Path,
    calibration_ids: Tensor,
    calibration_npy: Path,
    tmp_path: Path,
    name: str,
    bits: int,
    options: dict,
):
    streamed = load(quantized(tiny_llama, name, bits, options))
    config = CONFIGS[name](
        bits=bits, **options, calibration=str(calibration_npy), calibration_samples=8
    )
    direct = load(tiny_llama, quantization_config=config)
    assert_same_tensors(packed_of(streamed), packed_of(direct))
    assert torch.equal(logits(streamed, calibration_ids), logits(direct, calibration_ids))
    direct.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_tensors(packed_of(streamed), packed_of(again))
    assert torch.equal(logits(streamed, calibration_ids), logits(again, calibration_ids))


@once_per_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loading_in_another_dtype_keeps_what_is_stored(
    quantized: Run,
    tiny_llama: Path,
    calibration_ids: Tensor,
    dtype: torch.dtype,
    name: str,
    bits: int,
    options: dict,
):
    folder = quantized(tiny_llama, name, bits, options)
    reference = load(folder)
    model = load(folder, dtype=dtype)
    assert model.model.norm.weight.dtype == dtype
    assert_same_tensors(packed_of(reference), packed_of(model))
    y, expected = logits(model, calibration_ids).float(), logits(reference, calibration_ids)
    assert (y - expected).norm() <= (1e-6 if dtype == torch.float32 else 0.05) * expected.norm()


@once_per_method
def test_blocks_that_stay_on_disk_compute_the_same(
    quantized: Run,
    tiny_llama: Path,
    calibration_ids: Tensor,
    tmp_path: Path,
    name: str,
    bits: int,
    options: dict,
):
    folder = quantized(tiny_llama, name, bits, options)
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits(model, calibration_ids), logits(load(folder), calibration_ids))


@once_per_method
def test_dequantizing_gives_the_dense_model_or_says_why_not(
    quantized: Run,
    tiny_llama: Path,
    calibration_ids: Tensor,
    tmp_path: Path,
    name: str,
    bits: int,
    options: dict,
):
    model = load(quantized(tiny_llama, name, bits, options))
    expected = logits(model, calibration_ids)
    if not model.config.quantization_config.method.weight_only:
        with pytest.raises(LLQError, match="quantizes activations"):
            model.dequantize()
        assert torch.equal(logits(model, calibration_ids), expected)
        return
    model.dequantize()
    assert count_quantized(model) == 0
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    for dense in (model, load(tmp_path)):
        y = logits(dense, calibration_ids)
        assert (y - expected).norm() <= 1e-5 * expected.norm()


@once_per_method
def test_casting_a_model_keeps_what_is_stored(
    quantized: Run, tiny_llama: Path, calibration_ids: Tensor, name: str, bits: int, options: dict
):
    model = load(quantized(tiny_llama, name, bits, options))
    stored = {key: t.clone() for key, t in packed_of(model).items()}
    expected = logits(model, calibration_ids)
    # Transformers forbids .half() and .float() by name
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ):
        model.to(dtype)
        assert_same_tensors(stored, packed_of(model))
    # Norms and embeddings went through fp16 and bf16: close, not equal
    y = logits(model, calibration_ids)
    assert (y - expected).norm() <= 0.05 * expected.norm()


@each_checkpoint
def test_stored_bits_in_the_file_are_those_declared(
    quantized: Run, tiny_llama: Path, name: str, bits: int, options: dict
):
    folder = quantized(tiny_llama, name, bits, options)
    method = bound_method(tiny_llama, name, bits, options)
    dense, tensors = file_tensors(tiny_llama), file_tensors(folder)
    report = json.loads((folder / "llq_report.json").read_text())
    assert len(report["linears"]) == LINEARS
    total = weights = 0
    for record in report["linears"]:
        out_features, in_features = dense[record["name"] + ".weight"].shape
        mine = {key: t for key, t in tensors.items() if key.startswith(record["name"] + ".")}
        layout = method.for_linear(record["name"]).layout(out_features, in_features)
        assert set(mine) == {f"{record['name']}.{key}" for key in layout}
        nbytes = sum(t.numel() * t.element_size() for t in mine.values())
        assert nbytes == sum(spec.nbytes for spec in layout.values())
        assert record["stored_bits"] == pytest.approx(nbytes * 8 / (out_features * in_features))
        total, weights = total + nbytes * 8, weights + out_features * in_features
    assert report["bits"]["stored"] == pytest.approx(total / weights)
    assert report["bits"]["nominal"] == method.nominal_bits
    everything = sum(t.numel() * t.element_size() for t in tensors.values())
    assert report["bits"]["bytes"] == everything
    parameters = sum(t.numel() for t in dense.values())
    assert report["bits"]["whole_model"] == pytest.approx(everything * 8 / parameters)


@once_per_method
@pytest.mark.parametrize(
    "base", ["tiny_llama", "tiny_llama_bf16", "tiny_llama_tied", "tiny_llama_biased"]
)
def test_everything_else_is_bitwise_the_base(
    quantized: Run,
    request: pytest.FixtureRequest,
    calibration_ids: Tensor,
    tmp_path: Path,
    base: str,
    name: str,
    bits: int,
    options: dict,
):
    """Embeddings, head, norms and biases keep names, dtypes and bytes, also when loaded.

    If a method rewrites the model, they are those of its rewrite, which its own tests check.
    """
    dense_folder = request.getfixturevalue(base)
    folder = quantized(dense_folder, name, bits, options)
    source = rewritten(dense_folder, bound_method(dense_folder, name, bits, options))
    dense, tensors = source.read(source.files), file_tensors(folder)
    replaced = {key for key in dense if ".layers." in key and key.endswith("_proj.weight")}
    assert len(replaced) == LINEARS
    model = load(folder)
    loaded = model.state_dict()
    for key in set(dense) - replaced:
        assert tensors[key].dtype == dense[key].dtype, key
        assert torch.equal(tensors[key], dense[key]), key
        assert torch.equal(loaded[key], dense[key]), key
    for key in replaced:
        assert tensors[key].dtype == torch.int32
        assert tensors[key].shape != dense[key].shape
    if base == "tiny_llama_tied" and source.config["tie_word_embeddings"]:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits(model, calibration_ids)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_tensors(dict(loaded), dict(again.state_dict()))
    assert torch.equal(logits(again, calibration_ids), expected)
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("quantization_config")
    assert saved == source.config


@each_checkpoint
def test_a_loaded_model_is_as_large_as_its_file_also_after_use(
    quantized: Run, tiny_llama: Path, calibration_ids: Tensor, name: str, bits: int, options: dict
):
    """The model keeps no dense copy and no cache: its storages add up to the size of the file."""
    folder = quantized(tiny_llama, name, bits, options)
    model = load(folder)
    logits(model, calibration_ids)
    held = {}
    for module in model.modules():
        for value in (
            *vars(module).values(),
            *module._parameters.values(),
            *module._buffers.values(),
        ):
            if isinstance(value, Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    in_file = sum(t.numel() * t.element_size() for t in file_tensors(folder).values())
    assert 0.9 * in_file <= sum(held.values()) <= 1.1 * in_file


@once_per_method
def test_a_loaded_model_generates(
    quantized: Run, tiny_llama: Path, name: str, bits: int, options: dict
):
    model = load(quantized(tiny_llama, name, bits, options))
    out = model.generate(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=None,
    )
    assert out.shape == (1, 7)


def test_without_the_plugin_loading_fails_loudly(quantized: Run, tiny_llama: Path):
    """There are no random weights after a warning, because the packed shape does not fit."""
    folders = [quantized(tiny_llama, name, bits, options) for name, bits, options in CHECKPOINTS]
    script = """
import json, sys
from transformers import AutoModelForCausalLM
said = []
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        said.append("loaded")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
assert not any(name.startswith("llq_hf.") and name != "llq_hf._startup" for name in sys.modules)
print("SAID" + json.dumps(said))
"""
    environment = {**os.environ, "LLQ_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in json.loads(done.stdout.split("SAID")[1]):
        assert text.startswith("RuntimeError"), text
        assert "size" in text, text


@once_per_method
def test_token_ids_need_no_tokenizer(
    tiny_llama: Path, calibration_npy: Path, tmp_path: Path, name: str, bits: int, options: dict
):
    """A folder that has only weights and config can be calibrated on a .npy file of ids."""
    base = tmp_path / "base"
    base.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama / file, base)
    method = build(name, bits=bits, **options)
    quantize_checkpoint(
        str(base), tmp_path / "out", method, Calibration(str(calibration_npy), samples=8)
    )
    config = CONFIGS[name](
        bits=bits, **options, calibration=str(calibration_npy), calibration_samples=8
    )
    assert_same_tensors(
        packed_of(load(tmp_path / "out")), packed_of(load(base, quantization_config=config))
    )


# --- quantization configs -------------------------------------------------------------------------


@once_per_method
def test_config_json_round_trip(
    quantized: Run, tiny_llama: Path, name: str, bits: int, options: dict
):
    folder = quantized(tiny_llama, name, bits, options)
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    section = AutoConfig.from_pretrained(folder).quantization_config
    again = CONFIGS[name].from_dict(section if isinstance(section, dict) else section.to_dict())
    assert again.to_dict() == raw
    assert json.loads(json.dumps(again.to_dict())) == raw
    assert again.method == bound_method(tiny_llama, name, bits, options)
    assert raw["quant_method"] == f"llq_{name}"
    again.packed.check()


@pytest.mark.parametrize("name", METHODS)
def test_config_types_refuse_what_methods_refuse(name: str):
    with pytest.raises(LLQError, match="did you mean 'bits'"):
        CONFIGS[name](bit=3)
    kind = field_types(METHODS[name])["bits"]
    with pytest.raises(LLQError, match=f"should be of type {kind.__name__}"):
        CONFIGS[name](bits="3")
    with pytest.raises(LLQError, match="bits=11"):
        CONFIGS[name](bits=11)


@once_per_method
def test_a_missing_tensor_or_an_edited_option_is_refused(
    quantized: Run, tiny_llama: Path, tmp_path: Path, name: str, bits: int, options: dict
):
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "edited"
    shutil.copytree(quantized(tiny_llama, name, bits, options), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bits"] = bits + 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LLQError, match=r"edited|outside its (only width|range)"):
        load(folder)

    folder = tmp_path / "incomplete"
    shutil.copytree(quantized(tiny_llama, name, bits, options), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    removed = next(key for key in tensors if key.endswith("_proj.scale"))
    save_file(
        {key: t for key, t in tensors.items() if key != removed}, file, metadata={"format": "pt"}
    )
    with pytest.raises(LLQError, match=rf"{removed} \(block \d\) is missing"):
        load(folder)
    (folder / HASHES).unlink()  # as of an older version
    with pytest.raises(LLQError, match=f"lacks {removed}"):
        load(folder)
