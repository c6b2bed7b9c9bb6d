"""What `llq` prints: for programs, for people, and the help."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llq_hf import LLQError, cli
from llq_hf.cli.app import ORDER
from llq_hf.methods import METHODS

BITS = {"rtn": 4, "gptq": 3, "quip": 2}
BYTES = {"I32": 4, "I16": 2, "F32": 4, "F16": 2, "BF16": 2}


@pytest.fixture(scope="module")
def llq() -> Callable[..., str]:
    """Runs `llq ...` in this process: what it printed on stdout."""

    def llq(*arguments: object) -> str:
        result = CliRunner().invoke(
            cli.app, [str(part) for part in arguments], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    return llq


@pytest.fixture(scope="module")
def packed(
    llq: Callable[..., str],
    tiny_llama: Path,
    calibration_npy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, str]]:
    """By method: a packed checkpoint, and what `llq quantize` printed."""
    folder = tmp_path_factory.mktemp("packed")
    found = {}
    for method, bits in BITS.items():
        arguments = [
            "--method",
            method,
            "--bits",
            bits,
            "--calibration",
            calibration_npy,
            "--device",
            "cpu",
        ]
        arguments += ["--calibration-samples", 8]
        found[method] = folder / method, llq("quantize", tiny_llama, folder / method, *arguments)
    return found


def headers(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape"} of every tensor, read from the files by hand."""
    found: dict[str, dict[str, Any]] = {}
    for file in path.glob("*.safetensors"):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        found.update({name: entry for name, entry in header.items() if name != "__metadata__"})
    return found


def test_methods(llq):
    found = json.loads(llq("methods", "--json"))
    assert list(found) == list(METHODS)
    gptq = found["gptq"]
    assert gptq["bits"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert gptq["needs_calibration"]
    assert not found["rtn"]["needs_calibration"]
    assert gptq["options"]["group_size"] == 128
    assert gptq["options"]["act_order"] is False
    assert gptq["best"]["act_group_aware"] is True
    assert gptq["stored_bits_4096x4096"]["4"] == pytest.approx(4 + 16 / 128 + 4 / 128, abs=1e-3)
    for name, each in found.items():
        assert set(each["best"]) <= set(each["options"]) == set(METHODS[name].field_names())
        stored = list(each["stored_bits_4096x4096"].values())
        assert all(low < high for low, high in pairwise(stored))  # more bits take more bits


def test_methods_for_people(llq):
    text = llq("methods")
    for name, method in METHODS.items():
        assert name in text
        assert all(f"{option} = " in text for option in method.field_names())


@pytest.mark.parametrize("method", BITS)
def test_info_counts_what_is_in_the_files(llq, packed, tiny_llama, method):
    path, bits = packed[method][0], BITS[method]
    found = json.loads(llq("info", path, "--json"))
    tensors = headers(path)
    sizes = {name: math.prod(t["shape"]) * BYTES[t["dtype"]] for name, t in tensors.items()}
    dense = headers(tiny_llama)
    weights = {
        name: math.prod(t["shape"])
        for name, t in dense.items()
        if ".layers." in name and len(t["shape"]) == 2
    }
    modules = {name.removesuffix(".weight") for name in weights}
    stored = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in modules)
    assert len(weights) == found["quantized_linears"] == 14
    assert found["stored_bits"] == pytest.approx(stored * 8 / sum(weights.values()), rel=1e-12)
    assert found["stored_bits"] > bits
    assert found["bytes"] == sum(sizes.values())
    everything = sum(math.prod(t["shape"]) for t in dense.values())
    assert found["whole_model_bits"] == pytest.approx(
        sum(sizes.values()) * 8 / everything, rel=1e-12
    )
    assert found["nominal_bits"] == bits
    assert found["method"] == method
    assert found["config"] == METHODS[method].build(bits=bits).to_dict()
    assert (found["calibration"] is None) == (METHODS[method].observes is None)
    assert len(found["linears"]) == 14
    for record in found["linears"]:
        name = f"{record['name']}.weight"
        assert record["shape"] == dense[name]["shape"]
        assert 0 < record["weight_error"] < 1
        assert record["seconds"] > 0
        own = sum(size for key, size in sizes.items() if key.rpartition(".")[0] == record["name"])
        assert record["stored_bits"] == pytest.approx(
            own * 8 / math.prod(record["shape"]), rel=1e-12
        )


def test_info_after_the_folder_was_moved(llq, packed, tmp_path):
    """The journal stays behind, and with it the seconds; all else is in the folder."""
    moved = tmp_path / "moved"
    moved.symlink_to(packed["gptq"][0])
    found = json.loads(llq("info", moved, "--json"))
    before = json.loads(llq("info", packed["gptq"][0], "--json"))
    assert all("seconds" not in record for record in found["linears"])
    for record in before["linears"]:
        del record["seconds"]
    assert {**found, "path": ""} == {**before, "path": ""}


def test_info_for_people(llq, packed):
    text = llq("info", packed["gptq"][0], "--linears")
    assert "gptq" in text
    assert "group_size=128" in text
    assert "ids_sha256" in text
    assert "why no faster" in text


