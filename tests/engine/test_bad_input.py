"""What is wrong with the input is said in one sentence, before work starts if it can be; nothing
half-written loads.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llq_hf import cli
from llq_hf.checkpoints.format import HASHES
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.checkpoints.journal import Journal
from llq_hf.checkpoints.shards import Shards
from llq_hf.common.errors import LLQError
from llq_hf.common.terminal import RichProgress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions
from llq_hf.methods import build, method_type
from llq_hf.models.load import build_skeleton

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"


def quantize(
    model: Path | str,
    out: Path,
    calibration: Path | str,
    method: str = "gptq",
    run: RunOptions | None = None,
    **data: Any,
) -> dict[str, Any]:
    sizes = {"samples": 8, "seqlen": 32, **data}
    return quantize_checkpoint(
        str(model), out, build(method, bits=4), Calibration(str(calibration), **sizes), run
    )


def nothing_loads(out: Path) -> None:
    assert not (out / "config.json").exists()
    if out.is_dir():
        from transformers import AutoModelForCausalLM

        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)


def refused(match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """One LLQError of one line that says `match`."""
    with pytest.raises(LLQError, match=match) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def llq(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Runs `llq ...` in this process: exit status and the text on stderr."""

    def llq(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["llq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        code = stop.value.code
        return (code if isinstance(code, int) else 0), captured.err

    return llq


@pytest.fixture
def cli_refuses(llq: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """Runs `llq ...` and checks that it ends with status 1 and one line "Error: ..."; the line."""

    def cli_refuses(*arguments: object) -> str:
        code, text = llq(*arguments)
        lines = [line for line in text.splitlines() if line.startswith("Error:")]
        assert (code, len(lines)) == (1, 1), text
        assert text.rstrip().endswith(lines[0])
        return lines[0]

    return cli_refuses


# --- options --------------------------------------------------------------------------------------


def test_options_of_methods():
    refused(r"unknown method 'gpqt' \(did you mean 'gptq'\?\); there are: rtn", method_type, "gpqt")
    refused("rtn: bits=9 is outside its range 1..8", build, "rtn", bits=9)
    refused("gptq: bits=0 is outside its range 1..8", build, "gptq", bits=0)
    refused("rtn: group_size=0 must be -1", build, "rtn", group_size=0)
    refused("gptq: group_size=-2 must be -1", build, "gptq", group_size=-2)
    refused("rtn: scale_bits=8 must be 16", build, "rtn", scale_bits=8)
    refused(r"gptq has no option 'group' \(did you mean 'group_size'\?\)", build, "gptq", group=64)
    refused("quip has no option 'act_order'", build, "quip", act_order=True)
    refused("gptq: bits='4' should be of type int", build, "gptq", bits="4")
    refused("gptq: bits=4.0 should be of type int", build, "gptq", bits=4.0)
    refused("gptq: bits=True should be of type int", build, "gptq", bits=True)
    refused("gptq: sym=1 should be of type bool", build, "gptq", sym=1)
    refused("gptq: damp=None should be of type float", build, "gptq", damp=None)
    refused("gptq: damp=1.5 must lie in 0..1", build, "gptq", damp=1.5)
    refused("gptq: damp=nan", build, "gptq", damp=float("nan"))
    refused("quip: range_sigma=0.0 must be positive", build, "quip", range_sigma=0.0)
    refused("quip: range_sigma=nan", build, "quip", range_sigma=float("nan"))
    refused("quip: range_sigma=inf", build, "quip", range_sigma=float("inf"))
    refused("preset='bst' is unknown", build, "gptq", "bst")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "gpqt"], "did you mean 'gptq'?"),
        (["--method", "rtn", "--bits", "9"], "bits=9 is outside its range 1..8"),
        (["--method", "rtn", "--group-size", "0"], "group_size=0 must be -1"),
        (["--method", "quip", "--group-size", "64"], "quip has no option 'group_size'"),
        (["--method", "rtn", "--preset", "bst"], "preset='bst' is unknown"),
        (["--method", "rtn", "--dtype", "int8"], "dtype='int8' is not one of auto, float32"),
        (["--method", "rtn", "--device", "banana"], "banana"),
        (["--method", "gptq", "--calibration", "wikitxt2"], "did you mean 'wikitext2'?"),
        (["--method", "gptq", "--calibration-samples", "0"], "samples=0 is not a positive integer"),
    ],
)
def test_options_on_the_command_line(cli_refuses, tiny_llama, tmp_path, arguments, said):
    assert said in cli_refuses("quantize", tiny_llama, tmp_path / "out", *arguments)
    nothing_loads(tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(cli_refuses, tiny_llama, calibration_npy, tmp_path):
    arguments = ["--method", "gptq", "--calibration", calibration_npy, "--device", "cuda"]
    assert "cuda" in cli_refuses("quantize", tiny_llama, tmp_path / "out", *arguments)
    nothing_loads(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments", [["--method", "rtn", "--bitz", "4"], ["--method", "rtn", "--bits", "four"], []]
)
def test_usage(llq, tiny_llama, tmp_path, arguments):
    code, text = llq("quantize", tiny_llama, tmp_path / "out", *arguments)
    assert code == 2  # as every program that is called wrongly
    assert (arguments[-2] if arguments else "--method") in text
    assert not (tmp_path / "out").exists()


def test_from_a_shell(tmp_path):
    """The real program, once: one line, status 1."""
    command = [
        sys.executable,
        "-m",
        "llq_hf",
        "quantize",
        "./no-such-model",
        str(tmp_path / "out"),
        "--method",
        "rtn",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "Error: ./no-such-model is not a folder with a model"
    )
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- calibration ----------------------------------------------------------------------------------


def _saved(path: Path, array: Any) -> Path:
    np.save(path, np.array(array))
    return path


CALIBRATIONS: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing": (lambda folder: folder / "no.npy", "There is no file"),
    "missing text": (lambda folder: folder / "no.txt", "There is no file"),
    "a folder": (lambda folder: (folder / "x.npy").mkdir() or folder / "x.npy", "is a folder"),
    "empty": (
        lambda folder: (folder / "x.npy").touch() or folder / "x.npy",
        "is not a readable .npy file",
    ),
    "empty text": (lambda folder: (folder / "x.txt").touch() or folder / "x.txt", "holds no text"),
    "too short": (
        lambda folder: (folder / "x.txt").write_text("the fox") and folder / "x.txt",
        "a random window of 32 needs at least 33",
    ),
    "no rows": (lambda folder: _saved(folder / "x.npy", np.zeros((0, 8), int)), "has shape"),
    "one axis": (lambda folder: _saved(folder / "x.npy", [1, 2, 3]), r"shape \[windows, tokens\]"),
    "floats": (lambda folder: _saved(folder / "x.npy", [[1.0]]), "not integers"),
    "objects": (lambda folder: _saved(folder / "x.npy", [[{}]]), "is not a readable .npy file"),
    "outside": (
        lambda folder: _saved(folder / "x.npy", [[1, 320]] * 8),
        "outside the model's vocabulary of 320",
    ),
    "negative": (lambda folder: _saved(folder / "x.npy", [[1, -1]] * 8), "token ids are 0 or more"),
    "unknown kind": (
        lambda folder: (folder / "x.csv").touch() or folder / "x.csv",
        "of a kind that cannot be read",
    ),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibration(tiny_llama, tmp_path, case):
    make, said = CALIBRATIONS[case]
    refused(said, quantize, tiny_llama, tmp_path / "out", make(tmp_path))
    nothing_loads(tmp_path / "out")


def test_brackets_in_a_message_are_text(cli_refuses, tiny_llama, tmp_path):
    """Not markup for rich, which swallows [words] and fails on [/words]."""
    arguments = ["quantize", tiny_llama, tmp_path / "out", "--method", "gptq", "--calibration"]
    assert "[windows, tokens]" in cli_refuses(*arguments, _saved(tmp_path / "x.npy", [1, 2]))
    (tmp_path / "[").mkdir()
    assert "[/no].npy" in cli_refuses(*arguments, tmp_path / "[" / "no].npy")


# --- the base checkpoint --------------------------------------------------------------------------


def _edit_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _edit_tensors(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE
) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 100)


