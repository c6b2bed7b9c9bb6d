"""Checkpoints of other libraries become ours with the same codes, whatever their layout.

The layouts are written here by loops over Python's integers that follow the formats' definitions
and share nothing with `llq_hf.export`. `tests/bench/check_imports.py` takes in what the libraries
themselves make.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llq_hf import cli
from llq_hf.checkpoints.hashes import damage
from llq_hf.common.errors import LLQError
from llq_hf.export import take_in
from llq_hf.layers.linear import QuantLinear
from llq_hf.publish.card import make_card

IDS = torch.arange(2, 34)[None]
AWQ_WORD = (0, 2, 4, 6, 1, 3, 5, 7)  # features of a word, lowest bits first


@dataclass(frozen=True)
class Codes:
    """A linear of another library: weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g])."""

    codes_OI: list[list[int]]
    scale_OG: Tensor  # as stored
    zero_OG: list[list[int]]
    groups_I: list[int]

    @property
    def weight_OI(self) -> Tensor:
        """fp32, by the definition."""
        rows = [
            [
                float(self.scale_OG[o, g]) * (code - self.zero_OG[o][g])
                for code, g in zip(codes, self.groups_I, strict=True)
            ]
            for o, codes in enumerate(self.codes_OI)
        ]
        return torch.tensor(rows)


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as a stream of bits in 32-bit words, signed as int32."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [signed(number >> (32 * i)) for i in range(count)]


def signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def columns(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def as_gptq(linear: Codes, bits: int, version: int) -> dict[str, Tensor]:
    zeros = []
    for zero_O in columns(linear.zero_OG):
        row = words(zero_O, bits)
        if version == 1 and bits == 3:
            row = words([(zero - 1) % 8 for zero in zero_O], bits)
        elif version == 1:  # as GPTQModel: a whole word at once, so that a 0 borrows
            ones = words([1] * len(zero_O), bits)
            row = [signed(word - one) for word, one in zip(row, ones, strict=True)]
        zeros.append(row)
    return {
        "qweight": int32([words(row, bits) for row in linear.codes_OI]).T.contiguous(),
        "qzeros": int32(zeros),
        "scales": linear.scale_OG.T.contiguous(),
        "g_idx": torch.tensor(linear.groups_I, dtype=torch.int32),
    }


def as_awq(linear: Codes) -> dict[str, Tensor]:
    def interleaved(features: list[int]) -> list[int]:
        each = [features[i : i + 8] for i in range(0, len(features), 8)]
        return [signed(sum(word[f] << (4 * p) for p, f in enumerate(AWQ_WORD))) for word in each]

    return {
        "qweight": int32([interleaved(column) for column in columns(linear.codes_OI)]),
        "qzeros": int32([interleaved(zeros) for zeros in columns(linear.zero_OG)]),
        "scales": linear.scale_OG.T.contiguous(),
    }


def as_compressed(linear: Codes, bits: int, sym: bool, indexed: bool) -> dict[str, Tensor]:
    rows, width = len(linear.codes_OI), len(linear.groups_I)
    zeros = {"weight_zero_point": int32([words(z, bits) for z in columns(linear.zero_OG)]).T}
    index = {"weight_g_idx": torch.tensor(linear.groups_I, dtype=torch.int32)}
    return {
        "weight_packed": int32([words(row, bits) for row in linear.codes_OI]),
        "weight_scale": linear.scale_OG,
        "weight_shape": torch.tensor([rows, width]),
        **({} if sym else {key: zero.contiguous() for key, zero in zeros.items()}),
        **(index if indexed else {}),
    }


@dataclass(frozen=True)
class Case:
    """A checkpoint to make. form: gptq1, gptq2, awq, compressed-tensors."""

    form: str
    bits: int
    size: int = 32
    sym: bool = False
    scattered: bool = False
    zeros: bool = True  # whether zero points of 0 may occur
    scales: torch.dtype = torch.float16

    def section(self) -> dict[str, Any]:
        if self.form == "awq":
            own = {"bits": 4, "group_size": self.size, "zero_point": True, "version": "gemm"}
            return {"quant_method": "awq", **own}
        if self.form == "compressed-tensors":
            rows = self.size == -1
            weights = {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.sym,
                "strategy": "channel" if rows else "group",
                "group_size": None if rows else self.size,
                "dynamic": False,
            }
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            own = {"format": "pack-quantized", "config_groups": {"group_0": group}}
            return {"quant_method": "compressed-tensors", **own, "ignore": ["lm_head"]}
        form = "gptq" if self.form == "gptq1" else "gptq_v2"
        own = {"bits": self.bits, "group_size": self.size, "desc_act": self.scattered}
        return {"quant_method": "gptq", **own, "sym": self.sym, "checkpoint_format": form}

    def linear(self, rows: int, width: int, random: torch.Generator) -> Codes:
        size = width if self.size == -1 else self.size
        groups = width // size

        def draw(least: int, *shape: int) -> list[Any]:
            return torch.randint(least, 2**self.bits, shape, generator=random).tolist()

        places = torch.randperm(width, generator=random) if self.scattered else torch.arange(width)
        middle = [[2 ** (self.bits - 1)] * groups] * rows
        scale = torch.rand(rows, groups, generator=random) * 0.02 + 0.001
        zero = middle if self.sym else draw(0 if self.zeros else 1, rows, groups)
        return Codes(draw(0, rows, width), scale.to(self.scales), zero, (places // size).tolist())

    def stored(self, linear: Codes) -> dict[str, Tensor]:
        if self.form == "awq":
            return as_awq(linear)
        if self.form == "compressed-tensors":
            return as_compressed(linear, self.bits, self.sym, self.scattered)
        return as_gptq(linear, self.bits, int(self.form[-1]))


CASES = {
    "gptq-v1-symmetric": (Case("gptq1", 4, sym=True), "gptq"),
    "gptq-v1": (Case("gptq1", 4, zeros=False), "gptq"),
    "gptq-v1-zeros-borrow": (Case("gptq1", 4), "gptq"),
    "gptq-v1-2-bits": (Case("gptq1", 2, size=16), "gptq"),
    "gptq-v1-3-bits": (Case("gptq1", 3), "gptq"),
    "gptq-v1-8-bits-rows": (Case("gptq1", 8, size=-1), "gptq"),
    "gptq-v2": (Case("gptq2", 4), "gptq"),
    "gptq-v2-3-bits-act-order": (Case("gptq2", 3, scattered=True), "gptq"),
    "gptq-v1-act-order": (Case("gptq1", 4, sym=True, scattered=True), "gptq"),
    "gptq-bf16-scales": (Case("gptq2", 8, scales=torch.bfloat16), "gptq"),
    "awq": (Case("awq", 4), "rtn"),
    "awq-rows": (Case("awq", 4, size=-1), "rtn"),
    "compressed": (Case("compressed-tensors", 4), "rtn"),
    "compressed-symmetric": (Case("compressed-tensors", 4, sym=True), "rtn"),
    "compressed-3-bits": (Case("compressed-tensors", 3), "rtn"),
    "compressed-8-bits-rows": (Case("compressed-tensors", 8, size=-1, sym=True), "rtn"),
    "compressed-5-bits": (Case("compressed-tensors", 5, size=16), "rtn"),
    "compressed-act-order": (Case("compressed-tensors", 4, sym=True, scattered=True), "gptq"),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint of another library, and what its linears mean."""

    folder: Path
    linears: dict[str, Codes]

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change config.json."""
        config = json.loads((self.folder / "config.json").read_text())
        change(config)
        (self.folder / "config.json").write_text(json.dumps(config))

    def edit_section(self, **keys: Any) -> None:
        self.edit(lambda config: config["quantization_config"].update(keys))

    def edit_tensors(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = load_file(self.folder / "model.safetensors")
        change(tensors)
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def make(make_checkpoint: Callable[..., Path]) -> Callable[[Case], Made]:
    def make(case: Case, **options: Any) -> Made:
        own = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        folder = make_checkpoint(**own, dtype=torch.float16, **options)
        random = torch.Generator().manual_seed(3)
        tensors, linears = load_file(folder / "model.safetensors"), {}
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, width = tensors.pop(name).shape
            module = name.removesuffix(".weight")
            linears[module] = case.linear(rows, width, random)
            stored = case.stored(linears[module])
            tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made = Made(folder, linears)
        made.edit(lambda config: config.update(quantization_config=case.section()))
        return made

    return make


def packed_linears(folder: Path) -> Iterator[tuple[str, QuantLinear]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_makers_bit_for_bit(make, name, tmp_path):
    case, method = CASES[name]
    made = make(case)
    report = take_in(str(made.folder), tmp_path / "out")
    found = dict(packed_linears(tmp_path / "out"))
    assert found.keys() == made.linears.keys()
    for linear, module in found.items():
        assert torch.equal(module.dequantized(), made.linears[linear].weight_OI)
        affine = module.method.affine(module.packed(), module.out_features, module.in_features)
        assert affine.codes_OI.tolist() == made.linears[linear].codes_OI
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == f"llq_{method}"
    assert (section["bits"], section["sym"]) == (case.bits, case.sym)
    assert section["scale_bits"] == (16 if case.scales == torch.float16 else 32)
    assert report["made_from"]["converted"]["format"] == case.section()["quant_method"]
    assert not damage(tmp_path / "out")


@pytest.mark.parametrize("name", ["gptq-v1-act-order", "awq"])
def test_the_model_computes_what_the_makers_does(make, name, tmp_path):
    made = make(CASES[name][0])
    take_in(str(made.folder), tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for module, linear in made.linears.items():
        weight_OI = linear.weight_OI
        plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        plain.weight.data = weight_OI
        parent, _, child = module.rpartition(".")
        setattr(dense.get_submodule(parent), child, plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)


def test_all_else_is_the_files_bit_for_bit(make, tmp_path):
    made = make(CASES["gptq-v2"][0], attention_bias=True)
    before = load_file(made.folder / "model.safetensors")
    take_in(str(made.folder), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = [n for n in before if n.rpartition(".")[0] not in made.linears or n.endswith(".bias")]
    assert any(name.endswith("q_proj.bias") for name in kept)
    for name in kept:
        assert torch.equal(before[name], after[name])
    own = {f"{module}.{key}" for module in made.linears for key in ("weight", "scale", "zero")}
    assert after.keys() == own | set(kept)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_bias_of_zeros_that_the_model_does_not_have_is_dropped(make, tmp_path):
    made = make(CASES["gptq-v1"][0])
    name = "model.layers.1.mlp.up_proj.bias"
    made.edit_tensors(lambda tensors: tensors.update({name: torch.zeros(96).half()}))
    take_in(str(made.folder), tmp_path / "out")
    assert name not in load_file(tmp_path / "out" / "model.safetensors")
    made.edit_tensors(lambda tensors: tensors.update({name: torch.ones(96).half()}))
    with pytest.raises(LLQError, match=r"up_proj.bias"):
        take_in(str(made.folder), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_head_of_its_own_is_not_tied(make, tmp_path):
    """Whatever config.json says: transformers would load the file's head, too."""
    made = make(CASES["awq"][0])
    made.edit(lambda config: config.update(tie_word_embeddings=True))
    take_in(str(made.folder), tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    made.edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))
    take_in(str(made.folder), tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]


