"""vLLM's plugin, on a vLLM that is pretended: every storage, fused layers, and what is refused.

tests/bench/vllm_serves.py compares the real engine's tokens.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.cases import CHECKPOINTS
from families import FAMILIES, save_model
from hosts.pretended_vllm import FUSED, pretended
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaNextConfig

from llq_hf.checkpoints.format import HASHES, PackedConfig
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.vllm_plan import Part, Plan, take_part
from llq_hf.hosts.vllm_plugin import register
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import METHODS, build

Make = Callable[..., Path]
LINEARS = 2 * 7
QKV, DOWN = "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def vllm() -> Iterator[Any]:
    with pretended() as made:
        yield made


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_biased: Path, calibration_npy: Path
) -> Make:
    """Makes packed checkpoints of a tiny Llama with biases, each once."""
    made: dict[str, Path] = {}

    def make(name: str, bits: float, **options: Any) -> Path:
        key = json.dumps([name, bits, options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            data = Calibration(str(calibration_npy), samples=8)
            method = build(name, bits=bits, **options)
            quantize_checkpoint(str(tiny_llama_biased), made[key], method, data)
        return made[key]

    return make


@pytest.fixture
def packed(quantized: Make) -> Path:
    return quantized("rtn", 4, group_size=32)


def parts_of(model: nn.Module, name: str, fused: dict[str, list[str]] = FUSED) -> list[nn.Module]:
    """The linears under transformers of which vLLM's layer `name` consists."""
    parent, _, last = name.rpartition(".")
    return [model.get_submodule(f"{parent}.{part}") for part in fused.get(last, [last])]


def assert_same_layers(engine: Any, model: nn.Module, fused: dict[str, list[str]] = FUSED) -> None:
    random = torch.Generator().manual_seed(3)
    for name, layer in engine.layers.items():
        linears = parts_of(model, name, fused)
        x_TI = torch.randn(5, linears[0].in_features, generator=random)
        assert torch.equal(layer(x_TI), torch.cat([each(x_TI) for each in linears], -1)), name


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [next(row for row in CHECKPOINTS if row[0] == name) for name in METHODS],
    ids=list(METHODS),
)
@torch.no_grad()
def test_layers_compute_what_they_compute_under_transformers(
    vllm, quantized, name: str, bits: float, options: dict[str, Any]
):
    folder = quantized(name, bits, **options)
    engine = vllm.Engine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert_same_layers(engine, model)
    served = list(engine.config.finished.values())
    assert len(served) == LINEARS
    assert all(isinstance(each, QuantLinear) for each in served)
    size = sum(t.nbytes for each in served for t in each.packed().values())
    stored = [each for each in model.modules() if isinstance(each, QuantLinear)]
    assert size == sum(t.nbytes for each in stored for t in each.packed().values())
    assert vllm.lines == [f"{LINEARS} linears are packed, in {size / 2**20:.1f} MiB"]


@torch.no_grad()
def test_parts_of_a_fused_layer_may_differ_in_method_and_bits(vllm, quantized):
    rules = "*.q_proj=nf4:4+*.k_proj=rtn:3:group_size=32+*.up_proj=quip:2+*=rtn:8:group_size=64"
    folder = quantized("hybrid", 4, rules=rules)
    engine = vllm.Engine(folder)
    names = [each.method.name for each in engine.layers[QKV].llq]
    assert names == ["nf4", "rtn", "rtn"]
    assert_same_layers(engine, AutoModelForCausalLM.from_pretrained(folder).eval())


@torch.no_grad()
def test_layers_that_are_fused_in_the_checkpoint_too(vllm, calibration_npy, tmp_path):
    (phi,) = [each for each in FAMILIES if each.name == "Phi 3"]
    base, folder = save_model(phi, tmp_path / "base"), tmp_path / "out"
    data = Calibration(str(calibration_npy), samples=8)
    quantize_checkpoint(str(base), folder, build("rtn", bits=4, group_size=32), data)
    alone = {name: [name] for name in FUSED}
    engine = vllm.Engine(folder, fused=alone)
    assert len(engine.layers[QKV].llq) == 1
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert_same_layers(engine, model, alone)
    with pytest.raises(LLQError, match="qkv_proj is several layers in one"):
        vllm.Engine(folder, fused=alone, ranks=2)


@pytest.mark.parametrize("options", [{}, {"key_heads": True}], ids=["joint keys", "keys by head"])
@torch.no_grad()
def test_attention_reads_what_it_reads_under_transformers(vllm, quantized, options):
    folder = quantized("spinquant", 2, a_bits=8, kv_bits=4, **options)
    engine = vllm.Engine(folder)
    attend = engine.config.packed.method.attention
    heads = (6, 2, 2)
    random = torch.Generator().manual_seed(4)
    tensors = [torch.randn(1, each, 5, 16, generator=random) for each in heads]
    flat = [x.transpose(1, 2).reshape(5, -1) for x in tensors]
    found = engine.attentions["model.layers.0.self_attn.attn"](*flat)
    for got, want, given in zip(found, attend.transform(*tensors), flat, strict=True):
        assert torch.equal(got, want.transpose(1, 2).reshape(5, -1))
        assert got.shape == given.shape
        assert not torch.equal(got, given)