def _index(folder: Path, **more: str) -> None:
    """An index in the place of the single file, which would be taken before it."""
    names = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / SHARD)
    weight_map = {**dict.fromkeys(names, SHARD), **more}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _index_of(folder: Path, text: str) -> None:
    _index(folder)
    (folder / INDEX).write_text(text)


def _set(name: str, value: float) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return lambda folder: _edit_tensors(folder, edit)


def _resize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(172, 95)


DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text('{"a": '),
        "is not valid JSON",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "should hold a JSON object",
    ),
    "unknown type": (lambda folder: _edit_config(folder, model_type="lama"), "lama"),
    "no type": (lambda folder: _edit_config(folder, model_type=None), "model_type"),
    "nonsense sizes": (lambda folder: _edit_config(folder, hidden_size="wide"), "config.json"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "holds no model.safetensors"),
    "truncated": (_truncate, "truncated or damaged"),
    "empty file": (lambda folder: os.truncate(folder / SINGLE, 0), "truncated or damaged"),
    "index lists a file that is not there": (
        lambda folder: _index(folder, x="y.safetensors"),
        "y.safetensors is missing",
    ),
    "index lists a tensor that is not there": (
        lambda folder: _index(folder, x=SHARD),
        "lists 'x', but",
    ),
    "index is no JSON": (lambda folder: _index_of(folder, "{"), "is not valid JSON"),
    "index without a map": (lambda folder: _index_of(folder, "{}"), "has no weight_map"),
    "index with a list": (
        lambda folder: _index_of(folder, '{"weight_map": []}'),
        "weight_map",
    ),
    "tensor missing": (
        lambda folder: _edit_tensors(folder, lambda t: t.pop(DOWN)),
        f"the tensor {DOWN} is missing",
    ),
    "norm missing": (
        lambda folder: _edit_tensors(folder, lambda t: t.pop(NORM)),
        f"the tensor {NORM} is missing",
    ),
    "wrong shape": (
        lambda folder: _edit_tensors(folder, _resize),
        r"up_proj.weight has shape \[172, 95\]",
    ),
    "NaN": (_set(DOWN, float("nan")), f"{DOWN} holds NaN or infinity"),
    "infinity": (_set(DOWN, float("inf")), f"{DOWN} holds NaN or infinity"),
    "NaN outside the blocks": (
        _set("lm_head.weight", float("nan")),
        "lm_head.weight holds NaN or infinity",
    ),
    "not a Llama": (lambda folder: _edit_config(folder, model_type="gpt2", n_layer=2), "."),
    "weights of another folder": (
        lambda folder: _edit_config(folder, transformers_weights="../model.safetensors"),
        "names '../model.safetensors' as transformers_weights",
    ),
    "a short context": (
        lambda folder: _edit_config(folder, max_position_embeddings=16),
        "windows of 32 tokens are longer than the model's context; give calibration_seqlen=16",
    ),
    "a head that should be its own": (
        lambda folder: _edit_tensors(folder, lambda t: t.pop("lm_head.weight")),
        "the tensor lm_head.weight is missing",
    ),
    "quantized by others": (
        lambda folder: _edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        r"is quantized already \(awq\)",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(model, calibration_npy, tmp_path, case):
    damage, said = CHECKPOINTS[case]
    damage(model)
    refused(said, quantize, model, tmp_path / "out", calibration_npy)
    nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("section", [[], ["x"], "x", 3, {}])
def test_a_section_that_says_nothing(model, calibration_npy, tmp_path, section):
    _edit_config(model, quantization_config=section)
    said = r"quantized already \(unknown\)" if section == {} else "which is not an object"
    refused(said, quantize, model, tmp_path / "out", calibration_npy)


def test_several_problems_are_told_at_once(model, calibration_npy, tmp_path):
    _edit_tensors(model, lambda tensors: (tensors.pop(NORM), _resize(tensors)))
    _set(DOWN, float("nan"))(model)
    with pytest.raises(LLQError) as error:
        quantize(model, tmp_path / "out", calibration_npy)
    assert all(part in str(error.value) for part in (NORM, "[172, 95]", "NaN"))


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c"])
def test_model_is_missing(calibration_npy, tmp_path, name):
    refused("is not a folder with a model", quantize, name, tmp_path / "out", calibration_npy)


def test_model_is_not_to_be_had_from_the_hub(calibration_npy, tmp_path):
    """conftest.py sets HF_HUB_OFFLINE."""
    name = "llq-no-such-person/no-such-model"
    refused(
        "neither a local folder nor available from the Hub",
        quantize,
        name,
        tmp_path / "out",
        calibration_npy,
    )


def test_a_model_without_a_tokenizer(model, calibration_npy, tmp_path):
    """Ids need none; a text does, and says so."""
    for file in model.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "x.txt").write_text("the fox " * 100)
    refused("tokenizer", quantize, model, tmp_path / "out", tmp_path / "x.txt")
    quantize(model, tmp_path / "out", calibration_npy)
    assert (tmp_path / "out" / "config.json").exists()


