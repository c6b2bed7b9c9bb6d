"""Every kind of adapter of the installed peft on packed linears: it computes, trains and merges to
what it does on the same linears dequantized, or it is refused with the cure.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llq_hf import RTNConfig, SmoothQuantConfig
from llq_hf.common.errors import LLQError
from llq_hf.hosts.hf_quantizer import count_quantized
from llq_hf.hosts.peft_tuners import WORKING

KINDS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# These adapt no linear of a block: they add tokens or layers, or tune norms and embeddings.
ELSEWHERE = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING",
    "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "TRAINABLE_TOKENS",
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 100},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "VBLORA": {"num_vectors": 64, "vector_length": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 100},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bias": {"lora_bias": True},
    "alora": {"alora_invocation_tokens": [5]},
}
NO_MERGING = {"BEFT", "LILY", "alora", "bias"}  # of peft, on this model, packed or not
IDS = torch.arange(2, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return make_llama(tmp_path_factory.mktemp("llama"), **sizes)


@pytest.fixture(autouse=True)
def own_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's BOFT leaves CXX=gcc in the environment, and kernels that gcc links do not load: the
    variable is as it was for the tests that come after.
    """
    monkeypatch.setenv("CC", os.environ.get("CC", ""))
    monkeypatch.setenv("CXX", os.environ.get("CXX", ""))


def packed(folder: Path) -> Any:
    config = RTNConfig(bits=4, group_size=32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def config_of(kind: str, **options: Any) -> Any:
    known = {each.name for each in fields(KINDS[kind])}
    given = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    given |= NEEDED.get(kind, {}) | options
    return KINDS[kind](**{key: value for key, value in given.items() if key in known})


def adapted(model: Any, config: Any) -> Any:
    """The model with an adapter of random weights, in eval mode."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


def dequantized(wrapped: Any) -> Any:
    """A copy whose linears are dense, with the same adapter."""
    twin = copy.deepcopy(wrapped)
    twin.get_base_model().dequantize()
    assert count_quantized(twin) == 0
    return twin


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def each_working() -> Iterator[Any]:
    yield from (pytest.param(kind, {}, id=kind) for kind in sorted(WORKING))
    yield from (pytest.param("LORA", options, id=name) for name, options in VARIANTS.items())


def test_every_kind_is_sorted() -> None:
    """A kind that peft adds must be tried: until then it is refused."""
    assert KINDS.keys() >= WORKING
    assert not WORKING & ELSEWHERE


@pytest.mark.parametrize(("kind", "options"), each_working())
def test_it_computes_and_trains_as_on_dense_linears(folder, kind, options):
    model = packed(folder)
    plain = logits(model)
    wrapped = adapted(model, config_of(kind, **options))
    twin = dequantized(wrapped)
    assert not torch.allclose(logits(wrapped), plain, atol=1e-4)  # the adapter does something
    torch.testing.assert_close(logits(wrapped), logits(twin), atol=2e-5, rtol=2e-5)
    for each in (wrapped, twin):
        each(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert grads
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("kind", "options"), [each for each in each_working() if each.id not in NO_MERGING]
)
def test_it_merges_into_a_dense_model(folder, kind, options, tmp_path):
    wrapped = adapted(packed(folder), config_of(kind, **options))
    before = logits(dequantized(wrapped))
    with pytest.warns(UserWarning, match="14 packed linears were dequantized"):
        merged = wrapped.merge_and_unload()
    assert count_quantized(merged) == 0
    torch.testing.assert_close(logits(merged), before, atol=5e-5, rtol=5e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(merged))


def test_merge_adapter_and_unmerge(folder):
    wrapped = adapted(packed(folder), config_of("LORA"))
    before, base = logits(dequantized(wrapped)), logits(packed(folder))
    with pytest.warns(UserWarning, match="the model is dense now"):
        wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), before, atol=2e-5, rtol=2e-5)
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), base, atol=2e-5, rtol=2e-5)


def test_unloading_leaves_the_packed_model(folder):
    plain = logits(packed(folder))
    model = adapted(packed(folder), config_of("LORA")).unload()
    assert count_quantized(model) == 14
    assert torch.equal(logits(model), plain)


def refused() -> Iterator[Any]:
    for kind in sorted(KINDS.keys() - WORKING - ELSEWHERE - {"XLORA"}):  # XLORA: needs others
        yield pytest.param(kind, {}, f"peft_type {kind}", id=kind)
    yield pytest.param("LORA", {"use_dora": True}, "DoRA", id="dora")
    for start in ("pissa", "olora", "orthogonal", "loftq"):
        yield pytest.param("LORA", {"init_lora_weights": start}, start, id=start)


@pytest.mark.parametrize(("kind", "options", "said"), refused())
def test_what_computes_with_dense_weights_is_refused(folder, kind, options, said):
    model = packed(folder)
    if options.get("init_lora_weights") == "loftq":
        options = {**options, "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(LLQError, match=rf"{said}.*q_proj.*packed.*model\.dequantize\(\)"):
        get_peft_model(model, config_of(kind, **options))


def test_the_cure_works(folder):
    """DoRA on a dequantized model: its norm is that of the dense weight."""
    wrapped = adapted(packed(folder).dequantize(), config_of("LORA", use_dora=True))
    layer = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    fresh = get_peft_model(packed(folder).dequantize(), config_of("LORA", use_dora=True))
    magnitude = fresh.get_base_model().model.layers[0].self_attn.q_proj.lora_magnitude_vector
    weight = layer.get_base_layer().weight
    torch.testing.assert_close(magnitude["default"].weight.data, weight.norm(dim=1))
    torch.testing.assert_close(
        logits(wrapped.merge_and_unload()), logits(wrapped), atol=2e-5, rtol=2e-5
    )


def test_a_dense_module_may_have_any_adapter(folder):
    """Only packed linears are refused: the head is dense."""
    wrapped = get_peft_model(packed(folder), config_of("LOHA", target_modules=["lm_head"]))
    assert isinstance(wrapped, PeftModel)
    assert count_quantized(wrapped) == 14


def test_a_method_that_quantizes_activations_merges_nothing(folder):
    config = SmoothQuantConfig(bits=8, calibration=str(folder / "ids.npy"), calibration_samples=2)
    numbers = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    import numpy as np

    np.save(folder / "ids.npy", numbers.numpy())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    wrapped = adapted(model, config_of("LORA"))
    with pytest.raises(LLQError, match="quantizes activations"):
        wrapped.merge_and_unload()
    assert count_quantized(wrapped) == 14
