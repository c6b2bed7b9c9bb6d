"""GGUF files hold our codes in llama.cpp's order of rows, and say what model and tokenizer it is.

They are read with the library gguf. `tests/bench/check_exports.py` runs them in llama.cpp.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llava
from gguf import GGUFReader, quants
from gguf_names import LINEARS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llq_hf import cli
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.demo import resolve
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.export import ENGINES, FORMATS, export, format_for
from llq_hf.export.gguf_file import cut_of
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import build
from llq_hf.numerics.grids import Affine

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
HEADS = {"q_proj": 4, "k_proj": 2}  # of make_llama: two key heads
SYM = {"group_size": 32, "sym": True}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Q4_0": ("Q4_0", "rtn", {"bits": 4, **SYM}),
    "Q4_0-rows": ("Q4_0", "rtn", {"bits": 4, "group_size": -1, "sym": True}),
    "Q4_1": ("Q4_1", "gptq", {"bits": 4, "group_size": 32}),
    "Q5_0": ("Q5_0", "rtn", {"bits": 5, **SYM}),
    "Q5_1": ("Q5_1", "rtn", {"bits": 5, "group_size": 32}),
    "Q8_0": ("Q8_0", "rtn", {"bits": 8, **SYM}),
}
Make = Callable[..., Path]


@pytest.fixture
def packed(make_checkpoint: Make, calibration_npy: Path, tmp_path: Path) -> Make:
    """Folder of a packed checkpoint of a tiny Llama; `base` are options of the model."""

    def make(name: str, options: dict[str, Any], **base: Any) -> Path:
        dense = make_checkpoint(**{**SIZES, **base})
        calibration = Calibration(str(calibration_npy), samples=8)
        quantize_checkpoint(str(dense), tmp_path / "packed", build(name, **options), calibration)
        return tmp_path / "packed"

    return make


def written(folder: Path, out: Path, **options: Any) -> GGUFReader:
    export(folder, out, FORMATS["gguf"], **options)
    return GGUFReader(out / "model.gguf")


def linears(folder: Path) -> dict[str, QuantLinear]:
    """By llama.cpp's names, but for the suffix."""
    found = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            _, _, block, rest = name.split(".", 3)
            found[f"blk.{block}.{LINEARS[rest]}"] = module
    return found


def pairs(folder: Path, out: Path) -> Iterator[tuple[str, Any, QuantLinear]]:
    """Name, exported tensor and packed linear, of all linears."""
    tensors = {tensor.name: tensor for tensor in written(folder, out).tensors}
    for name, module in linears(folder).items():
        yield f"{name}.weight", tensors[f"{name}.weight"], module