class _Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


def test_pickles_are_never_loaded(model, calibration_npy, tmp_path):
    mark = tmp_path / "unpickled"
    (model / SINGLE).unlink()
    for name in ("pytorch_model.bin", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(_Trap(mark)))
    refused("pickles, which are never loaded", quantize, model, tmp_path / "out", calibration_npy)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


# --- the output folder ----------------------------------------------------------------------------


def test_output(tiny_llama, calibration_npy, tmp_path):
    (tmp_path / "file").touch()
    refused("is a file", quantize, tiny_llama, tmp_path / "file", calibration_npy)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refused("is not empty", quantize, tiny_llama, tmp_path / "full", calibration_npy)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    refused("file", quantize, tiny_llama, tmp_path / "file" / "out", calibration_npy)


def test_a_dry_run_writes_nothing(llq, tiny_llama, calibration_npy, tmp_path):
    arguments = [
        "quantize",
        tiny_llama,
        tmp_path / "deep" / "out",
        "--dry-run",
        "--calibration",
        calibration_npy,
    ]
    assert (
        llq(
            *arguments,
            "--method",
            "gptq",
            "--calibration-samples",
            8,
            "--offload",
            tmp_path / "offload",
        )[0]
        == 0
    )
    code, text = llq(
        *arguments, "--method", "gptq", "--bits", 4, "--calibration-samples", 8, "--dtype", "int8"
    )
    assert (code, "dtype='int8' is not one of" in text) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_output_is_the_model_itself(model, calibration_npy):
    before = sorted(file.name for file in model.iterdir())
    refused("is not empty", quantize, model, model, calibration_npy)
    assert sorted(file.name for file in model.iterdir()) == before


