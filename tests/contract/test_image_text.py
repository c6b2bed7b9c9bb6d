"""The contract on vision-language models: the text decoder's linears are quantized, and everything
else keeps the bits of the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_llava
from contract.cases import CHECKPOINTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from llq_hf.checkpoints.dense import Checkpoint, Rewritten
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.hf_quantizer import CONFIGS, check_quantized
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import METHODS, build
from llq_hf.models.load import build_skeleton, module_names

LINEARS = 2 * 7
OUTSIDE = ("vision_tower.", "multi_modal_projector.", "image_newline", "embed_tokens", "lm_head")

once_per_method = pytest.mark.parametrize(
    ("name", "bits", "options"),
    [next(row for row in CHECKPOINTS if row[0] == name) for name in METHODS],
    ids=list(METHODS),
)


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def quantize(
    base: Path, out: Path, calibration: Path, name: str, bits: float, options: dict
) -> Path:
    quantize_checkpoint(
        str(base), out, build(name, bits=bits, **options), Calibration(str(calibration), samples=8)
    )
    return out


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits for a question about an image in three tiles."""
    random = torch.Generator().manual_seed(1)
    pixels, sizes = torch.randn(1, 3, 3, 28, 28, generator=random), torch.tensor([[28, 56]])
    image = model.config.image_token_index
    count = len(model.get_image_features(pixels, sizes).pooler_output[0])
    ids = torch.tensor([[3, 4, *[image] * count, 5, 6, 7]])
    return model(ids, pixel_values=pixels, image_sizes=sizes).logits


@once_per_method
def test_only_the_text_decoder_is_quantized(
    tiny_llava: Path, calibration_npy: Path, tmp_path: Path, name: str, bits: float, options: dict
):
    """A streamed run on files with the Hub's names, loaded twice, equals quantizing in memory."""
    out = quantize(tiny_llava, tmp_path / "out", calibration_npy, name, bits, options)
    streamed = load(out)
    assert check_quantized(streamed).quantized_linears == LINEARS
    quantized = {n for n, module in streamed.named_modules() if isinstance(module, QuantLinear)}
    assert all(n.startswith("model.language_model.layers.") for n in quantized)
    facts = inspect_checkpoint(out)
    assert facts["quantized_linears"] == LINEARS
    assert facts["stored_bits"] > 0
    expected = logits(streamed)
    assert torch.isfinite(expected).all()

    config = CONFIGS[name](
        bits=bits, **options, calibration=str(calibration_npy), calibration_samples=8
    )
    direct = load(tiny_llava, quantization_config=config)
    assert torch.equal(logits(direct), expected)
    direct.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)

    base, stored, again = (tensors_of(folder) for folder in (tiny_llava, out, tmp_path / "again"))
    assert set(stored) == set(again)  # both writers use the Hub's names
    assert {key for key in base if key not in stored} == set()
    checkpoint = Checkpoint.open(str(tiny_llava))
    skeleton = build_skeleton(checkpoint.path)
    rewrite = build(name, bits=bits, **options).bound_to(skeleton).rewrite(skeleton, {})
    source = Rewritten.of(checkpoint.named(module_names(skeleton, base)), rewrite)
    state = streamed.state_dict()
    outside = [key for key in source.files if any(part in key for part in OUTSIDE)]
    assert len(outside) > 20
    for key, tensor in source.read(outside).items():
        assert torch.equal(stored[source.in_file(key)], tensor), key
        assert torch.equal(state[key], tensor), key
        if rewrite is None or "vision_tower" in key:
            assert torch.equal(tensor, base[source.in_file(key)]), key


def test_a_rotation_keeps_the_logits(tiny_llava: Path, calibration_npy: Path, tmp_path: Path):
    """At 8 bits the rotated model has the logits of the dense one, also for images.

    Projector and image_newline are rotated too.
    """
    out = quantize(tiny_llava, tmp_path / "out", calibration_npy, "spinquant", 8, {})
    base, stored = tensors_of(tiny_llava), tensors_of(out)
    for key in ("multi_modal_projector.linear_2.weight", "image_newline"):
        assert not torch.allclose(base[key], stored[key], atol=1e-3)
    dense = logits(load(tiny_llava))
    assert (logits(load(out)) - dense).norm() < 0.03 * dense.norm()


