"""Progress bars of a sweep: cells done, time left, the cell at work and its stage."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID

from ..common.terminal import progress_bars
from .launch import Watcher
from .plan import Cell
from .record import DONE, Record


class RichWatcher(Watcher):
    """Bars on stderr, and a line for every finished cell."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = progress_bars(console)
        self._console = self._bars.console
        self._cells: TaskID | None = None
        self._stage: TaskID | None = None
        self._note = ""

    def begin(self, total: int, done: int) -> None:
        self._console.print(f"{total} cells, {done} of them done before", highlight=False)
        self._bars.start()
        self._cells = self._bars.add_task("cells", total=total, completed=done, note="")

    def cell(self, cell: Cell) -> None:
        if self._cells is not None:
            self._bars.update(self._cells, note=f"{cell.model}: {cell.title}")

    def stage(self, text: str, total: int = 0) -> None:
        if self._stage is not None:
            self._bars.remove_task(self._stage)
        self._stage = self._bars.add_task(text, total=total or None, note=self._note)

    def advance(self, count: int = 1) -> None:
        if self._stage is not None:
            self._bars.advance(self._stage, count)

    def blocks(self, done: int, total: int) -> None:
        self._note = f"block {done} of {total}" if done < total else ""

    def finished(self, record: Record) -> None:
        if self._cells is not None:
            self._bars.advance(self._cells)
        words = "" if record.status == DONE else f": {record.reason}"
        colour = "green" if record.status == DONE else "yellow"
        seconds = record.run.get("seconds")
        taken = f" {seconds:.0f} s" if seconds is not None else ""
        text = f"[{colour}]{record.status}[/]{taken} {record.cell['model']}: {record.title}"
        self._console.print(text, words.replace("[", r"\["), highlight=False, sep="")

    def close(self) -> None:
        self._bars.stop()
