"""A killed run, and the same command again: the same bytes as a run that nobody killed. Nothing
else is ever taken up.

Runs that are really killed (SIGKILL) happen in children of a fork server that has imported
everything: `llq quantize` with no ten seconds of imports. Where only the place of the interruption
matters, a progress callback raises.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from contract.cases import CHECKPOINTS
from safetensors.torch import load_file, save_file

from llq_hf.checkpoints.journal import Journal
from llq_hf.checkpoints.shards import Shards
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.cached import cached
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions
from llq_hf.methods import METHODS, build

BLOCKS = 6
METHOD_BITS = {"rtn": 4, "gptq": 3, "quip": 2}  # these are really killed, too
# The others run with the options of the contract's checkpoint rows.
OPTIONS = {name: {"bits": bits, **options} for name, bits, options in reversed(CHECKPOINTS)}
OPTIONS |= {name: {"bits": bits} for name, bits in METHOD_BITS.items()}
POLL_SECONDS, LIMIT_SECONDS = 0.002, 120


def digests(out: Path) -> dict[str, str]:
    assert not [path for path in out.rglob("*") if path.is_dir()]
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())
    }


def weights(out: Path) -> Path:
    """The file of all tensors, finished or not."""
    return next(out.glob("model.safetensors*"))


def place(out: Path, name: str) -> tuple[int, int]:
    """Where in the file the bytes of a tensor begin and end, by the header's own words."""
    with weights(out).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def whole_lines(out: Path) -> int:
    return len(Journal.read(Journal.beside(out)))


# --- runs in this process -------------------------------------------------------------------------


class StoppedError(Exception):
    """What stands for a kill where only the place matters."""


class Stop(Progress):
    """Ends a run right after block `block` is in the journal, or when the linear named `linear` is
    begun.
    """

    def __init__(self, block: int | None = None, linear: str | None = None) -> None:
        self.block, self.at_linear = block, linear

    def blocks(self, done: int, total: int) -> None:
        if self.block is not None and done == self.block + 1:
            raise StoppedError

    def linear(self, name: str) -> None:
        if name == self.at_linear:
            raise StoppedError


class Recorder(Progress):
    """Which linears a run quantized."""

    def __init__(self) -> None:
        self.linears: list[str] = []

    def linear(self, name: str) -> None:
        self.linears.append(name)

    @property
    def worked_on(self) -> set[int]:
        return {int(name.split(".")[2]) for name in self.linears}


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    """Deep enough to be interrupted, and quantized in about a second."""
    return make_checkpoint(num_hidden_layers=BLOCKS, seed=5)


@pytest.fixture(scope="module")
def run(model: Path, calibration_npy: Path) -> Callable[..., dict[str, Any]]:
    def run(
        out: Path, method: str = "gptq", progress: Progress | None = None, **changed: Any
    ) -> dict[str, Any]:
        data = Calibration(str(changed.pop("calibration", calibration_npy)), samples=8, seqlen=32)
        options = RunOptions(dtype=changed.pop("dtype", None), offload=changed.pop("offload", None))
        base = changed.pop("model", model)
        built = build(method, **{**OPTIONS[method], **changed})
        return quantize_checkpoint(str(base), out, built, data, options, progress)

    return run


