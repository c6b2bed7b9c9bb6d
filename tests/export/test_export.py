"""Exports hold our codes, bit for bit, and compute our logits in the library that reads them.

GPTQModel lives in an environment of its own: `tests/bench/check_exports.py` loads the `gptq` and
`awq` exports with it. Here they are decoded by loops that follow the formats' definitions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_name
from conftest import make_llama, make_llava
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, CompressedTensorsConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from typer.testing import CliRunner

import llq_hf.export
from llq_hf import cli
from llq_hf.checkpoints.dense import Checkpoint
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.export import ENGINES, FORMATS, export, format_for, take_in
from llq_hf.export.base import Grid, bitstream, codes_of
from llq_hf.export.engines import readers, table
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import build
from llq_hf.models.load import auto_class
from llq_hf.numerics.grids import Affine

IDS = torch.arange(2, 34)[None]
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"bits": 4, "group_size": 32}),
    "rtn-per-row": ("rtn", {"bits": 4, "group_size": -1, "sym": True}),
    "gptq-3": ("gptq", {"bits": 3, "group_size": 32}),
    "awq": ("awq", {"bits": 4, "group_size": 32, "gqa": "tie", "ratios": 4}),
    "quip": ("quip", {"bits": 4, "incoherence": False, "rescale": False}),
    "smoothquant": ("smoothquant", {"bits": 8, "a_bits": 16, "quantize_bmm_input": False}),
    "spinquant": ("spinquant", {"bits": 4, "r4": False}),
    "efficient_qat": ("efficient_qat", {"bits": 3, "group_size": 32, "tune_epochs": 0}),
}
SOME = "rtn:4:group_size=32"
ORDERED = ("gptq", {"bits": 4, "group_size": 32, "act_order": True})
each_fitting = pytest.mark.parametrize("case", FITTING)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(
    make_checkpoint: Callable[..., Path],
    calibration_npy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Make:
    """Folder of a packed checkpoint of a Llama whose sizes formats take; each is made once."""
    base = make_checkpoint(hidden_size=64, intermediate_size=96, num_attention_heads=4)
    made: dict[str, Path] = {}

    def make(name: str, options: dict[str, Any]) -> Path:
        key = json.dumps([name, options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / name
            calibration = Calibration(str(calibration_npy), samples=8)
            quantize_checkpoint(str(base), made[key], build(name, **options), calibration)
        return made[key]

    return make


def load(folder: Path, **options: Any) -> nn.Module:
    kind = auto_class(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def affines(folder: Path) -> dict[str, Affine]:
    """What each quantized linear stores, by its full name."""
    return {
        name: module.method.affine(module.packed(), module.out_features, module.in_features)
        for name, module in load(folder).named_modules()
        if isinstance(module, QuantLinear)
    }


@each_fitting
def test_affine_is_what_dequantize_gives(packed, case):
    for module in load(packed(*FITTING[case])).modules():
        if isinstance(module, QuantLinear):
            affine = module.method.affine(module.packed(), module.out_features, module.in_features)
            assert torch.equal(affine.weight_OI, module.dequantized())


@each_fitting
def test_compressed_tensors_computes_our_logits(packed, case, tmp_path):
    folder = packed(*FITTING[case])
    found = export(folder, tmp_path / "out", FORMATS["compressed-tensors"], torch.float32)
    # Unpacked on loading: left packed, transformers 5.23 gives packed zero points the shape of
    # unpacked ones.
    model = load(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(load(folder)), atol=2e-5, rtol=2e-5)
    if all(affine.sym for affine in affines(folder).values()):
        torch.testing.assert_close(
            logits(load(tmp_path / "out")), logits(load(folder)), atol=2e-5, rtol=2e-5
        )
    # Scales in fp32 here
    assert found["stored_bits"] <= found["exported_bits"] < found["stored_bits"] + 1.5


@pytest.mark.parametrize("case", [*FITTING, "slim_llm", "billm"])
def test_dense_computes_our_logits(packed, case, tmp_path):
    folder = packed(*FITTING.get(case, (case, {"bits": 2} if case == "slim_llm" else {})))
    found = export(folder, tmp_path / "out", FORMATS["dense"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(load(folder)), atol=2e-5, rtol=2e-5
    )
    assert found["exported_bits"] == 32


def test_what_llama_cpp_converts_is_fp16(packed, tmp_path):
    folder = packed(*FITTING["rtn"])
    found = export(folder, tmp_path / "out", FORMATS["gguf-f16"])
    assert found["exported_bits"] == 16
    assert {t.dtype for t in Checkpoint.open(str(tmp_path / "out")).specs.values()} == {
        torch.float16
    }
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(load(folder)), atol=5e-3, rtol=5e-3
    )


# --- the formats, decoded by hand -----------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """The first `count` codes of a stream of bits in 32-bit words."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