# --- packed checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_once(
    tiny_llama: Path, calibration_npy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(tiny_llama, out, calibration_npy)
    return out


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A packed checkpoint to damage."""
    return shutil.copytree(packed_once, tmp_path / "packed")


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_a_packed_checkpoint_is_not_quantized_again(packed, calibration_npy, tmp_path):
    refused(
        r"is quantized already \(llq_gptq\)", quantize, packed, tmp_path / "out", calibration_npy
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", 3, "was edited"),
        ("sym", True, "was edited"),
        ("group_size", 64, "was edited"),
        ("damp", 0.02, "was edited"),
        ("act_order", True, "was edited"),
        ("damp", None, "was edited"),
        ("group_size", None, "was edited"),
        ("digest", None, "was edited"),
        ("quantized_linears", 13, "was edited"),
        ("quantized_linears", None, "was edited"),
        ("quant_method", "llq_rtn", "has no option|was edited"),
        ("format_version", 2, "format_version 2"),
        ("bits", 9, "outside its range"),
        ("group", 1, "has no option 'group'"),
    ],
)
def test_an_edited_quantization_config(packed, key, value, said):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    if value is None:
        del config["quantization_config"][key]
    (packed / "config.json").write_text(json.dumps(config))
    refused(said, load, packed)
    if key not in ("format_version", "group"):
        refused(said, inspect_checkpoint, packed)


CODES = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("key", ["weight", "scale", "zero"])
def test_a_packed_tensor_is_missing(packed, key):
    name = CODES.replace("weight", key)
    _edit_tensors(packed, lambda tensors: tensors.pop(name), SINGLE)
    refused(rf"{name} \(block 0\) is missing", load, packed)
    (packed / HASHES).unlink()  # as of an older version
    refused(f"lacks {name}", load, packed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensor: tensor[:-1].clone(),
        lambda tensor: tensor[:, :-1].clone(),
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: torch.zeros(172, 96),
    ],
)
def test_a_packed_tensor_of_another_shape_or_type(packed, edit):
    _edit_tensors(packed, lambda tensors: tensors.update({CODES: edit(tensors[CODES])}), SINGLE)
    refused(rf"{CODES} \(block 0\) is not as it was written", load, packed)
    (packed / HASHES).unlink()
    refused(f"{CODES} is stored as", load, packed)


def test_a_size_in_a_config_makes_no_room(packed):
    """2**40 words would take 400 TB before transformers compares them with the file."""
    (packed / HASHES).unlink()
    config = json.loads((packed / "config.json").read_text())
    for vocab in (2**40, 319):
        (packed / "config.json").write_text(json.dumps({**config, "vocab_size": vocab}))
        refused(rf"embed_tokens.weight is stored as \[320, 96\], .* \[{vocab}, 96\]", load, packed)
    (packed / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    refused("num_hidden_layers=1000000000", load, packed)
    refused("num_hidden_layers=1000000000", build_skeleton, packed)


@pytest.fixture(
    params=["model.safetensors", *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2))]
)
def sharded(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    calibration_npy: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A file of a packed checkpoint of one file, or of three."""
    if request.param == SINGLE:
        return packed / SINGLE
    monkeypatch.setattr(Shards, "limit_bytes", 130_000)
    quantize(tiny_llama, tmp_path / "sharded", calibration_npy)
    return tmp_path / "sharded" / request.param