@pytest.fixture(scope="module")
def unbroken(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ run that nobody interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    run(out)
    return out


@pytest.fixture
def interrupted(run: Callable[..., Any], tmp_path: Path) -> Path:
    """A GPTQ run that ended after three of six blocks."""
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(out, progress=Stop(block=2))
    assert whole_lines(out) == 1 + 3
    assert not (out / "config.json").exists()
    return out


# --- kill -9 --------------------------------------------------------------------------------------


def command(arguments: list[str], fault: str | None) -> None:
    """`llq quantize ...` in a child; `fault` names a place at which it kills itself, "torn 3" or
    "renaming 3".
    """
    import llq_hf.cli

    torch.set_num_threads(1)
    if fault is not None:
        _install(fault)
    sys.argv = ["llq", "quantize", *arguments]
    with open(os.devnull, "w") as null:
        sys.stdout = sys.stderr = null
        llq_hf.cli.main()


def _install(fault: str) -> None:
    kind, _, number = fault.partition(" ")
    calls = 0

    def is_last_call() -> bool:
        nonlocal calls
        calls += 1
        return calls == int(number)

    if kind == "renaming":  # the draft is written, its name is not yet right
        replace = os.replace

        def fatal_replace(source: Any, target: Any) -> None:
            if is_last_call():
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = fatal_replace
    elif kind == "writing":  # half of a tensor is written
        put = Shards._put

        def fatal_put(self: Shards, handle: BinaryIO, name: str, tensor: torch.Tensor) -> str:
            if is_last_call():
                handle.seek(self._places[name].start)
                handle.write(b"x" * (self._places[name].spec.nbytes // 2))
                handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, handle, name, tensor)

        Shards._put = fatal_put  # type: ignore[method-assign]
    else:  # half a line of the journal is written
        append = Journal._append

        def fatal_append(self: Journal, line: dict[str, Any]) -> None:
            if is_last_call():
                with self.path.open("a") as handle:
                    handle.write(json.dumps(line)[:40])
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, line)

        Journal._append = fatal_append  # type: ignore[method-assign]


class Runner:
    """Starts the command line in children, and kills them."""

    def __init__(self, model: Path, calibration: Path) -> None:
        self.model, self.calibration = model, calibration
        self.context = multiprocessing.get_context("forkserver")

    def start(self, out: Path, method: str, fault: str | None = None) -> Any:
        arguments = [
            str(self.model),
            str(out),
            "--method",
            method,
            "--bits",
            str(METHOD_BITS[method]),
        ]
        arguments += [
            "--calibration",
            str(self.calibration),
            "--calibration-samples",
            "8",
            "--device",
            "cpu",
        ]
        process = self.context.Process(target=command, args=(arguments, fault))
        process.start()
        return process

    def finish(self, out: Path, method: str) -> dict[str, str]:
        """Digests of what a repeated run leaves; beside the folder, it is the journal alone."""
        process = self.start(out, method)
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0
        assert {path.name for path in out.parent.glob(out.name + "*")} == {
            out.name,
            Journal.beside(out).name,
        }
        return digests(out)

    def kill_when(self, out: Path, method: str, ready: Callable[[], bool]) -> bool:
        """Kill -9 as soon as `ready`; whether the run was not over by then."""
        process = self.start(out, method)
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.is_alive() and not ready():
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


@pytest.fixture(scope="module")
def runner(model: Path, calibration_npy: Path) -> Runner:
    runner = Runner(model, calibration_npy)
    runner.context.set_forkserver_preload(
        [
            "llq_hf.cli",
            "llq_hf.engine.execute",
            "llq_hf.common.terminal",
            "transformers.models.llama.modeling_llama",
            "test_resume",
        ]
    )
    return runner


@pytest.fixture(scope="module")
def untouched(
    runner: Runner, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, str], float]]:
    """Digests and seconds of work (from the journal's appearance on) of a run that nobody killed,
    by method.
    """
    folder, found = tmp_path_factory.mktemp("untouched"), dict[str, tuple[dict[str, str], float]]()

    def of(method: str) -> tuple[dict[str, str], float]:
        if method not in found:
            out = folder / method
            process = runner.start(out, method)
            while process.is_alive() and not Journal.beside(out).exists():
                time.sleep(POLL_SECONDS)
            started = time.monotonic()
            process.join(LIMIT_SECONDS)
            assert process.exitcode == 0
            found[method] = digests(out), time.monotonic() - started
        return found[method]

    return of


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("method", METHOD_BITS)
def test_killed_after_some_blocks(runner, untouched, tmp_path, method, blocks):
    out, wanted = tmp_path / "out", untouched(method)[0]
    assert runner.kill_when(out, method, lambda: whole_lines(out) >= 1 + blocks)
    assert not (out / "config.json").exists()
    assert runner.finish(out, method) == wanted


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("method", METHOD_BITS)
def test_killed_at_any_moment(runner, untouched, tmp_path, method, share):
    wanted, seconds = untouched(method)
    out = tmp_path / "out"
    appeared: list[float] = []

    def ready() -> bool:
        if not appeared and Journal.beside(out).exists():
            appeared.append(time.monotonic())
        return bool(appeared) and time.monotonic() - appeared[0] >= share * seconds

    # Where it was faster this time: a finished run, which is taken as it is
    runner.kill_when(out, method, ready)
    assert runner.finish(out, method) == wanted


