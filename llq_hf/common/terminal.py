"""Progress bars on the terminal: stage, blocks done, the linear at work, time left, peak memory."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .machine import peak_bytes
from .progress import Progress as Listener


def progress_bars(console: Console | None) -> Progress:
    """Bars on `console` (default: stderr) whose tasks have a field `note`."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console or Console(stderr=True),
    )


class RichProgress(Listener):
    """Draws two bars on stderr: blocks of the model, and sequences of the current pass."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = progress_bars(console)
        self._blocks: TaskID | None = None
        self._stage: TaskID | None = None

    def stage(self, text: str, total: int = 0) -> None:
        """Begin a stage of `total` units (0: unknown); its bar replaces the last stage's."""
        self._bars.start()
        if self._stage is not None:
            self._bars.remove_task(self._stage)
        self._stage = self._bars.add_task(text, total=total or None, note="")

    def advance(self, count: int = 1) -> None:
        if self._stage is not None:
            self._bars.advance(self._stage, count)

    def estimates(self, found: dict[str, float]) -> None:
        size = found["output_bytes"] / 2**30
        peak = found["peak_bytes"] / 2**30
        minutes = found["forward_seconds"] / 60
        passes = f", forward passes {minutes:.1f} min" if minutes else ""
        self._bars.console.print(
            f"[dim]checks passed; expected: {size:.2f} GiB on disk, {peak:.1f} GiB peak{passes}"
        )

    def blocks(self, done: int, total: int) -> None:
        self._bars.start()
        if self._blocks is None:
            self._blocks = self._bars.add_task("blocks", total=total, note="")
        self._bars.update(self._blocks, completed=done, note=f"peak {peak_bytes() / 2**30:.2f} GiB")

    def linear(self, name: str) -> None:
        if self._stage is not None:
            self._bars.update(self._stage, note=name)

    def close(self) -> None:
        self._bars.stop()
