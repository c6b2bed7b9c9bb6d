"""Runs many cells: in a process of their own on this machine, or as tasks of a Ray cluster.

Either engine yields a record for each cell that is done; `sweep` writes them. lm-eval takes half a
minute to import, so a local process runs one cell after another. A process that dies (no memory, a
crash in C) is replaced, and its cell is recorded as failed. What a cell prints goes to its log.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from filelock import Timeout
from rich.text import Text

from ..common.errors import LLQError
from ..common.files import locked, make_folder, remove_drafts
from ..common.progress import Progress
from .plan import Cell
from .record import FAILED, Record, pending, relabel, write_record

Work = Callable[[Cell, Progress], Record]  # picklable, as functools.partial(run_cell, setup=...)


class Watcher(Progress):
    """Receives the progress of a sweep, and of the cell at work. This base class ignores both."""

    def begin(self, total: int, done: int) -> None: ...
    def cell(self, cell: Cell) -> None: ...
    def finished(self, record: Record) -> None: ...


class Engine(Protocol):
    def __call__(
        self, cells: Sequence[Cell], work: Work, out: Path, watcher: Watcher
    ) -> Iterator[Record]: ...


def sweep(
    cells: Sequence[Cell], work: Work, out: Path, engine: Engine, watcher: Watcher | None = None
) -> list[Record]:
    """Run the cells that are not done; returns the records of this run.

    It can be killed at any time: the same call goes on with what is not done.
    """
    watcher = watcher or Watcher()
    make_folder(out)
    records = []
    try:
        with locked(out / ".lock", timeout=0):
            remove_drafts(out)
            relabel(cells, out)
            todo = pending(cells, out)
            watcher.begin(len(cells), len(cells) - len(todo))
            for record in engine(todo, work, out, watcher):
                write_record(out, record)
                records.append(record)
                watcher.finished(record)
    except Timeout as error:
        raise LLQError(
            f"another `llq study` is at work in {out}; wait for it, or give another folder"
        ) from error
    finally:
        watcher.close()
    return records


# --- this machine ---------------------------------------------------------------------------------


def local(cells: Sequence[Cell], work: Work, out: Path, watcher: Watcher) -> Iterator[Record]:
    """One cell after another, in a child process."""
    child: Child | None = None
    try:
        for cell in cells:
            child = child or Child.start(work)
            watcher.cell(cell)
            log = log_of(out, cell)
            record = child.run(cell, log, watcher)
            if record is None:
                reason = f"its process died ({child.fate()}); what it printed last: {log}"
                record = Record.of(cell, FAILED, reason=reason)
                child = None
            yield replace(record, run={**record.run, "log": log.name})
    finally:
        if child is not None:
            child.stop()


def log_of(out: Path, cell: Cell) -> Path:
    return out / "logs" / f"{cell.name}.log"


@dataclass(frozen=True)
class Child:
    """A process that runs the cells it is sent; it sends back their progress, then their record."""

    process: Any
    pipe: Connection

    @classmethod
    def start(cls, work: Work) -> Child:
        # A fork would inherit locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), name="llq-study-cell")
        process.start()
        theirs.close()
        return cls(process, ours)

    def run(self, cell: Cell, log: Path, watcher: Watcher) -> Record | None:
        """The cell's record; None where the process died while it ran the cell."""
        try:
            self.pipe.send((cell, log))
            while True:
                name, arguments = self.pipe.recv()
                if name == "record":
                    return arguments[0]  # type: ignore[no-any-return]
                getattr(watcher, name)(*arguments)
        except (EOFError, OSError):
            return None

    def fate(self) -> str:
        self.process.join()
        code = self.process.exitcode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def stop(self) -> None:
        """End the process: at once if it is at work, else by closing its pipe."""
        self.pipe.close()
        self.process.join(timeout=1)
        self.process.terminate()
        self.process.join()


class PipeProgress(Progress):
    """Sends a cell's progress to the parent process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def stage(self, text: str, total: int = 0) -> None:
        self._pipe.send(("stage", (text, total)))

    def advance(self, count: int = 1) -> None:
        self._pipe.send(("advance", (count,)))

    def blocks(self, done: int, total: int) -> None:
        self._pipe.send(("blocks", (done, total)))


def _serve(pipe: Connection, work: Work) -> None:
    """Run cells in the child process until the parent closes the pipe, or dies."""
    # Ctrl-C reaches the parent too, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            cell, log = pipe.recv()
        except EOFError:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
        pipe.send(("record", (work(cell, PipeProgress(pipe)),)))


def _die_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot do it.

    Without this, a cell could go on for hours until its next message.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- a cluster ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RayCluster:
    """Runs cells as tasks of Ray, which finds a node for each and tries again where a node is lost.

    Records travel back to the caller, which writes them, so that nodes share nothing. A packed
    checkpoint stays in the cache of the node that made it; a cache on a shared disk (LLQ_CACHE)
    serves all nodes.
    """

    address: str | None = None  # None: $RAY_ADDRESS, or a cluster of this machine alone
    cpus: float = 1
    gpus: float = 0
    memory_gib: float = 0
    retries: int = 2

    def __call__(
        self, cells: Sequence[Cell], work: Work, out: Path, watcher: Watcher
    ) -> Iterator[Record]:
        try:
            import ray
        except ImportError as error:
            raise LLQError(
                "Ray is not installed; install the extra `ray`, or run without --engine ray"
            ) from error
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        task = ray.remote(_ray_cell).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            memory=int(self.memory_gib * 2**30) or None,
            max_retries=self.retries,
        )
        waiting = {task.remote(cell, work): cell for cell in cells}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            yield self._collect(ray, done, waiting.pop(done))

    def _collect(self, ray: Any, done: Any, cell: Cell) -> Record:
        try:
            record: Record = ray.get(done)
            return record
        except ray.exceptions.RayError as error:
            # The worker or its node died more often than `retries` allow.
            words = Text.from_ansi(str(error)).plain.split()
            return Record.of(cell, FAILED, reason=f"{type(error).__name__}: {' '.join(words)}")


def _ray_cell(cell: Cell, work: Work) -> Record:
    return work(cell, Progress())
