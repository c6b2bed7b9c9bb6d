"""A model that was just quantized answers three prompts, and its report says what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf.checkpoints.hashes import is_whole
from llq_hf.checkpoints.packed import read_report
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions
from llq_hf.hosts import first_words as module
from llq_hf.hosts.first_words import EMPTY, NOT_FINITE, PROMPTS, REPEATED, TOKENS, first_words
from llq_hf.kernels.dispatch import reference
from llq_hf.methods import build


def on_cpu(*files: Any) -> dict[str, Any]:
    return first_words(*files, "cpu")


def quantized(model: Path, out: Path, speak: Any = on_cpu) -> Any:
    method = build("rtn", bits=4, group_size=32)
    return quantize_checkpoint(str(model), out, method, Calibration(), RunOptions(speak=speak))


@pytest.mark.parametrize(
    ("tokens", "finite", "problem"),
    [
        ([5, 6, 7], True, None),
        ([5] * TOKENS, True, REPEATED),
        ([5] * (TOKENS - 1), True, None),  # and then the end of the text
        ([5] * (TOKENS - 1) + [6], True, None),
        ([2], True, EMPTY),
        ([], True, EMPTY),
        ([5, 6, 7], False, NOT_FINITE),
    ],
)
def test_what_is_no_language(tokens: list[int], finite: bool, problem: str | None):
    assert module.problem_of(tokens, finite) == problem


def test_the_report_holds_what_generate_says(tiny_llama: Path, tmp_path: Path):
    report = quantized(tiny_llama, tmp_path / "out")
    assert is_whole(tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(TOKENS):
            next_id = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, next_id.view(1, 1)], 1)
            if int(next_id) == model.generation_config.eos_token_id:
                break
        given = len(tokenizer(prompt)["input_ids"])
        expected.append([prompt, tokenizer.decode(ids[0, given:], skip_special_tokens=True)])
    assert report["first_words"]["answers"] == expected


def test_it_speaks_before_anything_can_load_the_folder_and_with_kernels(
    tiny_llama: Path, tmp_path: Path
):
    seen: list[tuple[bool, int]] = []

    def speak(folder: Path, *_: Any) -> dict[str, Any]:
        seen.append(((folder / "config.json").exists(), reference.depth))
        return {"skipped": "a test"}

    quantized(tiny_llama, tmp_path / "out", speak)
    assert seen == [(False, 0)]
    assert quantized(tiny_llama, tmp_path / "out", speak)["first_words"] == {"skipped": "a test"}
    assert len(seen) == 1, "what is done is not done again"


def test_a_broken_model_is_named(tiny_llama: Path, tmp_path: Path):
    """A tensor that no method looks at makes logits infinite."""
    from safetensors.torch import load_file, save_file

    report = quantized(tiny_llama, out := tmp_path / "out")
    assert NOT_FINITE not in report["first_words"].get("problem", "")
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, as loading asks, and overflowing
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "llq_hashes.json").unlink()  # the tensors are others now
    assert first_words(out, config, 1, "cpu")["problem"] == NOT_FINITE
    (out / "model.safetensors").unlink()
    assert first_words(out, config, 1, "cpu")["problem"].startswith("an error (")


def test_what_cannot_speak_is_left_out(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantized(tiny_llama, out := tmp_path / "out", None)
    assert "first_words" not in read_report(out)
    config = json.loads((out / "config.json").read_text())
    free = psutil.virtual_memory().available
    assert "GiB are free" in first_words(out, config, free * 2, "cpu")["skipped"]
    for file in out.glob("*token*"):
        file.unlink()
    assert first_words(out, config, 1, "cpu") == {"skipped": "the folder has no tokenizer"}