@pytest.mark.parametrize(
    "fault",
    [*(f"renaming {i}" for i in range(1, 9)), "torn 1", "torn 3", "writing 2", "writing 40"],
)
def test_killed_in_the_middle_of_a_write(runner, untouched, tmp_path, fault):
    """Renamed: 1 the journal, 2 the weights, 3 the report, 4 to 6 small files, 7 the hashes,
    8 config.json. Torn lines: head, blocks. Written: tensors.
    """
    out = tmp_path / "out"
    process = runner.start(out, "gptq", fault)
    process.join(LIMIT_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    assert runner.finish(out, "gptq") == untouched("gptq")[0]


def test_killed_again_and_again(runner, untouched, tmp_path):
    out = tmp_path / "out"
    for blocks in range(1, BLOCKS):
        runner.kill_when(out, "quip", lambda blocks=blocks: whole_lines(out) >= 1 + blocks)
    assert runner.finish(out, "quip") == untouched("quip")[0]


def test_two_processes_at_once(runner, untouched, tmp_path):
    out = tmp_path / "out"
    both = [runner.start(out, "gptq") for _ in range(2)]
    for process in both:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in both] == [0, 0]
    assert digests(out) == untouched("gptq")[0]
    assert whole_lines(out) == 1 + BLOCKS  # the second found the work done


# --- the same bytes -------------------------------------------------------------------------------


def fill_cache(model: Path, calibration: Path, root: Path) -> None:
    """Make GPTQ's checkpoint in a cache, or find it there."""
    torch.set_num_threads(1)
    data = Calibration(str(calibration), samples=8, seqlen=32)
    cached(str(model), build("gptq", **OPTIONS["gptq"]), data, RunOptions(), root, Progress())


def test_two_processes_want_the_same_of_a_cache(
    runner, unbroken, model, calibration_npy, tmp_path, monkeypatch
):
    """One makes it, the other one waits; from then on nobody writes there, so that it may be
    read-only.
    """
    arguments = (model, calibration_npy, tmp_path / "root")
    both = [runner.context.Process(target=fill_cache, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0
    (out,) = (path for path in (tmp_path / "root").iterdir() if path.is_dir())
    assert digests(out) == digests(unbroken)
    assert {path.name for path in out.parent.iterdir()} == {out.name, Journal.beside(out).name}

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    for name in ("replace", "mkdir", "unlink", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    fill_cache(*arguments)


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bytes(run, tmp_path, method):
    run(tmp_path / "a", method)
    run(tmp_path / "b", method)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_preset_best_resumes(run, tmp_path):
    """true_sequential: a block is observed four times, with some of its linears packed."""
    best = dict(build("gptq", "best").to_dict(), bits=3)
    run(tmp_path / "a", **best)
    with pytest.raises(StoppedError):
        run(tmp_path / "b", progress=Stop(linear="model.layers.3.mlp.gate_proj"), **best)
    run(tmp_path / "b", **best)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_stopped_inside_a_block(run, unbroken, tmp_path):
    out, recorder = tmp_path / "out", Recorder()
    with pytest.raises(StoppedError):
        run(out, progress=Stop(linear="model.layers.4.mlp.down_proj"))
    run(out, progress=recorder)
    assert digests(out) == digests(unbroken)
    assert recorder.worked_on == {4, 5}


def test_resumes_with_offload(run, unbroken, interrupted, tmp_path):
    """Where activations lie is how to run, not what to compute."""
    run(interrupted, offload=tmp_path / "offload")
    assert digests(interrupted) == digests(unbroken)


def test_resumes_on_a_disk_that_the_run_itself_filled(run, unbroken, interrupted, monkeypatch):
    """The room of all tensors is reserved from the start, so the second run needs no more."""
    full = shutil.disk_usage(interrupted)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)


def test_a_finished_run_is_taken_as_it_is(run, tmp_path):
    out, recorder = tmp_path / "out", Recorder()
    first = run(out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    journal = Journal.beside(out).read_bytes()
    again = run(out, progress=recorder)
    assert again == json.loads(json.dumps(first))
    assert recorder.linears == []
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert Journal.beside(out).read_bytes() == journal


def test_the_report_is_the_same_and_seconds_are_in_the_journal_only(run, interrupted, unbroken):
    report = run(interrupted)
    assert report == run(unbroken)
    assert not any("seconds" in record for record in report["linears"])
    lines = Journal.read(Journal.beside(interrupted))[1:]
    assert [line["block"] for line in lines] == list(range(BLOCKS))
    assert all(line["seconds"] > 0 and line["peak_bytes"] > 0 for line in lines)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 60, -2])
def test_torn_last_line(run, interrupted, unbroken, keep):
    journal, recorder = Journal.beside(interrupted), Recorder()
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:keep])
    run(interrupted, progress=recorder)
    assert digests(interrupted) == digests(unbroken)
    assert recorder.worked_on == {2, 3, 4, 5}
    assert whole_lines(interrupted) == 1 + BLOCKS