def turned_back(name: str, rows: Any) -> Any:
    """Rows of q and k in transformers' order: row 2 i of a head is its row i, row 2 i + 1 its row
    i + half.
    """
    heads = HEADS.get({"attn_q": "q_proj", "attn_k": "k_proj"}.get(name.split(".")[2], ""))
    if heads is None:
        return rows
    size = len(rows) // heads
    back = []
    for head in range(heads):
        own = rows[head * size : (head + 1) * size]
        back += [own[2 * i] for i in range(size // 2)] + [own[2 * i + 1] for i in range(size // 2)]
    return back


def decoded(kind: str, row: bytes) -> tuple[list[int], list[float], list[float]]:
    """Codes, scales and minima of a row of blocks, byte by byte."""
    codes, scales, least = [], [], []
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}[kind]
    for start in range(0, len(row), size):
        block = row[start : start + size]
        scales.append(struct.unpack("<e", block[:2])[0])
        block = block[2:]
        if kind.endswith("_1"):
            least.append(struct.unpack("<e", block[:2])[0])
            block = block[2:]
        if kind == "Q8_0":
            codes += [code + 128 for code in struct.unpack("<32b", block)]
            continue
        fifth = [0] * 32
        if kind.startswith("Q5"):
            word = struct.unpack("<I", block[:4])[0]
            fifth = [(word >> i) & 1 for i in range(32)]
            block = block[4:]
        fours = [byte & 15 for byte in block] + [byte >> 4 for byte in block]
        codes += [four | (bit << 4) for four, bit in zip(fours, fifth, strict=True)]
    return codes, scales, least


def affine_of(module: QuantLinear) -> Affine:
    return module.method.affine(module.packed(), module.out_features, module.in_features)


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_ours(packed, case, tmp_path):
    kind, method, options = CASES[case]
    for name, tensor, module in pairs(packed(method, options), tmp_path / "out"):
        affine = affine_of(module)
        assert tensor.tensor_type.name == kind
        rows = turned_back(name, [decoded(kind, row.tobytes()) for row in tensor.data])
        assert [codes for codes, _, _ in rows] == affine.codes_OI.tolist()
        repeats = len(rows[0][1]) // affine.scale_OG.shape[1]
        scale_OB = affine.scale_OG.repeat_interleave(repeats, dim=1)
        assert [scales for _, scales, _ in rows] == scale_OB.tolist()
        if not affine.sym:  # the one thing that is rounded
            zero_OB = affine.zero_OG.repeat_interleave(repeats, dim=1)
            assert [least for _, _, least in rows] == (-scale_OB * zero_OB).half().tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_library_dequantizes_our_weights(packed, case, tmp_path):
    """Bit for bit where grids are symmetric; else up to the fp16 minimum of each block."""
    _, method, options = CASES[case]
    for name, tensor, module in pairs(packed(method, options), tmp_path / "out"):
        rows = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        weight_OI = torch.stack(list(turned_back(name, list(rows))))
        ours_OI, affine = module.dequantized(), affine_of(module)
        if affine.sym:
            assert torch.equal(weight_OI, ours_OI)
        else:
            step_OI = affine.scale_OG[:, affine.groups_I]
            assert ((weight_OI - ours_OI).abs() <= 2.0**-11 * 2**affine.bits * step_OI).all()


def test_types_may_differ_between_linears(packed, tmp_path):
    rules = "*.down_proj=rtn:8:group_size=32:sym=true+*=rtn:4:group_size=32:sym=true"
    folder = packed("hybrid", {"bits": 5, "rules": rules})
    tensors = written(folder, tmp_path / "out").tensors
    kinds = {t.name: t.tensor_type.name for t in tensors if t.name.startswith("blk.1.")}
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"


def test_what_is_not_quantized(packed, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM}, attention_bias=True)
    reader = written(folder, tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    found = {t.name: t for t in reader.tensors}
    assert torch.equal(
        torch.from_numpy(found["blk.0.attn_norm.weight"].data.copy()),
        before["model.layers.0.input_layernorm.weight"],
    )
    for name, ours in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        assert found[f"{name}.weight"].tensor_type.name == "F16"
        data = torch.from_numpy(found[f"{name}.weight"].data.copy())
        assert torch.equal(data, before[f"{ours}.weight"].half())
    for name, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        bias = found[f"blk.1.{name}.bias"].data.tolist()
        expected = before[f"model.layers.1.self_attn.{ours}.bias"].tolist()
        assert turned_back(f"blk.1.{name}.bias", bias) == expected
    assert len(found) == len({key.rpartition(".")[0] for key in before}) + 2 * 4  # and biases


def test_tied_embeddings_are_stored_once(packed, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM}, tie_word_embeddings=True)
    names = {tensor.name for tensor in written(folder, tmp_path / "out").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_embeddings_may_be_of_another_dtype(packed, dtype, kind, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM})
    found = {t.name: t for t in written(folder, tmp_path / "out", dtype=dtype).tensors}
    embedding = found["token_embd.weight"]
    assert embedding.tensor_type.name == kind
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    data = torch.from_numpy(quants.dequantize(embedding.data, embedding.tensor_type).copy())
    assert torch.equal(data, before.to(dtype).float())


def test_input_scales_are_folded(packed, tmp_path):
    """AWQ divides inputs; the norm before does it in the file, in fp32."""
    folder = packed("awq", {"bits": 4, "group_size": 32, "gqa": "tie", "ratios": 4})
    found = {t.name: t for t in written(folder, tmp_path / "out").tensors}
    before = load_file(folder / "model.safetensors")
    s_I = before["model.layers.0.self_attn.q_proj.in_scale"].float()
    norm_I = before["model.layers.0.input_layernorm.weight"] / s_I
    assert torch.equal(torch.from_numpy(found["blk.0.attn_norm.weight"].data.copy()), norm_I)