@pytest.mark.parametrize("case", ["gptq-3", "rtn-per-row", "ordered"])
def test_gptq_holds_our_codes(packed, case, tmp_path):
    folder = packed(*FITTING.get(case, ORDERED))
    export(folder, tmp_path / "out", FORMATS["gptq"])
    tensors = stored(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization_config"]
    assert section["desc_act"] == (case == "ordered")
    for name, affine in affines(folder).items():
        rows, columns = affine.codes_OI.shape
        codes = [
            stream(column, affine.bits, columns) for column in tensors[f"{name}.qweight"].T.tolist()
        ]
        assert codes == affine.codes_OI.tolist()
        zeros = [stream(row, affine.bits, rows) for row in tensors[f"{name}.qzeros"].tolist()]
        less = 1 if section["checkpoint_format"] == "gptq" else 0
        assert torch.equal(torch.tensor(zeros).float().T + less, affine.zero_OG)
        assert torch.equal(tensors[f"{name}.scales"].float().T, affine.scale_OG)
        assert torch.equal(tensors[f"{name}.g_idx"].long(), affine.groups_I)


def test_awq_holds_our_codes_and_folds_its_scales(packed, tmp_path):
    folder = packed(*FITTING["awq"])
    export(folder, tmp_path / "out", FORMATS["awq"])
    tensors, before = stored(tmp_path / "out"), stored(folder)
    for name, affine in affines(folder).items():
        rows = []
        for words in tensors[f"{name}.qweight"].tolist():
            nibbles = [stream([word], 4, 8) for word in words]
            rows.append([word[[0, 4, 1, 5, 2, 6, 3, 7][i]] for word in nibbles for i in range(8)])
        assert torch.equal(torch.tensor(rows).T, affine.codes_OI.long())
        scale_OG = tensors[f"{name}.scales"].float().T
        # O_proj's and down_proj's input scale went in here
        if name.endswith(("v_proj", "up_proj")):
            assert not torch.equal(scale_OG, affine.scale_OG)
        else:
            assert torch.equal(scale_OG, affine.scale_OG)
    norm = "model.layers.0.input_layernorm.weight"
    in_scale = before["model.layers.0.self_attn.q_proj.in_scale"].float()
    assert torch.equal(tensors[norm], (before[norm] / in_scale).half())


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_stream_of_bits_is_read_as_it_was_written(bits):
    for n in (1, 7, 8, 31, 32, 33, 100):
        codes = torch.randint(2**bits, (3, n), generator=torch.Generator().manual_seed(n))
        words = bitstream(codes.to(torch.uint8), bits)
        assert [stream(row, bits, n) for row in words.tolist()] == codes.tolist()
        assert torch.equal(codes_of(words, bits, n), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("compressed-tensors", "gptq-3"),
        ("compressed-tensors", "rtn-per-row"),
        ("gptq", "gptq-3"),
        ("gptq", "ordered"),
        ("gptq", "rtn-per-row"),
        ("awq", "rtn"),
    ],
)
def test_what_goes_out_comes_back(packed, form, case, tmp_path):
    """`llq convert` of an export: the same tensors, and those of other methods' grids as well."""
    folder = packed(*FITTING.get(case, ORDERED))
    export(folder, tmp_path / "out", FORMATS[form], torch.float32)
    take_in(str(tmp_path / "out"), tmp_path / "back")
    before, after = affines(folder), affines(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, affine in before.items():
        for ours, theirs in zip(affine[1:5], after[name][1:5], strict=True):
            assert torch.equal(ours, theirs)
        assert affine.sym == after[name].sym
    back = logits(load(tmp_path / "back"))
    torch.testing.assert_close(back, logits(load(folder)), atol=2e-5, rtol=2e-5)


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "name", "options", "reason"),
    [
        ("compressed-tensors", "quip", {"bits": 4}, "incoherence=False"),
        ("compressed-tensors", "quip", {"bits": 4, "incoherence": False}, "input scales differ"),
        ("compressed-tensors", "billm", {}, "no uniform grid"),
        ("compressed-tensors", "slim_llm", {"bits": 2}, "no uniform grid"),
        ("compressed-tensors", "spinquant", {"bits": 4}, "r4=False"),
        (
            "compressed-tensors",
            "spinquant",
            {"bits": 4, "r4": False, "levels": "halves"},
            "odd halves",
        ),
        ("compressed-tensors", "smoothquant", {"bits": 8}, "activations"),
        ("compressed-tensors", *ORDERED, "act_order"),
        (
            "compressed-tensors",
            "rtn",
            {"bits": 4, "group_size": 40},
            "no multiple of the group of 40",
        ),
        ("dense", "smoothquant", {"bits": 8}, "activations"),
        ("gptq", "rtn", {"bits": 5, "group_size": 32}, "it has 2, 3, 4, 8"),
        ("awq", "gptq", {"bits": 3, "group_size": 32}, "it has 4"),
        ("awq", *ORDERED, "act_order"),
        *(
            (form, "hybrid", {"bits": 3, "rules": f"*.up_proj={other}+*={SOME}"}, "one kind for")
            for form, other in (
                ("compressed-tensors", "rtn:3:group_size=32"),
                ("gptq", "rtn:3:group_size=32"),
                ("gptq", "rtn:4:group_size=16"),
                ("gptq", "rtn:4:group_size=32:sym=true"),
                ("awq", "rtn:4:group_size=-1"),
            )
        ),
        (
            "awq",
            "awq",
            {"bits": 4, "group_size": 32, "gqa": "free", "ratios": 4},
            "heads of .* share values",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    packed, form, name, options, reason, tmp_path
):
    folder = packed(name, options)
    with pytest.raises(LLQError, match=reason):
        export(folder, tmp_path / "out", FORMATS[form])
    assert not list(tmp_path.iterdir())  # nothing half written


def test_a_row_that_is_one_group_may_be_as_long_as_the_others_groups(packed, tmp_path):
    """q_proj comes first, and its 64 columns are one group; down_proj has three of 32."""
    rules = "*.down_proj=rtn:4:group_size=32+*=rtn:4:group_size=64"
    with pytest.raises(LLQError, match="one kind for"):
        export(packed("hybrid", {"bits": 4, "rules": rules}), tmp_path / "no", FORMATS["gptq"])
    rules = "*.down_proj=rtn:4:group_size=48+*=rtn:4:group_size=32"
    with pytest.raises(LLQError, match="one kind for"):
        export(packed("hybrid", {"bits": 4, "rules": rules}), tmp_path / "no", FORMATS["gptq"])
    mixed = packed("hybrid", {"bits": 4, "rules": "*.down_proj=gptq:4:group_size=32+*=" + SOME})
    export(mixed, tmp_path / "out", FORMATS["gptq"])
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (section["bits"], section["group_size"]) == (4, 32)


# --- bases whose files use other names than the model ---------------------------------------------


@pytest.fixture(scope="module")
def renamed(
    request: pytest.FixtureRequest, calibration_npy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Packed checkpoint of a LLaVA-Next, or of a Llama that was saved without its head's class."""
    base, sizes = tmp_path_factory.mktemp("base"), {"hidden_size": 64, "intermediate_size": 96}
    if request.param == "llava":
        make_llava(base, **sizes, num_attention_heads=4)
    else:
        make_llama(base, **sizes, num_attention_heads=4)
        tensors = load_file(base / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path_factory.mktemp("renamed") / request.param
    method = build("rtn", bits=4, group_size=32)
    quantize_checkpoint(str(base), out, method, Calibration(str(calibration_npy), samples=8))
    return out


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


each_renamed = pytest.mark.parametrize("renamed", ["llava", "bare"], indirect=True)


@each_renamed
@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_names_of_the_base_s_files_are_kept(renamed, form, tmp_path):
    export(renamed, tmp_path / "out", FORMATS[form], torch.float32)
    before, after = stored(renamed), stored(tmp_path / "out")
    packed_linears = {name.removesuffix(".zero") for name in before if name.endswith(".zero")}
    others = {
        name: tensor
        for name, tensor in before.items()
        if name.rpartition(".")[0] not in packed_linears or name.endswith(".bias")
    }
    for name, tensor in others.items():  # the vision tower among them
        assert torch.equal(after[name], tensor.float() if tensor.is_floating_point() else tensor)
    key = "weight" if form == "dense" else "weight_packed"
    keys = {name for name in after if name.endswith(f".{key}")} - others.keys()
    assert keys == {f"{name}.{key}" for name in packed_linears}
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = load(tmp_path / "out", **({} if form == "dense" else options))
    torch.testing.assert_close(logits(model), logits(load(renamed)), atol=2e-5, rtol=2e-5)


@each_renamed
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_what_is_not_quantized_is_named_as_readers_know_it(renamed, form, tmp_path):
    """By its name in the model and by that in the files; what is quantized is not named."""
    export(renamed, tmp_path / "out", FORMATS[form])
    section, model = section_of(tmp_path / "out"), load(renamed)
    dense = {n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    old = {name: old_name(name) for name in dense | quantized}
    for name in dense:
        assert left_out(form, section, name)
        assert left_out(form, section, old[name])
    for name in quantized:
        assert not left_out(form, section, name)
        assert not left_out(form, section, old[name])


def old_name(name: str) -> str:
    """The name in the files of a LLaVA of the name in the model."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.")


def left_out(form: str, section: dict[str, Any], name: str) -> bool:
    """Whether readers of the format leave a linear dense, by the rules of these readers."""
    if form == "compressed-tensors":
        return any(match_name(name, pattern) for pattern in section["ignore"])
    if form == "awq":  # vLLM's, then transformers' rule
        names = section["modules_to_not_convert"]
        return any(each in name for each in names) and not should_convert_module(name, names)
    patterns = section.get("dynamic", {})
    assert all(pattern.startswith("-:") and not value for pattern, value in patterns.items())
    return any(re.match(pattern.removeprefix("-:"), name) for pattern in patterns)


@pytest.mark.parametrize("fault", [StopIteration, KeyboardInterrupt])
def test_whatever_goes_wrong_nothing_is_left(packed, tmp_path, monkeypatch, fault):
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr("llq_hf.export.base.gathered", fail)
    with pytest.raises(fault):
        export(packed(*FITTING["rtn"]), tmp_path / "out", FORMATS["dense"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(packed, tmp_path):
    with pytest.raises(LLQError, match="exists"):
        export(packed(*FITTING["rtn"]), tmp_path, FORMATS["dense"])


# --- which engine reads it ------------------------------------------------------------------------


SYM_ORDERED = ("gptq", {"bits": 4, "group_size": 32, "act_order": True, "sym": True})


@pytest.mark.parametrize(
    ("engine", "case", "form"),
    [
        ("vllm", FITTING["rtn"], "compressed-tensors"),
        ("vllm", FITTING["smoothquant"], "compressed-tensors"),
        ("sglang", FITTING["awq"], "compressed-tensors"),
        ("sglang", SYM_ORDERED, "gptq"),
        ("gptqmodel", ORDERED, "gptq"),
        ("transformers", FITTING["efficient_qat"], "compressed-tensors"),
    ],
)
def test_an_engine_gets_the_format_that_it_reads(packed, engine, case, form, tmp_path):
    folder = packed(*case)
    kind = format_for(ENGINES[engine], FORMATS, folder)
    assert kind.name == form
    export(folder, tmp_path / "out", kind, engine=ENGINES[engine])
    assert section_of(tmp_path / "out")["quant_method"] == form


@pytest.mark.parametrize(
    ("engine", "case", "reasons"),
    [
        # compressed-tensors and awq have no index of groups, and of gptq vLLM reads none
        ("vllm", SYM_ORDERED, ["no index", "gptq: it reads groups in order", "vllm serve"]),
        ("vllm", ORDERED, ["no index", "gptq: it reads symmetric grids only"]),
        ("vllm", ("rtn", {"bits": 1}), ["reads 2-8 bits, and codes have 1", "--format dense"]),
        ("sglang", FITTING["gptq-3"], ["reads 4, 8 bits, and codes have 3", "--format dense"]),
        ("gptqmodel", ("rtn", {"bits": 5}), ["it has 2, 3, 4, 8", "--format dense"]),
        ("transformers", ("billm", {}), ["no uniform grid", "from_pretrained"]),
    ],
)
def test_what_an_engine_does_not_read_is_refused_with_reason_and_cure(
    packed, engine, case, reasons
):
    with pytest.raises(LLQError) as refused:
        format_for(ENGINES[engine], FORMATS, packed(*case))
    for reason in reasons:
        assert reason in str(refused.value)


def test_no_export_is_left_that_its_engine_does_not_read(packed, tmp_path):
    """The format fits, and what all blocks came to does not."""
    with pytest.raises(LLQError, match=r"vLLM .* symmetric grids only.*vllm serve"):
        export(packed(*FITTING["rtn"]), tmp_path / "out", FORMATS["gptq"], engine=ENGINES["vllm"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "grid", "takes", "refuses"),
    [
        ("gptq", Grid(4, True, 64, True), ["vLLM 0.32", "SGLang", "GPTQModel"], []),
        ("gptq", Grid(8, True, 64, True), ["on CPUs it runs 4 bits", "GPTQModel"], []),
        ("gptq", Grid(4, True, 64, False), ["SGLang", "GPTQModel"], ["vLLM"]),
        ("gptq", Grid(4, False, 64, True), ["GPTQModel"], ["vLLM", "SGLang"]),
        ("gptq", Grid(3, True, 64, True), ["GPTQModel"], ["vLLM", "SGLang"]),
        ("compressed-tensors", Grid(3, False, 64, True), ["on CPUs it runs 4"], ["SGLang"]),
        ("compressed-tensors", Grid(1, False, 64, True), ["transformers"], ["vLLM", "SGLang"]),
        ("awq", Grid(4, False, 64, True), ["vLLM 0.32", "SGLang", "GPTQModel"], []),
        ("dense", None, ["vLLM", "SGLang", "transformers"], []),
    ],
)
def test_what_is_said_about_engines(form, grid, takes, refuses):
    """As vLLM 0.32 answered when it was run, and as GPTQModel loads."""
    read, unread = readers(form, grid)
    for found, expected in ((read, takes), (unread, refuses)):
        for words in expected:
            assert any(words in each for each in found)
    assert len(unread) == len(refuses)


def test_the_readme_says_the_same_about_engines():
    readme = Path(llq_hf.export.__file__).with_name("README.md").read_text()
    assert "\n".join(table()) in readme


def test_the_command(packed, tmp_path):
    def run(*words: object) -> Any:
        return CliRunner().invoke(cli.app, ["export", *map(str, words)])

    done = run(packed(*FITTING["rtn"]), tmp_path / "out", "--format", "compressed-tensors")
    assert done.exit_code == 0, done.output
    assert "exported" in done.output
    assert "vLLM" in done.output
    assert section_of(tmp_path / "out")["quant_method"] == "compressed-tensors"
    assert run(packed(*FITTING["rtn"]), tmp_path / "default").exit_code == 0
    assert stored(tmp_path / "default").keys() == stored(tmp_path / "out").keys()
    named = run(packed(*ORDERED), tmp_path / "for", "--for", "gptqmodel")
    assert "format: gptq, the best of what GPTQModel" in named.output
    unread = run(packed(*FITTING["rtn"]), tmp_path / "unread", "--format", "gptq")
    assert unread.exit_code == 0
    assert "vLLM 0.32 does not: it reads symmetric grids only" in unread.output
    both = run(packed(*FITTING["rtn"]), tmp_path / "no", "--format", "gptq", "--for", "vllm")
    assert "leave out --format gptq" in str(both.exception)
    other = run(packed(*FITTING["rtn"]), tmp_path / "no", "--for", "vlm")
    assert "did you mean 'vllm'" in str(other.exception)
    wrong = run(packed(*FITTING["rtn"]), tmp_path / "no", "--format", "gtpq")
    assert isinstance(wrong.exception, LLQError)
    assert "did you mean 'gptq'" in str(wrong.exception)
