"""What changes in a checkpoint is found, is named with its block, and can be mended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llq_hf import cli
from llq_hf.checkpoints import hashes
from llq_hf.checkpoints.carried import small_files
from llq_hf.checkpoints.format import HASHES, REPORT
from llq_hf.checkpoints.hashes import Hashes, check, damage, damage_once
from llq_hf.checkpoints.journal import Journal
from llq_hf.checkpoints.shards import Shards, digest_of
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.hf_models import QuantizedLlama
from llq_hf.hosts.model_args import ModelArgs
from llq_hf.methods import build
from llq_hf.publish.hub import prepare_upload

MODEL = "model.safetensors"
IN_BLOCK = "model.layers.1.mlp.up_proj.scale"


def quantized(base: Path, out: Path) -> Path:
    quantize_checkpoint(str(base), out, build("rtn", bits=4, group_size=32), Calibration("demo"))
    return out


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny_llama, tmp_path_factory.mktemp("hashes") / "packed")


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage, with its journal."""
    shutil.copyfile(Journal.beside(packed), tmp_path / "copy.journal.jsonl")
    return shutil.copytree(packed, tmp_path / "copy")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LLQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(folder: Path, name: str, byte: int = 0) -> None:
    """Change one bit of a tensor in the file."""
    file = folder / MODEL
    length = int.from_bytes(file.read_bytes()[:8], "little")
    head = json.loads(file.read_bytes()[8 : 8 + length])
    with file.open("r+b") as handle:
        handle.seek(8 + length + head[name]["data_offsets"][0] + byte)
        old = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([old[0] ^ 1]))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def swap(folder: Path, first: str, second: str) -> None:
    """Exchange the places of two tensors of equal shape in the header."""
    file = folder / MODEL
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    a, b = head[first], head[second]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    file.write_bytes(raw[:8] + text + raw[8 + length :])


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_run_writes_the_hashes_of_what_lies_there(packed: Path) -> None:
    found = Hashes.read(packed)
    assert found is not None
    assert found == Hashes.made(packed, small_files(packed))
    every = {name: sha for each in found.tensors for name, sha in each.items()}
    assert every == {n: digest_of(t) for n, t in load_file(packed / MODEL).items()}
    assert len(found.tensors) == 1 + 2  # outside, and two blocks
    assert all(name.startswith("model.layers.1.") for name in found.tensors[2])
    assert found.config == json.loads((packed / "config.json").read_text())
    assert {"tokenizer.json", REPORT} <= set(found.files)
    assert damage(packed) == []


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        (IN_BLOCK, f"{IN_BLOCK} (block 1) is not as it was written"),
        ("model.norm.weight", "model.norm.weight is not as it was written"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight is not as it was written"),
        ("lm_head.weight", "lm_head.weight is not as it was written"),
    ],
)
def test_a_flipped_bit_is_found_and_named(folder: Path, monkeypatch, name, phrase) -> None:
    flip(folder, name)
    assert damage(folder) == [phrase]
    load(folder)  # no tensor is compared at an ordinary load
    monkeypatch.setenv("LLQ_VERIFY", "1")
    with pytest.raises(LLQError, match=name):
        load(folder)


def edit_section(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"].update({key: value})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda config: config["rope_parameters"].update(rope_theta=5e5), "rope_parameters"),
        (lambda config: config.pop("max_position_embeddings"), "max_position_embeddings"),
        (lambda config: config.update(head_dim=32), "head_dim"),
        (lambda config: config.update(tie_word_embeddings=True), "tie_word_embeddings"),
        (edit_section("calibration", {"samples": 1}), "quantization_config.calibration"),
    ],
)
def test_an_edited_field_is_named_at_every_load(folder: Path, change, field) -> None:
    edit_config(folder, change)
    with pytest.raises(LLQError, match=rf"config\.json: {field}.* was .*, is ") as error:
        load(folder)
    assert HASHES in str(error.value)


def test_options_edited_together_with_their_digest_are_found(folder: Path) -> None:
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    from llq_hf.checkpoints.format import PackedConfig

    forged = PackedConfig.from_section({**section, "search_range": True}).to_section()
    edit_config(folder, lambda config: config.update(quantization_config=forged))
    with pytest.raises(LLQError, match=r"search_range was False, is True"):
        load(folder)


def test_fields_that_decide_nothing_may_change(folder: Path) -> None:
    """Nor need those be there that are at transformers' default."""
    edit_config(folder, lambda config: config.update(use_cache=False, transformers_version="9"))
    edit_config(folder, lambda config: config.pop("rope_parameters"))
    load(folder)
    assert damage(folder) == []


def test_tensors_swapped_in_the_header_are_found_without_reading_them(folder: Path) -> None:
    names = [f"model.layers.{block}.input_layernorm.weight" for block in (0, 1)]
    swap(folder, *names)
    with pytest.raises(LLQError, match=r"layers\.0.*\(block 0\).*layers\.1.*\(block 1\)"):
        load(folder)


def test_files_are_found(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    assert sorted(damage(folder)) == [
        "generation_config.json is missing",
        "tokenizer.json is not as it was written",
    ]
    load(folder)  # they are no part of the model
    with pytest.raises(LLQError, match=r"tokenizer\.json"):
        prepare_upload(folder, "me/x")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text(path.read_text().replace('"bytes"', '"size"')),
        lambda path: path.write_text("[]"),
    ],
)
def test_damaged_hashes_do_not_pass_for_good_ones(folder: Path, break_it) -> None:
    break_it(folder / HASHES)
    with pytest.raises(LLQError, match=HASHES):
        load(folder)


