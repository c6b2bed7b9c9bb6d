"""QuantizedLlama and QuantizedLlavaNext: from a dense model, from a packed one, and what it saves
and pushes.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaNextForConditionalGeneration,
)

from llq_hf import LLQError, QuantizedLlama, QuantizedLlavaNext, RTNConfig
from llq_hf.checkpoints.format import HASHES
from llq_hf.hosts.hf_quantizer import check_quantized
from llq_hf.layers.kv_cache import PackedLayer


@pytest.fixture
def model(tiny_llama: Path, calibration_npy: Path) -> QuantizedLlama:
    return QuantizedLlama.from_pretrained(
        tiny_llama, method="quip", bits=3, calibration=str(calibration_npy)
    )


def test_quantizes_saves_and_loads(model: QuantizedLlama, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    ids = torch.arange(12)[None]
    for kind in (AutoModelForCausalLM, QuantizedLlama, LlamaForCausalLM):
        again = kind.from_pretrained(tmp_path)
        check_quantized(again)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_generates(model: QuantizedLlama) -> None:
    out = model.generate(torch.arange(4)[None], max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= 9


def test_generates_with_a_packed_cache(tiny_llama: Path, tmp_path: Path) -> None:
    """It goes into generation_config.json, so the auto class generates with it, too."""
    own = QuantizedLlama.from_pretrained(tiny_llama, method="rtn", bits=4, kv_cache_bits=4)
    own.save_pretrained(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    for each in (own, AutoModelForCausalLM.from_pretrained(tmp_path)):
        cache = each.generate(torch.arange(4)[None], **options).past_key_values
        assert {type(layer) for layer in cache.layers} == {PackedLayer}
        assert cache.layers[0].nbits == 4
    with pytest.raises(LLQError, match="a cache of 1 bits is outside"):
        QuantizedLlama.from_pretrained(tmp_path, kv_cache_bits=1)


def test_pushes_what_it_saves(
    model: QuantizedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload itself is the Hub client's; what goes up is what save_pretrained wrote, under the
    name asked for.
    """
    pushed = []
    monkeypatch.setattr(QuantizedLlama, "push_to_hub", lambda self, repo_id: pushed.append(repo_id))
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="user/quip-3bit")
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert pushed == ["user/quip-3bit", "named"]


def test_options_without_a_method_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(LLQError, match=r"bits is an option of a method: give method="):
        QuantizedLlama.from_pretrained(tiny_llama, bits=2)


def test_a_method_and_a_config_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(LLQError, match="not both"):
        QuantizedLlama.from_pretrained(
            tiny_llama, method="rtn", quantization_config=RTNConfig(bits=4)
        )


def test_llava_next_quantizes_saves_and_loads(
    tiny_llava: Path, calibration_npy: Path, tmp_path: Path
) -> None:
    model = QuantizedLlavaNext.from_pretrained(
        tiny_llava, method="gptq", bits=3, calibration=str(calibration_npy)
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlavaNextForConditionalGeneration"
    ]
    ids = torch.arange(12)[None]
    for kind in (
        AutoModelForImageTextToText,
        QuantizedLlavaNext,
        LlavaNextForConditionalGeneration,
    ):
        again = kind.from_pretrained(tmp_path)
        assert check_quantized(again).quantized_linears == 14
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "sliu"),
        ("num_key_value_heads", 0),
        ("vocab_size", -1),
        ("head_dim", 0),
    ],
)
def test_an_edited_field_is_the_config_s_fault(
    field: str, value: object, tiny_llama: Path, tmp_path: Path
) -> None:
    """Where there are no hashes to tell, the error names the file instead of a line inside of
    transformers.
    """
    config = RTNConfig(bits=4)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config).save_pretrained(
        tmp_path
    )
    assert not (tmp_path / HASHES).exists()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(LLQError, match=r"config\.json describes no model: "):
        AutoModelForCausalLM.from_pretrained(tmp_path)
