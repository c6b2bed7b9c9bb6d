"""The packed cache of keys and values: what attention reads, how it moves, how much it takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from llq_hf.common.errors import LLQError
from llq_hf.kernels.bitpack import packed_words
from llq_hf.layers.kv_cache import (
    KEYS,
    VALUES,
    PackedLayer,
    Packing,
    described,
    generate_packed,
)
from llq_hf.numerics.rotations import hadamard

WINDOW = 6
CONFIG = {"backend": "llq", "q_group_size": 8, "residual_length": WINDOW}


# --- literal references ---------------------------------------------------------------------------


def rounded(x_BHSD: Tensor, bits: int, group: int) -> Tensor:
    """Each group of channels of each token of each head, number by number."""
    out_BHSD = torch.empty_like(x_BHSD)
    B, H, S, D = x_BHSD.shape
    for b, h, s in torch.cartesian_prod(*map(torch.arange, (B, H, S))).tolist():
        for start in range(0, D, group):
            numbers = [float(x) for x in x_BHSD[b, h, s, start : start + group]]
            low = float(torch.tensor(min(numbers)).half())
            scale = float(torch.tensor((max(numbers) - low) / (2**bits - 1)).half())
            scale = max(scale, 2.0**-24)
            for i, x in enumerate(numbers):
                code = min(max(round((x - low) / scale), 0), 2**bits - 1)
                out_BHSD[b, h, s, start + i] = low + scale * code
    return out_BHSD


def rounded_keys(x_BHSD: Tensor, bits: int, group: int) -> Tensor:
    """The same of keys, whose heads are turned by a Hadamard transform while they are rounded."""
    turn_DD = hadamard(x_BHSD.shape[-1], torch.device("cpu")).apply(torch.eye(x_BHSD.shape[-1]))
    return rounded(x_BHSD @ turn_DD, bits, group) @ turn_DD.T


class SlowLayer(DynamicLayer):
    """Full-precision tensors, in which old tokens are replaced by their rounded values: those of
    the prompt after it, later ones when WINDOW of them are there.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.coded = bits, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        first = not self.is_initialized
        read = super().update(key_states, value_states)
        length = self.get_seq_length()
        if first or length - self.coded >= WINDOW:
            old, new = slice(0, self.coded), slice(self.coded, None)
            self.keys, self.values = (
                torch.cat([x[:, :, old], slow(x[:, :, new], self.bits, 8)], 2)
                for x, slow in zip(read, (rounded_keys, rounded), strict=True)
            )
            self.coded = length
        return read


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    """Heads of 16, so two ranges a head and token."""
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def slow_cache(model: Any, bits: int) -> Cache:
    return Cache(layers=[SlowLayer(bits) for _ in range(model.config.num_hidden_layers)])


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_of_each_range(bits: int, dtype: torch.dtype) -> None:
    x_BHSD = random_states(2, 3, 4, 24).mul(3).add(1).to(dtype)
    x_BHSD[0, 0, 0] = 0.0  # a range of no width
    x_BHSD[0, 0, 1, :8] = 5.0
    packing = Packing.of(x_BHSD, bits, 8, turned=False)
    packed = packing.encode(x_BHSD)
    assert packed.shape == (2, 4, packed_words(3 * 24, bits) + 3 * 3)
    found = packing.decode(packed, x_BHSD[:, :, :0])
    assert torch.equal(found, rounded(x_BHSD.float(), bits, 8).to(dtype))
    recent = x_BHSD[:, :, 2:]
    both = packing.decode(packed, recent)
    assert torch.equal(both, torch.cat([found, recent], 2))


def test_what_is_not_a_number_stays_so() -> None:
    x_BHSD = random_states(1, 2, 2, 16)
    x_BHSD[0, 1, 0, 3] = float("nan")
    packing = Packing.of(x_BHSD, 4, 8, turned=False)
    found = packing.decode(packing.encode(x_BHSD), x_BHSD[:, :, :0])
    assert torch.isnan(found[0, 1, 0, :8]).all()
    assert int(torch.isnan(found).sum()) == 8


def test_turned_keys_lose_their_outliers() -> None:
    """One channel is 30 times as large as the others: at 4 bits, less than a third of the error."""
    x_BHSD = random_states(1, 2, 50, 64)
    x_BHSD[..., 5] *= 30
    errors = []
    for turned in (False, True):
        packing = Packing.of(x_BHSD, 4, 64, turned)
        found = packing.decode(packing.encode(x_BHSD), x_BHSD[:, :, :0])
        errors.append(float((found - x_BHSD).norm() / x_BHSD.norm()))
    assert errors[1] < errors[0] / 3