def test_torn_first_line(run, interrupted, unbroken):
    """Killed while the journal was begun: there is nothing to take up, and nothing in OUT."""
    journal = Journal.beside(interrupted)
    journal.write_text(journal.read_text()[:20])
    for file in interrupted.iterdir():
        file.unlink()
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)


def test_last_line_without_its_newline(run, interrupted, unbroken):
    journal, recorder = Journal.beside(interrupted), Recorder()
    journal.write_text(journal.read_text().rstrip("\n"))
    run(interrupted, progress=recorder)
    assert digests(interrupted) == digests(unbroken)
    assert recorder.worked_on == {3, 4, 5}


def _delete(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _overwrite_head(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.write(bytes(64))


def _damage(out: Path, name: str, how: str) -> None:
    """Change bytes of one tensor: the header is fine, only the digest tells."""
    begin, end = place(out, name)
    with weights(out).open("r+b") as file:
        file.seek(begin)
        data = bytearray(file.read(end - begin))
        file.seek(begin)
        if how == "flip":
            data[-1] ^= 1
        else:
            data = bytearray(len(data))
        file.write(data)


TENSORS = ["mlp.down_proj.weight", "mlp.down_proj.scale", "input_layernorm.weight"]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("how", ["flip", "zeros"])
def test_a_finished_block_that_is_damaged_is_done_again(run, interrupted, unbroken, how, tensor):
    recorder = Recorder()
    _damage(interrupted, f"model.layers.1.{tensor}", how)
    run(interrupted, progress=recorder)
    assert digests(interrupted) == digests(unbroken)
    assert recorder.worked_on == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("how", ["flip", "zeros"])
def test_a_damaged_block_of_a_finished_run_is_done_again(run, unbroken, tmp_path, how):
    out, recorder = tmp_path / "out", Recorder()
    run(out)
    _damage(out, "model.layers.4.self_attn.o_proj.weight", how)
    assert Journal.damaged(out) == ["model.layers.4.self_attn.o_proj.weight"]
    run(out, progress=recorder)
    assert digests(out) == digests(unbroken)
    assert recorder.worked_on == {4, 5}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", [_delete, _cut, _overwrite_head])
def test_the_whole_file_is_damaged(run, interrupted, unbroken, damage, finished):
    if finished:
        run(interrupted)
    damage(weights(interrupted))
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)


@pytest.mark.parametrize("how", ["flip", "zeros"])
def test_a_tensor_outside_the_blocks_is_damaged(run, interrupted, unbroken, how):
    _damage(interrupted, "model.embed_tokens.weight", how)
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)


def test_the_whole_folder_is_gone(run, interrupted, unbroken):
    shutil.rmtree(interrupted)
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)


# --- a finished folder is mended ------------------------------------------------------------------


def _as_config(content: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(content) and None


def _section(section: Any) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "quantization_config": section}))

    return edit