# --- registering ----------------------------------------------------------------------------------


def test_registering_again_changes_nothing(vllm):
    quantization = sys.modules["vllm.model_executor.layers.quantization"]
    names, table = quantization.QUANTIZATION_METHODS, quantization.table
    ours = [f"llq_{name}" for name in METHODS]
    assert names == ["awq", "gptq", *ours]
    register()
    assert names == ["awq", "gptq", *ours]
    assert list(table) == ours


def test_vllm_finds_it():
    (found,) = entry_points(group="vllm.general_plugins", name="llq")
    assert found.load().__name__ == "register"


def test_switching_it_off(monkeypatch):
    """Then not even vLLM is imported, which here fails."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("LLQ_DISABLE", "1")
    register()
    monkeypatch.setenv("LLQ_DISABLE", "0")
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_the_config_goes_to_other_processes(vllm, packed):
    config = vllm.Engine(packed).config
    config.served.clear()
    config.finished.clear()
    there = pickle.loads(pickle.dumps(config))
    assert (there.plan, there.packed) == (config.plan, config.packed)
    assert there.get_name() == "llq_rtn"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": "1.mlp.down_proj"}, "serves 13 of 14 packed linears; layers.1.mlp.down_proj"),
        ({"drop": "layers.1."}, "serves 7 of 14 packed linears; layers.1.mlp.down_proj"),
        ({"fused": {}}, r"qkv_proj consists of layers.0.self_attn.qkv_proj, but the checkpoint"),
        (
            {"fused": {**FUSED, "qkv_proj": ["q_proj", "k_proj"]}},
            "qkv_proj has 3 parts, but consists of layers.0.self_attn.q_proj, layers.0.self_attn.k",
        ),
    ],
    ids=["a layer is dropped", "a block is dropped", "no names of parts", "a part too many"],
)
def test_what_vllm_does_not_serve_is_named(vllm, packed, options, said):
    with pytest.raises(LLQError, match=said):
        vllm.Engine(packed, **options)


@pytest.mark.parametrize("shard", ["index_k", 2, (0, 1), None])
def test_a_part_that_the_plugin_does_not_know_is_refused(vllm, packed, shard):
    layer = vllm.Engine(packed).layers["model.layers.0.mlp.gate_up_proj"]
    with pytest.raises(LLQError, match="gate_up_proj, which consists of"):
        layer.load("scale", layer.llq[0].scale, shard)


def remove(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.scale"]


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(96, 20, dtype=torch.int32)


def cast(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.scale"] = tensors[
        "model.layers.0.mlp.up_proj.scale"
    ].float()


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.scale"][3, 1] = float("nan")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (remove, "lacks layers.1.self_attn.k_proj.scale"),
        (shorten, r"layers.1.mlp.down_proj.weight is stored as \[96, 20\] torch.int32, its"),
        (cast, r"layers.0.mlp.up_proj.scale is stored as \[172, 3\] torch.float32, its"),
        (spoil, "layers.0.mlp.up_proj.scale holds NaN"),
    ],
)
def test_damaged_tensors_are_refused_by_name(vllm, packed, edit, said):
    with pytest.raises(LLQError, match=said):
        vllm.Engine(packed, edit=edit)


def test_attention_of_an_unknown_kind_does_not_stay_in_full_precision(vllm, quantized):
    folder = quantized("spinquant", 2, a_bits=8, kv_bits=4)
    with pytest.raises(LLQError, match=r"attention of layers\.0 is of a kind"):
        vllm.Engine(folder, attentions=False)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", 3, "was edited"),
        ("group_size", "32", "should be of type int"),
        ("quantized_linears", 28, "was edited"),
        ("format_version", 2, "update llq-hf"),
    ],
)
def test_edited_configs_are_refused(vllm, packed, tmp_path, key, value, said):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LLQError, match=said):
        vllm.Engine(tmp_path)


def test_a_folder_that_is_not_as_it_was_written_is_refused(vllm, packed, tmp_path):
    for name in ("model.safetensors", HASHES):
        (tmp_path / name).symlink_to(packed / name)
    config = json.loads((packed / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LLQError, match="rms_norm_eps"):
        vllm.Engine(tmp_path)


def test_fewer_layers_than_were_packed_are_refused(packed):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(packed)
    stored = PackedConfig.from_section(config.quantization_config)
    with pytest.raises(LLQError, match="has 7 linears in its blocks, the checkpoint 14"):
        Plan.of(stored, config.__class__(**{**config.to_dict(), "num_hidden_layers": 1}))


# --- names ----------------------------------------------------------------------------------------


def test_only_the_text_decoder_of_a_vision_language_model_is_packed(tiny_llava):
    config = LlavaNextConfig.from_pretrained(tiny_llava)
    plan = Plan.of(PackedConfig(build("rtn"), LINEARS), config)
    block = "language_model.model.layers.1"
    names = [f"layers.1.self_attn.{part}" for part in FUSED["qkv_proj"]]
    assert plan.linears(f"{block}.self_attn.qkv_proj", FUSED) == names
    assert (
        plan.linears("vision_tower.vision_model.encoder.layers.1.self_attn.qkv_proj", FUSED) == []
    )
    assert plan.linears("multi_modal_projector.linear_1", FUSED) == []
    assert plan.linears("language_model.lm_head", FUSED) == []


# --- tensor parallelism ---------------------------------------------------------------------------


def parallel(vllm: Any, folder: Path, name: str, ranks: int) -> list[Any]:
    return [vllm.Engine(folder, rank=rank, ranks=ranks).layers[name] for rank in range(ranks)]


@pytest.fixture
def wide(make_checkpoint, tmp_path, calibration_npy) -> Make:
    """A model whose parts can fall on whole blocks of 128 codes."""

    def make(name: str, bits: float, **options: Any) -> Path:
        base = make_checkpoint(
            hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2
        )
        data = Calibration(str(calibration_npy), samples=8)
        quantize_checkpoint(str(base), tmp_path / "out", build(name, bits=bits, **options), data)
        return tmp_path / "out"

    return make


@pytest.mark.parametrize(
    ("name", "options", "dense"),
    [
        ("rtn", {"sym": True, "group_size": 128}, 0),
        ("rtn", {"group_size": 128}, 4),  # zero points of a part of the columns are no whole block
        ("quip", {}, 14),  # its transforms are of whole rows and columns
    ],
)
@torch.no_grad()
def test_processes_share_layers(vllm, wide, name, options, dense):
    folder = wide(name, 4, **options)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    random = torch.Generator().manual_seed(5)
    engines = [vllm.Engine(folder, rank=rank, ranks=2) for rank in range(2)]
    kinds = [type(each) for each in engines[0].config.finished.values()]
    assert kinds.count(nn.Linear) == dense
    for layer, first in engines[0].layers.items():
        second = engines[1].layers[layer]
        linears = parts_of(model, layer)
        x_TI = torch.randn(3, linears[0].in_features, generator=random)
        whole = [each(x_TI) for each in linears]
        if first.quant_method.parts[0].columns.stop < linears[0].in_features:
            a, b = x_TI.chunk(2, dim=-1)
            got = [first(a) + second(b)]
        else:
            both = (first(x_TI).split(first.mine, -1), second(x_TI).split(second.mine, -1))
            got = [torch.cat(pair, -1) for pair in zip(*both, strict=True)]
        for y, want in zip(got, whole, strict=True):
            assert (y - want).norm() < 2e-5 * want.norm(), layer
    assert any("do not fall on whole blocks" in line for line in vllm.lines) == (dense > 0)


def test_more_processes_than_heads_of_keys_hold_the_same():
    parts = [Part.of((32, 96), (16, 96), rank, 4) for rank in range(4)]
    assert [part.rows.start for part in parts] == [0, 0, 16, 16]
    assert {(part.columns.start, part.columns.stop) for part in parts} == {(0, 96)}
    with pytest.raises(LLQError, match=r"4 processes for \[6, 96\] of a linear of \[32, 96\]"):
        Part.of((32, 96), (6, 96), 0, 4)


def test_a_cut_that_means_other_numbers_is_not_taken():
    """Columns of `order` index the whole row: a cut of it has the right shape and wrong numbers."""
    method = build("gptq", bits=4, sym=True, group_size=64, act_order=True)
    linear = QuantLinear(method, 256, 32, bias=False)
    random = torch.Generator().manual_seed(6)
    for name, spec in linear.layout.items():
        values = torch.randint(-(2**31), 2**31, spec.shape, generator=random)
        if name == "order":
            values = torch.randperm(256, generator=random)
        linear.put(
            name, values.to(spec.dtype) if name != "scale" else torch.ones(spec.shape).half()
        )
    part = take_part(linear, Part(slice(0, 32), slice(128, 256)), torch.float32)
    assert not isinstance(part, QuantLinear)
    assert torch.equal(part.weight, linear.dequantized()[:, 128:])
    rows = take_part(linear, Part(slice(16, 32), slice(0, 256)), torch.float32)
    assert isinstance(rows, QuantLinear)
    assert torch.equal(rows.dequantized(), linear.dequantized()[16:])


def test_activations_are_not_divided_among_processes(vllm, quantized):
    folder = quantized("smoothquant", 8)
    with pytest.raises(LLQError, match="--tensor-parallel-size 1"):
        vllm.Engine(folder, ranks=2)
