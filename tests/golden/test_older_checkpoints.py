"""Checkpoints that commit 277c624 wrote load today, and give the logits that they gave then.

Each folder holds a random Llama (64 x 96, 2 blocks, bf16) packed by one method, one file a block,
as that version wrote them; `logits.safetensors` holds every eighth logit of tokens 2 to 33.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.kernels import reference
from llq_hf.methods import METHODS

FOLDER = Path(__file__).with_name("written_by_277c624")
LOGITS = load_file(FOLDER / "logits.safetensors")


def logits(name: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    with torch.no_grad(), reference():
        return model(torch.arange(2, 34)[None]).logits.float()[0, :, ::8]


def test_every_method_has_one() -> None:
    assert set(LOGITS) == set(METHODS)


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_logits_are_what_they_were(name: str) -> None:
    """By torch's decoding, on any processor: sums of 64 products in bf16, in whatever order."""
    found, expected = logits(name), LOGITS[name]
    assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_it_can_be_inspected(name: str) -> None:
    found = inspect_checkpoint(FOLDER / name)
    assert found["method"] == name
    assert found["quantized_linears"] == 14


@pytest.mark.parametrize("name", ["gptq", "slim_llm"])
def test_it_can_be_saved_again(name: str, tmp_path: Path) -> None:
    """These methods have got options since; what is saved today names them, and is read again."""
    from transformers import AutoModelForCausalLM

    before = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    AutoModelForCausalLM.from_pretrained(FOLDER / name).save_pretrained(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(after) > set(before)
    assert {key: after[key] for key in before if key != "digest"} == {
        key: value for key, value in before.items() if key != "digest"
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), reference():
        found = model(torch.arange(2, 34)[None]).logits.float()[0, :, ::8]
    assert (found - LOGITS[name]).norm() <= 0.01 * LOGITS[name].norm()