def test_the_config_file_of_old_autogptq_is_read(make, tmp_path):
    made = make(CASES["gptq-v1"][0])
    sections = []
    made.edit(lambda config: sections.append(config.pop("quantization_config")))
    own = {key: sections[0][key] for key in ("bits", "group_size", "desc_act", "sym")}
    (made.folder / "quantize_config.json").write_text(json.dumps(own))
    take_in(str(made.folder), tmp_path / "out")
    for name, module in packed_linears(tmp_path / "out"):
        assert torch.equal(module.dequantized(), made.linears[name].weight_OI)


def test_shards_are_read(make, tmp_path):
    made = make(CASES["awq"][0])
    tensors = load_file(made.folder / "model.safetensors")
    (made.folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, made.folder / file)
    index = {name: file for file, names in parts.items() for name in names}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (made.folder / "model.safetensors.index.json").write_text(text)
    take_in(str(made.folder), tmp_path / "out")
    for name, module in packed_linears(tmp_path / "out"):
        assert torch.equal(module.dequantized(), made.linears[name].weight_OI)


# --- what has no equal ----------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def group_0(**keys: Any) -> dict[str, Any]:
    group = Case("compressed-tensors", 4).section()["config_groups"]["group_0"]
    return {"config_groups": {"group_0": {**group, **keys}}}


