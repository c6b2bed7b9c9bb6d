"""Runs one cell: quantize (or take it from the cache), fine-tune, evaluate, measure.

Whatever goes wrong becomes the cell's record.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.dense import fetch
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.packed import read_report
from ..common.errors import LLQError
from ..common.files import read_json, write_json
from ..common.progress import Progress
from ..data.calibration import CalibrationOptions
from ..demo import resolve
from ..engine.options import RunOptions
from ..hosts.loading import load_model
from ..method import Method
from ..methods import build
from .cost import Workload, compare, disk_bytes, journalled, peak_memory, ratios
from .divergence import DivergenceOptions, load_windows, measure_divergence
from .evaluate import Results, evaluate
from .plan import DENSE, Cell
from .record import DONE, FAILED, REFUSED, Record

if TYPE_CHECKING:
    from ..finetune.trainer import Recipe

PACKAGES = ("llq-hf", "torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class Setup:
    """How cells are run, as opposed to what they are."""

    device: str = "cpu"
    batch_size: int | str = 1
    parallelize: bool = False  # spread the model over all GPUs that the cell sees
    cache: Path | None = None  # of packed checkpoints; default: that of lm-eval's `llq`
    offload: Path | None = None
    load: Workload | None = None  # None: speed is not measured


def run_cell(cell: Cell, progress: Progress, setup: Setup) -> Record:
    """The record of a cell: done, refused with a reason, or failed with a trace.

    Never raises: not even where the cell does something wrong.
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    try:
        _fill(figures, cell, setup, progress)
        status = DONE
    except LLQError as error:
        status = REFUSED
        figures = {"reason": str(error)}
    except Exception as error:  # of torch, lm-eval, the disk, ...: one cell must not stop the rest
        status = FAILED
        figures = {"reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    run = {"began": began, "seconds": time.perf_counter() - started, **_machine(setup)}
    return Record.of(cell, status, **figures, run=run)


def _fill(figures: dict[str, Any], cell: Cell, setup: Setup, progress: Progress) -> None:
    if cell.finetune:
        recipe_of(cell)  # raises before the model is quantized
    base = path = str(fetch(resolve(cell.model), cell.revision))
    cost: dict[str, Any] = {}
    if cell.method != DENSE:
        folder, cost["quantize"] = _quantize(cell, setup, progress)
        path = str(folder)
        figures["quantized"] = _read_quantized(folder)
    cost["disk_bytes"] = disk_bytes(path)
    answers: Results = {}
    if cell.finetune:
        folder, cost["finetune"], answers = _finetune(path, cell, setup, progress)
        path = str(folder)
        cost["disk_bytes"] += disk_bytes(path)
    progress.stage("evaluating")
    results, figures["right"] = evaluate(
        path, base, cell, setup.device, setup.batch_size, setup.parallelize
    )
    figures["results"] = results | answers
    if cell.divergence:
        figures["results"]["divergence"] = _divergence(path, base, cell, setup, progress)
    if setup.load is not None:
        cost |= _speed(path, base, setup.load, setup, progress)
    figures["cost"] = cost


def _quantize(cell: Cell, setup: Setup, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The packed checkpoint, and what it cost to make."""
    from ..engine.cached import cached  # imports transformers: the parent of a sweep does not

    method: Method = build(cell.method, cell.preset, **cell.options)
    data = CalibrationOptions(**cell.calibration, seed=cell.seed).for_model(cell.model)
    dtype = None if cell.dtype == "auto" else cell.dtype
    run = RunOptions(
        device=setup.device, dtype=dtype, offload=setup.offload, revision=cell.revision
    )
    timed = Timed(progress)
    with peak_memory(setup.device) as memory:
        path = cached(resolve(cell.model), method, data, run, setup.cache, timed)
    return path, _cost_of(path, {**timed.figures(), **memory} if timed.worked else None)


def _cost_of(made: Path, cost: dict[str, Any] | None) -> dict[str, Any]:
    """What it cost to make a folder: `cost` where it was made just now, else as noted then.

    The note lies beside the folder, for the next cell that finds it made. Where a kill came between
    the two, it tells what the journal does.
    """
    path = made.with_name(made.name + ".cost.json")
    if cost is None and path.is_file():
        return read_json(path)
    cost = cost or journalled(made) or {}
    with suppress(OSError):  # a read-only cache
        write_json(path, cost)
    return cost


def _finetune(
    base: str, cell: Cell, setup: Setup, progress: Progress
) -> tuple[Path, dict[str, Any], Results]:
    """A LoRA adapter of the packed checkpoint, what it cost to train, and its held-out answers.

    The adapter lies beside the checkpoint in the cache.
    """
    from ..checkpoints.adapter import is_adapter
    from ..finetune import trainer  # imports transformers

    data, recipe = recipe_of(cell)
    machine = trainer.machine(setup.device, cell.dtype, save_steps=250)
    out = Path(base).with_name(f"{Path(base).name}-lora-{fingerprint(dict(cell.finetune))}")
    made = not is_adapter(str(out))
    timed = Timed(progress)
    with peak_memory(setup.device) as memory:
        note = trainer.finetune(base, out, data, recipe, machine, timed)
        timed.close()
    answers = {"answers": note["after"], "answers_before": note["before"]}
    return out, _cost_of(out, {**timed.figures(), **memory} if made else None), answers


def recipe_of(cell: Cell) -> tuple[str, Recipe]:
    """The data and the recipe of a cell's fine-tuning. LLQError for a field that there is not."""
    from ..finetune import trainer  # imports transformers

    asked = {"data": "alpaca", **cell.finetune}
    data = asked.pop("data")
    known = [each.name for each in fields(trainer.Recipe)]
    if unknown := set(asked) - set(known):
        raise LLQError(f"finetune has no {unknown.pop()!r}; it has: data, {', '.join(known)}")
    return data, trainer.Recipe(**asked)


class Timed(Progress):
    """Passes everything on, and keeps the seconds of each phase."""

    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self.seconds = defaultdict[str, float](float)
        self.worked = False
        self.resumed = False
        self._phase = "preparing"
        self._since = time.perf_counter()
        self._processor_began = time.process_time()

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase = phase.replace(".", " ")  # a path in a record has dots between its names
        self._since = now

    def stage(self, text: str, total: int = 0) -> None:
        self._enter(text)
        self.inner.stage(text, total)

    def advance(self, count: int = 1) -> None:
        self.inner.advance(count)

    def blocks(self, done: int, total: int) -> None:
        self.resumed |= done > 0 and not self.worked
        self.worked = True
        self._enter("between blocks")
        self.inner.blocks(done, total)

    def linear(self, name: str) -> None:
        self._enter("linears")
        self.inner.linear(name)

    def close(self) -> None:
        self._enter("closed")
        self.inner.close()

    def figures(self) -> dict[str, Any]:
        """Seconds, in all and by phase; processor_seconds: of all threads of this process.

        resumed: the run went on with a killed one, and the seconds are those since.
        """
        return {
            "seconds": sum(self.seconds.values()),
            "processor_seconds": time.process_time() - self._processor_began,
            "phases": dict(self.seconds),
            "resumed": self.resumed,
        }


def _read_quantized(folder: Path) -> dict[str, Any]:
    """From the checkpoint's own report: method, bits counted from the file, linears' errors."""
    report = read_report(folder)
    identity, bits = report["identity"], report["bits"]
    return {
        "method": identity["method"],
        "config": identity["config"],
        "calibration": identity["calibration"],
        "fingerprint": report["fingerprint"],
        "nominal_bits": bits["nominal"],
        "stored_bits": bits["stored"],
        "whole_model_bits": bits["whole_model"],
        "bytes": bits["bytes"],
        "linears": report["linears"],
    }


def _divergence(
    path: str, base: str, cell: Cell, setup: Setup, progress: Progress
) -> dict[str, float]:
    """KL divergence of the model in `path` from that in `base`. Both are in memory meanwhile."""
    windows_NS = load_windows(base, DivergenceOptions(**cell.divergence))
    model, reference = (
        load_model(each, setup.device, setup.parallelize, cell.dtype) for each in (path, base)
    )
    progress.stage("measuring the divergence", len(windows_NS))
    return measure_divergence(model, reference, windows_NS, progress.advance)


def _speed(
    path: str, base: str, load: Workload, setup: Setup, progress: Progress
) -> dict[str, Any]:
    """Speed of the model, and of the full-precision one beside it.

    Where both do not fit into memory: the reason.
    """
    try:
        models = {"own": load_model(path, setup.device, setup.parallelize)}
        if path != base:
            models["reference"] = load_model(base, setup.device, setup.parallelize)
        progress.stage("measuring", (load.rounds + 1) * len(models))
        timed = compare(models, load, progress.advance)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"not_measured": f"{type(error).__name__}: {error}"}
    if "reference" in timed:
        return {**timed, "ratios": ratios(timed["own"], timed["reference"])}
    return dict(timed)


def _machine(setup: Setup) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if setup.device.startswith("cuda") and torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    return {
        "host": platform.node(),
        "processor": processor,
        "cores": os.cpu_count(),
        "device": setup.device,
        "threads": torch.get_num_threads(),
        "batch_size": setup.batch_size,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
