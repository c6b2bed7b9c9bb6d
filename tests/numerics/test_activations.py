"""Token grids against loops over single values, and quantized attention inside real models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llq_hf.common.errors import LLQError
from llq_hf.layers import attention
from llq_hf.numerics.activations import Attention, TokenQuant, pass_through, round_through


def slow(quant: TokenQuant, x_TI: Tensor) -> Tensor:
    """Value by value, as the formulas in the module's docstring."""
    out_TI = x_TI.clone()
    size = x_TI.shape[1] if quant.group_size == -1 else quant.group_size
    for t in range(x_TI.shape[0]):
        for start in range(0, x_TI.shape[1], size):
            group = [float(v) for v in x_TI[t, start : start + size]]
            for k, value in enumerate(group):
                if quant.sym:
                    top = 2 ** (quant.bits - 1) - 1
                    scale = max(max(abs(v) for v in group) / top, 1e-5)
                    out_TI[t, start + k] = scale * min(max(round(value / scale), -top - 1), top)
                else:
                    low, high = min(group), max(group)
                    if quant.zero_inside:
                        low, high = min(low, 0.0), max(high, 0.0)
                    scale = max((high - low) / (2**quant.bits - 1), 1e-5)
                    zero = round(-low / scale)
                    out_TI[t, start + k] = scale * (
                        min(max(round(value / scale) + zero, 0), 2**quant.bits - 1) - zero
                    )
    return out_TI


QUANTS = [
    TokenQuant(bits, sym, group, inside)
    for bits in (2, 4, 8)
    for sym, inside in ((True, False), (False, False), (False, True))
    for group in (-1, 8)
]


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_equals_the_formula_value_by_value(quant: TokenQuant):
    # Off centre: zero_inside matters
    x_TI = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) + 0.7
    x_TI[2] = 0
    x_TI[3] = x_TI[3].abs() + 1
    assert torch.allclose(quant(x_TI), slow(quant, x_TI), atol=1e-6)


def test_sixteen_bits_are_off_and_nonsense_is_refused():
    x = torch.randn(3, 8)
    assert TokenQuant()(x) is x
    for wrong in ({"bits": 1}, {"bits": 17}, {"group_size": 0}):
        with pytest.raises(LLQError):
            TokenQuant(**wrong)
    with pytest.raises(LLQError, match="do not divide"):
        TokenQuant(4, group_size=5)(x)


def test_integer_codes_are_those_of_the_fake_quantization():
    x, quant = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)), TokenQuant(6)
    codes, scale = quant.codes(x)
    assert codes.dtype == torch.int8
    assert torch.equal(codes * scale, quant(x))


def test_bf16_is_quantized_in_fp32_and_comes_back_as_bf16():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(TokenQuant(8)(x), TokenQuant(8)(x.float()).bfloat16())


@pytest.mark.parametrize("sym", [True, False])
def test_gradient_passes_the_rounding(sym: bool):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    TokenQuant(4, sym)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 1  # plain rounding has none


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(request.param)
    return model


IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def test_attention_that_does_nothing_changes_nothing(model: LlamaForCausalLM):
    before = model(IDS).logits
    assert attention.install(model, Attention()) == 2
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_quantized_keys_change_logits_survive_copies_and_leave_the_saved_config_alone(
    model, tmp_path
):
    before = model(IDS).logits
    attention.install(model, Attention(key=TokenQuant(3, sym=False), joint_key=True))
    after = model(IDS).logits
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, after)
    other = "eager" if model.config._attn_implementation == "sdpa" else "sdpa"
    model.set_attn_implementation(other)  # the user's later choice is followed
    assert torch.allclose(model(IDS).logits, after, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "llq" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_queries_keys_and_values_are_each_quantized_where_asked(model: LlamaForCausalLM):
    before, coarse, results = model(IDS).logits, TokenQuant(3), []
    for parts in (
        {"query": coarse},
        {"key": coarse},
        {"value": coarse},
        {"key": coarse, "joint_key": True},
    ):
        twin = copy.deepcopy(model)
        attention.install(twin, Attention(**parts))
        results.append(twin(IDS).logits)
    for i, result in enumerate(results):
        assert all((result - other).abs().max() > 1e-3 for other in [before, *results[:i]])


@torch.no_grad()
def test_cached_generation_sees_the_same_keys(model: LlamaForCausalLM):
    attention.install(
        model, Attention(key=TokenQuant(4, sym=False), value=TokenQuant(4, sym=False))
    )
    whole = model(IDS).logits[:, -1]
    cache = model(IDS[:, :-1], use_cache=True).past_key_values
    assert torch.allclose(model(IDS[:, -1:], past_key_values=cache).logits[:, -1], whole, atol=1e-4)


def test_a_model_without_attention_is_refused():
    with pytest.raises(LLQError, match="stays 16 bits"):
        attention.install(torch.nn.Linear(2, 2), Attention())


@torch.no_grad()
def test_turned_queries_and_keys_give_the_same_scores(model: LlamaForCausalLM):
    before = model(IDS).logits
    attention.install(model, Attention(hadamard=True))
    after = model(IDS).logits
    assert torch.allclose(after, before, atol=1e-4)
    assert not torch.equal(after, before)  # they were turned


def test_a_value_passes_the_gradient_through():
    x = torch.tensor([0.2, 1.7, -2.6], requires_grad=True)
    y = pass_through(x, torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64))
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert y.dtype == x.dtype
    assert torch.allclose(y.detach(), torch.tensor([1.0, 2.0, -2.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    assert round_through(torch.tensor([0.5, 1.5, -2.6])).tolist() == [0.0, 2.0, -3.0]
