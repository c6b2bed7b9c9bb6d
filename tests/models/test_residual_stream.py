"""The residual stream is found in many architectures; folding and rotating it changes no logit;
models where that is impossible are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from llq_hf.common.errors import LLQError
from llq_hf.engine.whole_model import rewrite_model
from llq_hf.models.residual_stream import CHUNK_ROWS, Residual, RotatedStream, residual_of

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 59
IDS = torch.arange(3, 27).view(2, 12)


def of(kind: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**{**SIZES, **options})
        )

    return make


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


MODELS = {
    "Llama, as many keys as queries": of("LlamaConfig", num_key_value_heads=4),
    "Llama, grouped queries": of("LlamaConfig"),
    "Llama, tied": of("LlamaConfig", tie_word_embeddings=True),
    "Llama, biases everywhere": of("LlamaConfig", attention_bias=True, mlp_bias=True),
    "Qwen2, biases of q, k and v": of("Qwen2Config"),
    "Qwen3, norms of queries and keys": of("Qwen3Config", head_dim=16),
    "Gemma, gains of 1 + weight": of("GemmaConfig", head_dim=16),
    "LlavaNext": llava,
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def randomized(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights so large that every part matters, and different gains and biases."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "vision_tower" not in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        elif parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
    return model


def logits(model: nn.Module) -> Tensor:
    if not isinstance(model, transformers.LlavaNextForConditionalGeneration):
        return model(IDS).logits
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 3, 28, 28, generator=random)  # the whole and two tiles
    count = len(model.get_image_features(pixels, torch.tensor([[28, 56]])).pooler_output[0])
    ids = torch.cat(
        [torch.tensor([3, 4]), torch.full((count,), IMAGE_TOKEN), torch.tensor([5, 6, 7])]
    )[None]
    return model(ids, pixel_values=pixels, image_sizes=torch.tensor([[28, 56]])).logits


def rotation_of(n: int, seed: int) -> Callable[[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random))[0]
    return lambda x: x @ R


def rotation_rewrite(residual: Residual) -> RotatedStream:
    heads = [rotation_of(residual.head_dim, 2 + i) for i in range(2)]
    return RotatedStream(residual, rotation_of(residual.width, 1), heads)


@each_model
def test_rotating_changes_every_tensor_of_the_stream_and_no_logit(make: Callable[[], nn.Module]):
    model = randomized(make)
    before, dense = logits(model), copy.deepcopy(model.state_dict())
    residual = residual_of(model)
    rewrite_model(model, rotation_rewrite(residual))
    after = logits(model)
    assert before.std() > 0.1
    assert (after - before).norm() <= 1e-4 * before.norm()
    touched = {*residual.readers, *residual.writers, residual.embedding, *residual.values}
    for name, tensor in model.state_dict().items():
        if (
            name.rpartition(".")[0] in touched and name.endswith("weight")
        ) or name in residual.vectors:
            assert not torch.allclose(tensor, dense[name], atol=1e-3), name
        if name.rpartition(".")[0] in residual.norms:
            assert (tensor == residual.norms[name.rpartition(".")[0]]).all()


def test_image_features_are_rotated_where_they_enter():
    model = randomized(llava)
    residual = residual_of(model)
    assert "model.multi_modal_projector.linear_2" in residual.writers
    assert residual.vectors == {"model.image_newline"}
    before = logits(model)
    for forgotten in (
        {"vectors": frozenset()},
        {"writers": residual.writers - {"model.multi_modal_projector.linear_2"}},
    ):
        other, part = copy.deepcopy(model), copy.copy(residual)
        for key, value in forgotten.items():
            object.__setattr__(part, key, value)
        rewrite_model(other, rotation_rewrite(part))
        assert (logits(other) - before).norm() > 1e-3 * before.norm(), forgotten


@each_model
def test_folding_twice_is_folding_once(make: Callable[[], nn.Module]):
    model = randomized(make)
    before = logits(model)
    rewrite_model(model, RotatedStream(residual_of(model)))
    once = copy.deepcopy(model.state_dict())
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    rewrite_model(model, RotatedStream(residual_of(model)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, once[name]), name


@each_model
def test_a_model_on_the_meta_device_gives_the_same(make: Callable[[], nn.Module]):
    with torch.device("meta"):
        skeleton = make()
    assert residual_of(skeleton) == residual_of(make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of("Gemma2Config", head_dim=16), "no rotation passes"),
        (of("Olmo2Config"), "past its norm"),
        (of("CohereConfig"), "no RMSNorm"),
        (of("MixtralConfig"), "no rotation passes|cannot be run"),
    ],
    ids=["norms behind", "norms behind only", "LayerNorm", "experts"],
)
def test_what_cannot_be_rotated_is_refused(make: Callable[[], nn.Module], message: str):
    with torch.device("meta"):
        skeleton = make()
    with pytest.raises(LLQError, match=message):
        residual_of(skeleton)


def test_a_model_over_several_devices_gives_the_same():
    """Each of its modules has a hook that sends inputs to its own device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = of("LlamaConfig")()
    add_hook_to_module(model.model.norm, AlignDevicesHook(execution_device="meta"))
    assert residual_of(model) == residual_of(of("LlamaConfig")())


def test_an_unknown_parameter_is_refused():
    model = of("LlamaConfig")()
    model.model.layers[1].mlp.register_parameter("gate_shift", nn.Parameter(torch.zeros(76)))
    with pytest.raises(LLQError, match=r"layers\.1\.mlp\.gate_shift"):
        residual_of(model)


def test_large_matrices_are_rotated_in_parts():
    residual = residual_of(of("LlamaConfig", num_key_value_heads=4)())
    turn = rotation_rewrite(residual)
    weight = torch.randn(CHUNK_ROWS + 7, 48, generator=torch.Generator().manual_seed(0))
    whole = turn(f"{residual.embedding}.weight", weight, {}.__getitem__)
    assert torch.equal(whole, turn.stream(weight.double()).float())
    wide = torch.randn(48, CHUNK_ROWS + 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        turn("model.layers.0.mlp.down_proj.weight", wide, {}.__getitem__),
        turn.stream(wide.T.double()).T.float(),
    )


def test_bf16_is_rotated_in_fp64_and_cast_once():
    residual = residual_of(of("LlamaConfig")())
    turn = rotation_rewrite(residual)
    weight = torch.randn(60, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(
        turn(f"{residual.embedding}.weight", weight, {}.__getitem__),
        turn.stream(weight.double()).bfloat16(),
    )