@pytest.mark.parametrize("value", [1, [], "../model.safetensors", "model-00009.safetensors"])
def test_an_index_that_lists_no_files_is_refused_in_a_sentence(
    tiny_llama: Path, tmp_path: Path, monkeypatch, value
) -> None:
    monkeypatch.setattr(Shards, "limit_bytes", 100_000)
    folder = quantized(tiny_llama, tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][IN_BLOCK] = value
    index.write_text(json.dumps(content))
    for door in (load, QuantizedLlama.from_pretrained, damage_or_refuse):
        with pytest.raises(LLQError, match=r"weight_map|up_proj\.scale") as error:
            door(folder)
        assert len(str(error.value).splitlines()) == 1


def damage_or_refuse(folder: Path) -> None:
    hashes.refuse(folder, damage(folder))


def test_no_name_in_the_hashes_is_a_path(folder: Path) -> None:
    found = Hashes.read(folder)
    assert found is not None
    Hashes(found.config, found.weights, {"../x": "0"}, found.tensors).write(folder)
    with pytest.raises(LLQError, match=HASHES):
        check(folder)


def test_a_checkpoint_without_hashes_loads_and_verifies_by_its_journal(
    folder: Path, monkeypatch
) -> None:
    (folder / HASHES).unlink()
    load(folder)
    assert damage(folder) == []
    flip(folder, IN_BLOCK)
    assert damage(folder) == [f"{IN_BLOCK} is not as it was written"]
    Journal.beside(folder).unlink()
    load(folder)
    with pytest.raises(LLQError, match="nothing tells"):
        damage(folder)
    monkeypatch.setenv("LLQ_VERIFY", "1")
    with pytest.raises(LLQError, match="nothing tells"):
        load(folder)


# --- it goes on working ---------------------------------------------------------------------------


def test_other_shards_of_the_same_tensors_are_the_same_checkpoint(
    folder: Path, monkeypatch
) -> None:
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    monkeypatch.setattr(Shards, "limit_bytes", 100_000)
    from llq_hf.checkpoints.shards import gathered

    save_file(tensors, folder.parent / "all.safetensors")
    gathered([folder.parent / "all.safetensors"], folder)
    assert not (folder / MODEL).exists()
    assert damage(folder) == []
    load(folder)


@pytest.mark.parametrize("ours", [True, False], ids=["QuantizedLlama", "AutoModel"])
def test_what_save_pretrained_writes_loads_and_is_verified(folder: Path, ours: bool) -> None:
    """Into a new folder, and into the folder that the model came from."""
    model = QuantizedLlama.from_pretrained(folder) if ours else load(folder)
    for target in (folder.with_name("saved"), folder):
        model.save_pretrained(target)
        load(target)
        assert (target / HASHES).is_file() == (ours or target == folder)
        if (target / HASHES).is_file():
            assert hashes.damage(target, weights_only=True) == []


# --- mending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no-journal"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: flip(folder, IN_BLOCK),
        lambda folder: flip(folder, "lm_head.weight"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / MODEL).unlink(),
        lambda folder: edit_config(folder, lambda config: config.pop("num_key_value_heads")),
    ],
    ids=["block", "head", "tokenizer", "file", "config"],
)
def test_the_same_command_mends_what_is_damaged(
    tiny_llama: Path, packed: Path, folder: Path, break_it, journal: bool
) -> None:
    if not journal:
        Journal.beside(folder).unlink()
    break_it(folder)
    quantized(tiny_llama, folder)
    assert damage(folder) == []
    for file in packed.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


# --- who asks -------------------------------------------------------------------------------------


def test_harnesses_verify_once(folder: Path, monkeypatch) -> None:
    read: list[Path] = []
    real = hashes.damage
    monkeypatch.setattr(
        hashes, "damage", lambda path, *rest: read.append(path) or real(path, *rest)
    )
    args = ModelArgs(pretrained=str(folder))
    for _ in range(3):
        assert args.loadable("cpu", None).quantized
    assert read == [folder]
    flip(folder, IN_BLOCK)
    with pytest.raises(LLQError, match=r"block 1"):
        args.loadable("cpu", None)
    assert len(read) == 2


def test_a_read_only_cache_verifies_each_time(folder: Path, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert damage_once(folder) == []
    assert damage_once(folder) == []


def llq(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(part) for part in arguments])
    return result.exit_code, result.output


def test_the_command(folder: Path) -> None:
    content = Hashes.read(folder)
    assert content is not None
    status, text = llq("verify", folder)
    assert status == 0
    assert content.digest in text
    assert llq("info", folder, "--verify")[0] == 0
    flip(folder, IN_BLOCK)
    status, text = llq("verify", folder)
    assert status == 1
    assert f"{IN_BLOCK} (block 1) is not as it was written" in text
    assert llq("info", folder, "--verify")[0] == 1
    assert llq("info", folder)[0] == 0


def test_nothing_damaged_is_pushed_and_hashes_always_are(folder: Path) -> None:
    whole = prepare_upload(folder, "me/x").files
    (folder / HASHES).unlink()
    made = prepare_upload(folder, "me/x").files[HASHES]
    assert isinstance(made, bytes)
    there = whole[HASHES]
    assert isinstance(there, Path)
    (folder / HASHES).write_bytes(made)
    assert Hashes.read(folder) is not None
    Journal.beside(folder).unlink()  # a finished folder whose journal is gone
    flip(folder, IN_BLOCK)
    with pytest.raises(LLQError, match=IN_BLOCK):
        prepare_upload(folder, "me/x")