def test_the_keys_describe_model_and_tokenizer(packed, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM}, rope_theta=5000.0)
    reader = written(folder, tmp_path / "out")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((folder / "config.json").read_text())
    assert keys["general.architecture"] == "llama"
    assert keys["general.file_type"] == 2  # mostly Q4_0
    assert keys["llama.block_count"] == 2
    assert keys["llama.context_length"] == 128
    assert keys["llama.embedding_length"] == 64
    assert keys["llama.feed_forward_length"] == 96
    assert keys["llama.attention.head_count"] == 4
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.attention.key_length"] == keys["llama.rope.dimension_count"] == 16
    assert keys["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["llama.vocab_size"] == 320
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    size = len(tokenizer)
    assert keys["tokenizer.ggml.tokens"][:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert keys["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, 320)]
    assert keys["tokenizer.ggml.token_type"] == [3, 3, *[1] * (size - 2), *[5] * (320 - size)]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_scaled_rope_has_its_factors(packed, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = packed("rtn", {"bits": 4, **SYM}, rope_parameters=rope)
    found = {t.name: t for t in written(folder, tmp_path / "out").tensors}
    factors = found["rope_freqs.weight"].data.tolist()
    for i, factor in enumerate(factors):  # by the definition of Llama 3.1
        length = 2 * math.pi * 10000.0 ** (2 * i / 16)
        smooth = min(max((64 / length - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        assert factor == pytest.approx(1 / ((1 - smooth) / 8.0 + smooth), rel=1e-5)
    assert min(factors) == 1
    assert max(factors) == 8


# --- how text is cut ------------------------------------------------------------------------------


def rules(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind."""
    model = {"type": "BPE", "byte_fallback": False, "ignore_merges": False}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"model": model, "normalizer": None, "pre_tokenizer": cut, **changes}


def test_the_cut_is_that_of_the_tokenizer(shared):
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, rules()["pre_tokenizer"]]}
    assert cut_of(rules()) == "gpt-2"
    assert cut_of(rules(pre_tokenizer=both)) == "smollm"
    llama3 = json.loads((shared / "tokenizers" / "llama3" / "tokenizer.json").read_text())
    assert cut_of(llama3) == "llama-bpe"
    llama3["model"]["ignore_merges"] = False  # llama.cpp would skip merges for whole words
    with pytest.raises(LLQError, match="would read other tokens"):
        cut_of(llama3)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": False}},
        {"normalizer": {"type": "NFC"}},
        {"model": {"type": "BPE", "byte_fallback": True}},
        {"model": {"type": "Unigram"}},
    ],
)
def test_an_unknown_cut_is_refused(changes):
    with pytest.raises(LLQError, match=r"tokenizer .*--format"):
        cut_of(rules(**changes))


def test_the_demo_s_tokenizer_is_refused(tmp_path):
    method = build("rtn", bits=4, **SYM)
    quantize_checkpoint(resolve("demo"), tmp_path / "packed", method, Calibration("demo"))
    with pytest.raises(LLQError, match=r"cuts text by .*--format dense"):
        export(tmp_path / "packed", tmp_path / "out", FORMATS["gguf"])
    assert not (tmp_path / "out").exists()


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("rtn", {"bits": 3, **SYM}, "it has 4, 5, 8"),
        ("rtn", {"bits": 8, "group_size": 32}, "Q8_0 has none; quantize with sym"),
        ("rtn", {"bits": 4, "group_size": 16}, "no whole blocks of 32; .*group_size=32"),
        ("gptq", {"bits": 4, "group_size": 32, "act_order": True}, "act_order"),
        ("billm", {}, "no uniform grid"),
        ("smoothquant", {"bits": 8}, "activations"),
    ],
)
def test_what_does_not_fit_is_refused(packed, name, options, reason, tmp_path):
    folder = packed(name, options)
    with pytest.raises(LLQError, match=reason):
        export(folder, tmp_path / "out", FORMATS["gguf"])
    assert {path.name for path in tmp_path.iterdir()} <= {"packed", "packed.journal.jsonl"}
    with pytest.raises(LLQError, match=f"{reason}.*--format gguf-f16"):
        format_for(ENGINES["llama.cpp"], FORMATS, folder)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation gelu.*--format gguf-f16"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope of type yarn.*--format gguf-f16",
        ),
    ],
)
def test_models_that_llama_cpp_s_llama_is_not_are_refused(packed, base, reason, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM}, **base)
    with pytest.raises(LLQError, match=reason):
        export(folder, tmp_path / "out", FORMATS["gguf"])


def test_other_families_are_refused(calibration_npy, tmp_path):
    base = make_llava(tmp_path / "base", **SIZES)
    method, data = build("rtn", bits=4, **SYM), Calibration(str(calibration_npy), samples=8)
    quantize_checkpoint(str(base), tmp_path / "packed", method, data)
    with pytest.raises(LLQError, match=r"type llava_next .*--format gguf-f16"):
        export(tmp_path / "packed", tmp_path / "out", FORMATS["gguf"])


def test_without_the_library_the_error_names_the_extra(packed, tmp_path, monkeypatch):
    folder = packed("rtn", {"bits": 4, **SYM})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LLQError, match=r"pip install 'llq-hf\[gguf\]'"):
        export(folder, tmp_path / "out", FORMATS["gguf"])


def test_a_fault_leaves_nothing(packed, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    folder = packed("rtn", {"bits": 4, **SYM})
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", fail)
    with pytest.raises(KeyboardInterrupt):
        export(folder, tmp_path / "out", FORMATS["gguf"])
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "packed.journal.jsonl"}


def test_the_command_names_the_file(packed, tmp_path):
    folder = packed("rtn", {"bits": 4, **SYM})
    words = ["export", str(folder), str(tmp_path / "out"), "--for", "llama.cpp"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "format: gguf, the best of what llama.cpp" in done.output
    assert f"File: {tmp_path}/out/model.gguf" in done.output
    assert "4.500" in done.output  # bits: 18 bytes for 32 weights


def test_tensors_are_aligned_to_what_the_header_says(packed, tmp_path):
    """Bytes behind the last tensor, or a gap, would shift all that follows."""
    reader = written(packed("rtn", {"bits": 4, **SYM}), tmp_path / "out")
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    end = last.data_offset + last.n_bytes
    assert 0 <= (tmp_path / "out" / "model.gguf").stat().st_size - end < reader.alignment