def weights(**keys: Any) -> dict[str, Any]:
    return group_0(weights={**group_0()["config_groups"]["group_0"]["weights"], **keys})


@pytest.mark.parametrize(
    ("name", "section", "reason"),
    [
        ("gptq-v1", {"quant_method": "fp8"}, "quant_method is 'fp8'.*llq quantize"),
        ("gptq-v1", {"quant_method": ["gptq"]}, "quant_method is .'gptq'."),
        ("gptq-v1", {"checkpoint_format": ["gptq"]}, "checkpoint_format is .'gptq'."),
        ("gptq-v1", {"quant_method": "llq_rtn"}, "checkpoint of llq already"),
        ("gptq-v1", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'.*llq quantize"),
        ("gptq-v1", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "options of their own"),
        ("gptq-v1", {"bits": 5}, "codes of 5 bits are none that gptq packs"),
        ("gptq-v1", {"bits": "4"}, "bits is '4', which is not a whole number"),
        ("gptq-v1", {"bits": None}, "bits is None"),
        ("gptq-v1", {"group_size": 0}, "group_size=0"),
        ("gptq-v1", {"group_size": 10**40}, "more than any row has"),
        ("gptq-v1", {"bits": 8}, "q_proj: qweight is .8, 64. of int32, and should be .16, 64."),
        ("gptq-v1", {"group_size": 16}, "qzeros is .2, 8. of int32, and should be .4, 8."),
        ("awq", {"version": "gemv"}, "version is 'gemv'.*llq quantize"),
        ("compressed", {"format": "float-quantized"}, "format is 'float-quantized'"),
        ("compressed", {"format": "marlin-24"}, "format is 'marlin-24'"),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
        ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, "it has kv_cache_scheme"),
        ("compressed", {"transform_config": {"config_groups": {"u": {}}}}, "transforms inputs"),
        ("compressed", group_0(input_activations={"num_bits": 8}), "it has input_activations"),
        ("compressed", weights(type="float"), "weights are of type 'float'"),
        ("compressed", weights(strategy="tensor"), "scales are by tensor"),
        ("compressed", weights(num_bits=9), "codes of 9 bits"),
        ("compressed", {"config_groups": {}}, "describes no group"),
        ("compressed", {"config_groups": [1]}, "which is not an object"),
    ],
)
def test_a_config_without_an_equal_is_refused(make, name, section, reason, tmp_path):
    made = make(CASES[name][0])
    made.edit_section(**section)
    with pytest.raises(LLQError, match=reason):
        take_in(str(made.folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def dense_linear(tensors: dict[str, Tensor]) -> None:
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{Q}.{key}"]
    tensors[f"{Q}.weight"] = torch.zeros(64, 64).half()


def quantized_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]
    tensors["lm_head.qweight"] = torch.zeros(8, 320, dtype=torch.int32)


def groups_of_other_sizes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.g_idx"][0] = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dense_linear, f"{Q} is not quantized in it"),
        (quantized_head, "lm_head is quantized in it"),
        (groups_of_other_sizes, f"{Q}: g_idx does not put 32 columns into each of 2 groups"),
        (lambda tensors: tensors.pop(f"{Q}.scales"), f"{Q}: scales is missing"),
        (lambda tensors: tensors.update({f"{Q}.meta": torch.zeros(1)}), "meta is unknown"),
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors[f"{Q}.scales"].fill_(torch.inf), f"{Q}.scales .* infinity"),
        (
            lambda tensors: tensors.update({f"{Q}.qweight": torch.zeros(8, 64)}),
            "qweight is .8, 64. of float32, and should be .8, 64. of int32",
        ),
    ],
)
def test_tensors_without_an_equal_are_refused(make, change, reason, tmp_path):
    made = make(CASES["gptq-v1"][0])
    made.edit_tensors(change)
    with pytest.raises(LLQError, match=reason):
        take_in(str(made.folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pickles_dense_models_and_folders_that_exist_are_refused(make, tiny_llama, tmp_path):
    made = make(CASES["gptq-v1"][0])
    with pytest.raises(LLQError, match="exists"):
        take_in(str(made.folder), tmp_path)
    (made.folder / "model.safetensors").rename(made.folder / "pytorch_model.bin")
    with pytest.raises(LLQError, match="pickles, which are never loaded"):
        take_in(str(made.folder), tmp_path / "out")
    with pytest.raises(LLQError, match="not quantized: `llq quantize`"):
        take_in(str(tiny_llama), tmp_path / "out")


def test_a_fault_leaves_nothing(make, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llq_hf.checkpoints.packed.PackedFolder.finish", fail)
    with pytest.raises(KeyboardInterrupt):
        take_in(str(make(CASES["awq"][0]).folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_and_the_card_tell_the_origin(make, tmp_path):
    made = make(CASES["gptq-v1"][0])
    words = ["convert", str(made.folder), str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "taken in" in done.output
    shown = CliRunner().invoke(cli.app, ["info", str(tmp_path / "out"), "--linears"])
    assert f"{made.folder.name}, in the format gptq" in shown.output
    text = str(make_card(tmp_path / "out"))
    assert "taken over from the format gptq, codes unchanged" in text
    assert f"llq convert {made.folder.name} out" in text
    assert "quantized by" not in text