@pytest.fixture(scope="module")
def sharded(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in shards of some blocks, embeddings in the first."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "limit_bytes", 150_000)
        run(out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


MENDED = [
    *((name, how) for name in ("model-00001-of-*", "model-00004-of-*") for how in (_delete, _cut)),
    *((name, how) for name in ("*.index.json", "tokenizer.json") for how in (_delete, _cut)),
    *((name, how) for name in ("llq_report.json", "llq_hashes.json") for how in (_delete, _cut)),
    ("tokenizer_config.json", _as_config("{}")),
    *(("config.json", how) for how in (_delete, _cut, _as_config("[]"), _as_config(""))),
    *(("config.json", _section(section)) for section in ([], ["x"], "x", None, {"a": 1})),
]


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no-journal"])
@pytest.mark.parametrize(("name", "damage"), MENDED)
def test_whatever_is_damaged_in_a_finished_folder(
    run, sharded, tmp_path, monkeypatch, name, damage, journal
):
    """By the journal, or by hashes and report where it is gone; nothing is quantized again but the
    blocks that are hit and those behind them.
    """
    monkeypatch.setattr(Shards, "limit_bytes", 150_000)
    out = Path(shutil.copytree(sharded, tmp_path / "out"))
    if journal:
        shutil.copyfile(Journal.beside(sharded), Journal.beside(out))
    file = next(out.glob(name))
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    held = [tensor for tensor, shard in weight_map.items() if shard == file.name]
    hit = {int(tensor.split(".")[2]) for tensor in held if ".layers." in tensor}
    damage(file)
    recorder = Recorder()
    if not journal and (name, damage) == ("llq_hashes.json", _delete):
        run(out, progress=recorder)  # as an older version left it, and taken as it is
        assert recorder.worked_on == set()
        return
    if not journal and name.startswith("llq_"):
        with pytest.raises(LLQError, match="is not empty and no journal"):
            run(out, progress=recorder)
        return
    run(out, progress=recorder)
    assert digests(out) == digests(sharded)
    assert recorder.worked_on == set(range(min(hit, default=BLOCKS), BLOCKS))
    assert {path.name for path in tmp_path.iterdir()} == {"out", Journal.beside(out).name}


@pytest.mark.parametrize("name", ["db_llm", "efficient_qat", "spinquant"])
def test_a_mended_tokenizer_trains_nothing_again(run, tmp_path, name):
    """What was tuned is not tuned once more, which would be another model."""
    out, recorder = tmp_path / "out", Recorder()
    run(out, method=name)
    wanted = digests(out)
    (out / "tokenizer.json").unlink()
    run(out, method=name, progress=recorder)
    assert digests(out) == wanted
    assert recorder.worked_on == set()


def test_drafts_of_killed_writers_go(run, interrupted, unbroken):
    """In the folder and beside it; what another run keeps beside its own folder stays."""
    ours = [
        interrupted / "config.json.tmp",
        interrupted.with_name("out.training.safetensors.tmp"),
        interrupted.with_name("out.journal.jsonl.tmp"),
    ]
    other = interrupted.with_name("out.2.journal.jsonl.tmp")
    for folder in (*ours, other):
        folder.mkdir()
        (folder / ".tmpX3b9").write_text("half")
    interrupted.with_name("out.learned.safetensors").write_text("of another command")
    run(interrupted)
    assert digests(interrupted) == digests(unbroken)
    assert {path.name for path in interrupted.parent.iterdir()} == {
        "out",
        "out.journal.jsonl",
        other.name,
    }


# --- other inputs ---------------------------------------------------------------------------------


@pytest.fixture
def other_calibration(calibration_npy: Path, tmp_path: Path) -> Path:
    ids = np.load(calibration_npy)
    ids[0, 0] += 1
    np.save(tmp_path / "other.npy", ids)
    return tmp_path / "other.npy"


@pytest.fixture
def other_model(model: Path, tmp_path: Path) -> Path:
    """One weight of the base differs in its last bit."""
    folder = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"bits": 4}, "config.bits was 3, is 4"),
        ({"group_size": 64}, "config.group_size was 128, is 64"),
        ({"damp": 0.02}, "config.damp was 0.01, is 0.02"),
        ({"method": "rtn"}, "method was 'gptq', is 'rtn'"),
        ({"calibration": "other_calibration"}, "calibration.ids_sha256 was"),
        ({"model": "other_model"}, "base_sha256 was"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_inputs_are_refused(run, interrupted, request, changed, named, finished):
    if finished:
        run(interrupted)
    before = digests(interrupted), Journal.beside(interrupted).read_bytes()
    options = {
        key: request.getfixturevalue(value) if str(value).startswith("other_") else value
        for key, value in changed.items()
    }
    with pytest.raises(LLQError, match="was begun with other inputs") as error:
        run(interrupted, **options)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    if len(changed) == 1 and "method" not in changed:
        assert str(error.value).count(" was ") == 2  # "was begun", and the one thing that differs
    assert (digests(interrupted), Journal.beside(interrupted).read_bytes()) == before


def test_a_folder_without_a_journal_is_not_taken_up(run, interrupted):
    Journal.beside(interrupted).unlink()
    before = digests(interrupted)
    with pytest.raises(LLQError, match="is not empty and no journal"):
        run(interrupted)
    assert digests(interrupted) == before