def test_the_layout_of_published_checkpoints(
    tiny_llava: Path, calibration_npy: Path, tmp_path: Path
):
    """`vision_tower.vision_model.` names, and a buffer that models no longer have.

    Both stay in the file, and it loads.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_llava, base, ignore=shutil.ignore_patterns("*.safetensors"))
    old = {
        n.replace("vision_tower.", "vision_tower.vision_model."): t
        for n, t in tensors_of(tiny_llava).items()
    }
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    out = quantize(base, tmp_path / "out", calibration_npy, "gptq", 3, {})
    stored = tensors_of(out)
    assert set(old) <= set(stored)
    assert all(
        torch.equal(stored[key], tensor) for key, tensor in old.items() if "vision_tower" in key
    )
    same = quantize(tiny_llava, tmp_path / "same", calibration_npy, "gptq", 3, {})
    assert torch.equal(logits(load(out)), logits(load(same)))


def test_a_killed_run_goes_on(
    tiny_llava: Path, calibration_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed after its first block, a run ends in the bytes of an unbroken one."""
    import llq_hf.engine.execute

    class KilledError(Exception):
        pass

    whole = quantize(tiny_llava, tmp_path / "whole", calibration_npy, "gptq", 3, {})
    step = llq_hf.engine.execute.quantize_step

    def second_block_kills(given, *arguments):
        if ".layers.1" in given.prefix:
            raise KilledError
        return step(given, *arguments)

    monkeypatch.setattr(llq_hf.engine.execute, "quantize_step", second_block_kills)
    with pytest.raises(KilledError):
        quantize(tiny_llava, tmp_path / "out", calibration_npy, "gptq", 3, {})
    monkeypatch.undo()
    out = quantize(tiny_llava, tmp_path / "out", calibration_npy, "gptq", 3, {})
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_tied_head_stays_tied_or_is_untied_by_a_rotation(calibration_npy: Path, tmp_path: Path):
    base = make_llava(tmp_path / "base", tied=True)
    tied = load(quantize(base, tmp_path / "rtn", calibration_npy, "rtn", 8, {}))
    untied = load(quantize(base, tmp_path / "spinquant", calibration_npy, "spinquant", 8, {}))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    dense = logits(load(base))
    for model in (tied, untied):
        assert (logits(model) - dense).norm() < 0.03 * dense.norm()


@pytest.mark.parametrize("kind", ["Llava", "Mistral3", "PaliGemma"])
def test_other_vision_language_models(
    kind: str, calibration_npy: Path, tmp_path: Path, others: dict[str, Callable]
):
    """They work by the same mechanism, without a table of architectures."""
    others[kind]().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    out = quantize(tmp_path / "base", tmp_path / "out", calibration_npy, "gptq", 8, {})
    model, ids = load(out), torch.arange(2, 20)[None]
    assert check_quantized(model).quantized_linears == LINEARS
    with torch.no_grad():
        dense, packed = base(ids).logits, model(ids).logits
    assert (packed - dense).norm() < 0.05 * dense.norm()
    stored = tensors_of(out)
    for key, tensor in tensors_of(tmp_path / "base").items():
        assert "layers" in key or torch.equal(stored[key], tensor), key
    assert json.loads((out / "config.json").read_text())["model_type"] == base.config.model_type


@pytest.fixture
def others() -> dict[str, Callable[[], nn.Module]]:
    import transformers

    text = {
        "hidden_size": 48,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 320, "pad_token_id": 0}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tower |= {"image_size": 28, "patch_size": 14}
    clip, llama = transformers.CLIPVisionConfig(**tower), transformers.LlamaConfig(**text)

    def llava() -> nn.Module:
        config = transformers.LlavaConfig(
            vision_config=clip, text_config=llama, image_token_index=319
        )
        return transformers.LlavaForConditionalGeneration(config)

    def mistral() -> nn.Module:
        pixtral = transformers.PixtralVisionConfig(**tower)
        mistral = transformers.MistralConfig(**text, head_dim=12)
        config = transformers.Mistral3Config(
            vision_config=pixtral, text_config=mistral, image_token_index=319
        )
        return transformers.Mistral3ForConditionalGeneration(config)

    def paligemma() -> nn.Module:
        siglip = transformers.SiglipVisionConfig(**tower)
        gemma = transformers.GemmaConfig(**text, head_dim=12)
        config = transformers.PaliGemmaConfig(
            vision_config=siglip,
            text_config=gemma,
            image_token_index=319,
            projection_dim=48,
            vocab_size=320,
        )
        return transformers.PaliGemmaForConditionalGeneration(config)

    torch.manual_seed(0)
    return {"Llava": llava, "Mistral3": mistral, "PaliGemma": paligemma}