def test_a_packed_file_is_truncated(sharded, cli_refuses):
    os.truncate(sharded, sharded.stat().st_size - 64)
    with pytest.raises((LLQError, SafetensorError)):  # transformers reads the first file itself
        load(sharded.parent)
    assert "truncated or damaged" in cli_refuses("info", sharded.parent)


def test_a_packed_file_is_missing(sharded, cli_refuses):
    sharded.unlink()
    with pytest.raises((LLQError, OSError)):
        load(sharded.parent)
    assert f"{sharded.name}" in cli_refuses("info", sharded.parent)


def test_info_on_other_things(tiny_llama, cli_refuses, tmp_path):
    assert "did not quantize" in cli_refuses("info", tiny_llama)
    assert "is not a folder" in cli_refuses("info", tmp_path / "no")
    assert "config.json is missing" in cli_refuses("info", tmp_path)


# --- the disk is full -----------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, size: str, *more: str) -> bool:
        options = ",".join([f"size={size}", *more])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def grow(self, size: str) -> None:
        assert self.mount(size, "remount")

    def fill(self) -> None:
        with (self.path / "filler").open("ab", buffering=0) as file:
            chunk = b"x" * 4096
            try:
                while file.write(chunk) == len(chunk):
                    pass
            except OSError:
                return


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    disk = Disk(tmp_path / "disk")
    if not disk.mount("4m"):
        pytest.skip("needs permission to mount a tmpfs (root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_disk_full_in_the_middle(
    cli_refuses, tiny_llama, calibration_npy, packed_once, disk, monkeypatch, block, capsys
):
    """It fills after `block` of two blocks: the journal, or the report, finds no room."""
    out = disk.path / "out"
    command = [
        "llq",
        "quantize",
        tiny_llama,
        out,
        "--method",
        "gptq",
        "--calibration",
        calibration_npy,
    ]
    command += ["--calibration-samples", "8", "--calibration-seqlen", "32", "--device", "cpu"]
    command += ["--no-speak"]  # as `packed_once`
    with monkeypatch.context() as patch:
        patch.setattr(
            RichProgress, "blocks", lambda self, done, total: disk.fill() if done == block else None
        )
        error = cli_refuses(*command[1:])
    assert "No space left" in error
    assert f"{block} of 2 blocks are kept" in error
    nothing_loads(out)
    assert not list(out.glob("*.tmp"))

    disk.grow("8m")
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    capsys.readouterr()
    names = sorted(file.name for file in packed_once.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    assert all((out / name).read_bytes() == (packed_once / name).read_bytes() for name in names)
    assert len(Journal.read(Journal.beside(out))) == 1 + 2


def test_disk_too_small_is_known_beforehand(tiny_llama, calibration_npy, disk):
    disk.fill()
    refused("its disk has 0 MiB free", quantize, tiny_llama, disk.path / "out", calibration_npy)
    assert not (disk.path / "out").exists()


def test_disk_full_under_offload(disk):
    """Activations in a file that the disk has no room for: a sentence, not a bus error at the first
    touch.
    """
    code = """if True:
        import pathlib, sys, torch
        from llq_hf.common.errors import LLQError
        from llq_hf.engine.stream import Activations
        try:
            activations = Activations((16, 64, 4096), torch.float32, pathlib.Path(sys.argv[1]))
            activations[slice(0, 16)] = torch.ones(16, 64, 4096)
        except LLQError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(disk.path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert str(disk.path) in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(disk.path.iterdir()) == []


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_interrupted(llq, tiny_llama, calibration_npy, packed_once, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["quantize", tiny_llama, out, "--method", "gptq", "--calibration", calibration_npy]
    command += ["--calibration-samples", "8", "--calibration-seqlen", "32", "--device", "cpu"]
    command += ["--no-speak"]  # as `packed_once`

    def linear(self: RichProgress, name: str) -> None:
        if name == "model.layers.1.mlp.up_proj":
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RichProgress, "linear", linear)
            code, text = llq(*command)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "the same command continues where this one stopped" in text
    nothing_loads(out)
    assert llq(*command)[0] == 0
    assert all(
        (out / file.name).read_bytes() == file.read_bytes() for file in packed_once.iterdir()
    )
