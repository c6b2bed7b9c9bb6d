"""Cells that cost nothing: work for engines, and records of invented figures. Importable by child
processes.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from filelock import FileLock

from llq_hf.common.progress import Progress
from llq_hf.methods import METHODS
from llq_hf.study.plan import DENSE, Cell
from llq_hf.study.record import DONE, Record

CRASH = "crash"  # a method whose cells kill their process


def invented(cell: Cell) -> Record:
    """A finished record whose figures follow from the cell."""
    number = int(cell.fingerprint[:6], 16) / 16**6
    results = {
        task: {"token_perplexity": 2 + number, "acc": number}
        for task in (*cell.tasks, "llq_demo_ppl")
    }
    quantized: dict[str, object] = {}
    if cell.method != DENSE and cell.method in METHODS:
        linears = [
            {"name": f"model.layers.{i}.mlp.up_proj", "weight_error": number / (i + 1)}
            for i in range(3)
        ]
        width = float(cell.options.get("bits", 4))
        bits = {"nominal_bits": width, "stored_bits": width + 0.125, "whole_model_bits": width + 1}
        quantized = {"method": cell.method, "config": cell.config, **bits, "linears": linears}
    return Record.of(cell, DONE, results=results, quantized=quantized)


def work(
    cell: Cell, progress: Progress, folder: Path | None = None, killers: tuple[str, ...] = ()
) -> Record:
    """Invented figures. In `folder`: a line per call in calls.txt; the first call of a killer kills
    the parent.
    """
    progress.stage("inventing", 1)
    progress.advance()
    if cell.method == CRASH:
        os.kill(os.getpid(), signal.SIGKILL)
    if folder is not None:
        with (folder / "calls.txt").open("a") as calls:
            calls.write(cell.fingerprint + "\n")
        if (
            cell.fingerprint in killers
            and (folder / "calls.txt").read_text().count(cell.fingerprint) == 1
        ):
            FileLock(
                folder / f"{cell.fingerprint}.alive"
            ).acquire()  # let go when this process is gone
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
    return invented(cell)