@pytest.mark.parametrize("method", BITS)
def test_what_quantize_prints(llq, packed, method):
    path, text = packed[method]
    found = json.loads(llq("info", path, "--json"))
    rows = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.replace("|", "│").split("│") for line in text.splitlines())
        if len(cells) == 4
    }
    assert METHODS[method].title in text
    assert rows["nominal bits"] == str(BITS[method])
    assert rows["stored bits per quantized weight"] == f"{found['stored_bits']:.3f}"
    assert rows["bits per weight of the whole model"] == f"{found['whole_model_bits']:.3f}"
    assert rows["quantized linears"] == "14"
    assert {"size on disk", "time", "peak memory"} <= set(rows)
    assert "AutoModelForCausalLM.from_pretrained(" in text


def test_the_line_to_load_it_can_be_copied(packed):
    """The path is printed whole, on one line, however long."""
    path, text = packed["gptq"]
    assert f"AutoModelForCausalLM.from_pretrained('{path}')" in text


def test_help_names_every_option(llq, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = llq("quantize", "--help")
    for method in METHODS.values():
        assert all(f"--{option.replace('_', '-')}" in text for option in method.field_names())
    assert "Options of the method" in text
    assert "all methods" in text
    for option in (
        "--preset",
        "--calibration",
        "--calibration-samples",
        "--device",
        "--dtype",
        "--offload",
    ):
        assert option in text


NAMED = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
COMMANDS = [[], *([name] for name in NAMED)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch):
    """Except where there is nothing to choose, the help shows a command to paste."""
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    if command not in (["methods"], ["build-kernels"]):
        assert re.search(rf"• llq {' '.join(command)}", result.stdout)


def test_the_help_has_every_command_in_order(llq):
    """`llq --help` names the commands in panels, in the order that a newcomer needs."""
    assert sorted(ORDER) == sorted(NAMED)
    rows = re.findall(r"^│ ([a-z-]+) +\S", llq("--help"), re.MULTILINE)
    assert [row for row in rows if row in ORDER] == list(ORDER)


def test_every_option_has_help():
    """No option says only its name: each has a sentence, and its default where it has one."""
    for command in get_command(cli.app).commands.values():
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"


def test_batch_sizes_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(LLQError, match="--batches 1,x are no batch sizes; write them as 1,8"):
        CliRunner().invoke(
            cli.app,
            ["bench", str(tmp_path), "--base", "demo", "--batches", "1,x"],
            catch_exceptions=False,
        )


def test_options_reach_the_method(llq, tiny_llama, calibration_npy, tmp_path):
    arguments = [
        "--method",
        "gptq",
        "--bits",
        2,
        "--group-size",
        32,
        "--sym",
        "--damp",
        0.05,
        "--no-act-order",
    ]
    arguments += [
        "--preset",
        "best",
        "--calibration",
        calibration_npy,
        "--calibration-samples",
        2,
        "--device",
        "cpu",
    ]
    llq("quantize", tiny_llama, tmp_path / "out", *arguments)
    found = json.loads(llq("info", tmp_path / "out", "--json"))
    expected = {
        "bits": 2,
        "group_size": 32,
        "sym": True,
        "damp": 0.05,
        "act_order": False,
        "true_sequential": True,
    }
    assert expected.items() <= found["config"].items()
    assert found["calibration"]["samples"] == 2


def test_eval_hands_everything_to_lm_eval(monkeypatch, tmp_path):
    """No process is started: what would be run is looked at."""
    commands: list[list[str]] = []

    class Done:
        returncode = 3

    def run(command: list[str], check: bool) -> type[Done]:
        commands.append(command)
        return Done

    monkeypatch.setattr(cli.evaluate.subprocess, "run", run)
    arguments = [
        "eval",
        str(tmp_path),
        "--tasks",
        "llq_demo",
        "--model-args",
        "dtype=float32",
        "--limit",
        "5",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 3
    expected = [
        "--model",
        "llq",
        "--model_args",
        f"pretrained={tmp_path},dtype=float32",
        "--tasks",
        "llq_demo",
    ]
    assert commands == [[sys.executable, "-m", "lm_eval", *expected, "--limit", "5"]]


def test_eval_hands_tasks_about_images_to_lmms_eval(monkeypatch, tmp_path):
    pytest.importorskip("lmms_eval")
    commands: list[list[str]] = []

    class Done:
        returncode = 1

    monkeypatch.setattr(
        cli.evaluate.subprocess, "run", lambda command, check: commands.append(command) or Done
    )
    result = CliRunner().invoke(
        cli.app, ["eval", str(tmp_path), "--tasks", "llq_mllm", "--batch_size", "2"]
    )
    assert result.exit_code == 1
    expected = [
        "--model",
        "llq",
        "--model_args",
        f"pretrained={tmp_path}",
        "--tasks",
        "llq_mllm",
        "--batch_size",
        "2",
    ]
    assert commands == [[sys.executable, "-m", "llq_hf", "lmms_eval", *expected]]