# --- generation -----------------------------------------------------------------------------------


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    ids = torch.randint(2, 320, (len(lengths), longest), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(1,), (WINDOW,), (9, 5, 11)], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_generation_is_that_of_the_slow_cache(
    model: Any, bits: int, lengths: tuple[int, ...]
) -> None:
    """The logits of 20 tokens, so that several windows are quantized; and not those of full
    precision.
    """
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    given = padded(lengths)
    found, again = (
        model.generate(
            **given,
            **options,
            cache_implementation="quantized",
            cache_config={**CONFIG, "nbits": bits},
        )
        for _ in range(2)
    )
    slow = model.generate(**given, **options, past_key_values=slow_cache(model, bits))
    full = model.generate(**given, **options)
    assert isinstance(found.past_key_values, QuantizedCache)
    assert all(type(layer) is PackedLayer for layer in found.past_key_values.layers)
    assert torch.equal(found.sequences, slow.sequences)
    for one, other, twin in zip(found.logits, slow.logits, again.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert torch.equal(one, twin)
    assert not torch.allclose(found.logits[-1], full.logits[-1], atol=1e-4)


def test_beams_are_reordered(model: Any) -> None:
    options = {"max_new_tokens": 16, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    given = padded((7, 4))
    found = model.generate(
        **given,
        **options,
        cache_implementation="quantized",
        cache_config={**CONFIG, "nbits": 4},
    )
    slow = model.generate(**given, **options, past_key_values=slow_cache(model, 4))
    assert torch.equal(found, slow)


def test_prompt_lookup_goes_back(model: Any) -> None:
    """Guessed tokens that were wrong are cropped, and the cache stays as long as the text is."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    out = model.generate(
        ids,
        max_new_tokens=12,
        prompt_lookup_num_tokens=3,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        past_key_values=QuantizedCache("llq", model.config, nbits=8, residual_length=4),
    )
    assert out.sequences.shape == (1, 24)
    assert out.past_key_values.get_seq_length() == 23


# --- tokens and sequences that move ---------------------------------------------------------------


def filled(prompt: int, later: int, batch: int = 2) -> tuple[PackedLayer, Tensor, Tensor]:
    """A layer with a prompt and later tokens one by one; what attention read at last."""
    layer = PackedLayer(4, q_group_size=8, residual_length=WINDOW)
    keys, values = (random_states(batch, 2, prompt + later, 16, seed=seed) for seed in (1, 2))
    layer.update(keys[:, :, :prompt], values[:, :, :prompt])
    for place in range(prompt, prompt + later):
        layer.update(keys[:, :, place : place + 1], values[:, :, place : place + 1])
    return layer, *held(layer)


def held(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """All keys and values that a layer holds."""
    return (
        layer._dequantize(layer._quantized_keys, layer.keys, KEYS),
        layer._dequantize(layer._quantized_values, layer.values, VALUES),
    )


@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, WINDOW + 1, 20])
def test_lengths_and_what_stays_in_full_precision(prompt: int) -> None:
    for later in range(2 * WINDOW + 2):
        layer, keys, values = filled(prompt, later)
        assert layer.get_seq_length() == prompt + later == keys.shape[2]
        assert layer.get_mask_sizes(3) == (prompt + later + 3, 0)
        assert layer.get_max_length() == -1
        assert layer.keys.shape == layer.values.shape == (2, 2, later % WINDOW, 16)
        coded = prompt + later - later % WINDOW
        for found, seed, slow in ((keys, 1, rounded_keys), (values, 2, rounded)):
            exact = random_states(2, 2, prompt + later, 16, seed=seed)
            assert torch.equal(found[:, :, coded:], exact[:, :, coded:])
            assert torch.allclose(found[:, :, :coded], slow(exact[:, :, :coded], 4, 8), atol=1e-5)


@pytest.mark.parametrize("removed", [0, 1, 2, 3, 9, 12])
def test_cropping_forgets_the_last_tokens(removed: int) -> None:
    """Recent ones, coded ones, or all; then the layer goes on."""
    layer, keys, values = filled(7, WINDOW + 2)
    length = 7 + WINDOW + 2
    twin = copy.deepcopy(layer)
    layer.crop(-removed)
    assert layer.get_seq_length() == length - removed
    for found, before in zip(held(layer), (keys, values), strict=True):
        assert torch.equal(found, before[:, :, : length - removed])
    if removed:
        twin.crop(length - removed)  # as older versions of transformers say it
        assert torch.equal(held(twin)[0], held(layer)[0])
    new = random_states(2, 2, 1, 16, seed=9)
    read, _ = layer.update(new, new)
    assert torch.equal(read, torch.cat([keys[:, :, : length - removed], new], 2))
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    assert held(layer)[0].shape[2] == 0


def test_sequences_are_chosen_repeated_and_forgotten() -> None:
    layer, keys, values = filled(7, 4, batch=3)
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), lambda t: t[[2, 0, 0]]),
        "batch_select_indices": (torch.tensor([1, 2]), lambda t: t[1:]),
        "batch_repeat_interleave": (2, lambda t: t.repeat_interleave(2, 0)),
    }
    for name, (argument, change) in changes.items():
        twin = copy.deepcopy(layer)
        getattr(twin, name)(argument)
        for found, before in zip(held(twin), (keys, values), strict=True):
            assert torch.equal(found, change(before)), name
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0
    layer.reorder_cache(torch.tensor([0]))  # nothing is there to be moved
    new = random_states(1, 2, 5, 16)
    assert torch.equal(layer.update(new, new)[0], new)  # another batch
    assert layer.get_seq_length() == 5


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(2, 0.19), (4, 0.31), (8, 0.56)])
def test_memory_of_4096_tokens(bits: int, share: float) -> None:
    """Counted from the tensors, for heads of 64 in bf16 and the default options, with as many
    recent tokens as there can be.
    """
    layer, dense = PackedLayer(bits), DynamicLayer()
    states = random_states(1, 3, 4096, 64).bfloat16()
    layer.update(states[:, :, : 4096 - 127], states[:, :, : 4096 - 127])
    layer.update(states[:, :, 4096 - 127 :], states[:, :, 4096 - 127 :])
    dense.update(states, states)
    whole = dense.keys.nbytes + dense.values.nbytes
    each = [layer._quantized_keys, layer._quantized_values, layer.keys, layer.values]
    assert sum(t.untyped_storage().nbytes() for t in each) == layer.nbytes
    coded = 2 * (4096 - 127) * 3 * 64
    assert layer.nbytes == coded * bits // 8 + coded // 64 * 4 + 2 * 127 * 3 * 64 * 2
    assert layer.nbytes <= share * whole


def test_recent_tokens_leave_no_memory_behind() -> None:
    layer, *_ = filled(20, WINDOW)
    assert layer.keys.untyped_storage().nbytes() == 0
    layer.crop(-5)
    words = layer._quantized_keys
    assert words.untyped_storage().nbytes() == words.nbytes


# --- options, models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 1}, r"a cache of 1 bits is outside 2\.\.8"),
        ({"nbits": 16}, "a cache of 16 bits is outside"),
        ({"nbits": "four"}, "a cache of 'four' bits is outside"),
        ({"axis_key": 1}, "has no axis_key; it has nbits, q_group_size, residual_length"),
        ({"residual_length": 0}, "residual_length=0 of the cache must be at least 1"),
        ({"q_group_size": 0}, "q_group_size=0 of the cache must be at least 1"),
    ],
)
def test_options_that_make_no_sense(model: Any, options: dict, message: str) -> None:
    with pytest.raises(LLQError, match=message):
        QuantizedCache("llq", model.config, **options)


def test_other_backends_are_transformers_own(model: Any) -> None:
    with pytest.raises(ValueError, match="Unknown quantization backend `llk`"):
        QuantizedCache("llk", model.config)


def test_groups_divide_a_head_evenly() -> None:
    """Where at most 64 channels are asked for."""
    widths = {80: 40, 24: 24, 64: 64, 128: 64, 7: 7, 65: 13}
    assert {n: Packing.of(torch.empty(1, 2, 3, n), 4, 64, False).group for n in widths} == widths


def test_layers_of_a_fixed_size_stay() -> None:
    """A sliding window is bounded already; a model of nothing else is refused."""
    config = transformers.Qwen2Config(
        num_hidden_layers=4, sliding_window=8, use_sliding_window=True, max_window_layers=2
    )
    kinds = [type(layer) for layer in QuantizedCache("llq", config, nbits=4).layers]
    plain = [type(layer) for layer in DynamicCache(config=config).layers]
    assert kinds == [PackedLayer, PackedLayer, *plain[2:]]
    assert plain[2] is not DynamicLayer
    config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(LLQError, match="no attention layer whose cache grows"):
        QuantizedCache("llq", config, nbits=4)


def test_the_model_says_what_it_generates_with(tiny_llama: Path) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert described(own) is None
    generate_packed(own, 4)
    assert described(own) == {"nbits": 4, "q_group_size": 64, "residual_length": 128}
    out = own.generate(torch.tensor([[5, 6]]), max_new_tokens=2, return_dict_in_generate=True)
    assert all(type(layer) is PackedLayer for layer in out.past_key_values.layers)
    with pytest.raises(LLQError, match="a cache of 9 bits"):
        generate_packed(own, 9)
