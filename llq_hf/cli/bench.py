"""`llq bench`: size and speed of packed checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..common.errors import LLQError
from .app import MEASURE, app, console
from .options import RUN, Device


@app.command(rich_help_panel=MEASURE)
def bench(
    paths: Annotated[list[str], typer.Argument(help="Folders or Hub ids of packed checkpoints.")],
    base: Annotated[
        str,
        typer.Option(help="The full-precision model to compare with: folder, Hub id, or `demo`."),
    ],
    batches: Annotated[str, typer.Option(help="Batch sizes, joined by commas.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Steps of decoding.")] = 16,
    rounds: Annotated[
        int, typer.Option(help="Rounds, in which all models take turns; medians are shown.")
    ] = 5,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every round.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Measure size and speed of packed checkpoints beside the full-precision model.

    Size is on disk and in memory; speed is that of prefill and decode. All models are measured in
    the same run, taking turns.

    Example:

    - `llq bench /tmp/demo-gptq /tmp/demo-quip --base demo`
    """
    import torch

    from ..common.machine import auto_device
    from ..common.terminal import RichProgress
    from ..demo import resolve
    from ..study.cost import Workload, measure

    device = auto_device(device)
    load = Workload(_sizes(batches), prompt_tokens, new_tokens, rounds)
    progress = RichProgress()
    try:
        found = measure(resolve(base), [resolve(path) for path in paths], load, device, progress)
    finally:
        progress.close()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console.print(_table(base, found))
    console.print(
        f"[dim]{device}, {torch.get_num_threads()} threads; medians of {rounds} rounds, models in"
        " turn",
        highlight=False,
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise LLQError(f"--batches {text} are no batch sizes; write them as 1,8") from None


def _table(base: str, found: dict[str, Any]) -> Table:
    """A row per figure and a column per model, which fits a terminal."""
    table = Table(
        "", *(Path(name).name for name in found), title=f"Beside {base}", title_justify="left"
    )
    each = list(found.values())
    table.add_row("on disk", *(_size(figures["disk_bytes"]) for figures in each))
    table.add_row("loaded", *(_size(figures["loaded_bytes"]) for figures in each))
    table.add_row("quantized in", *(_made(figures.get("quantize")) for figures in each))
    for batch in each[0]["speed"]:
        for phase in ("prefill", "decode"):
            table.add_row(
                f"{phase}, batch {batch}", *(_speed(figures, batch, phase) for figures in each)
            )
    return table


def _speed(figures: dict[str, Any], batch: str, phase: str) -> str:
    text = f"{figures['speed'][batch][f'{phase}_tokens_per_second']:.0f} tok/s"
    if "ratios" not in figures:
        return text
    return f"{text}, {figures['ratios']['speed'][batch][f'{phase}_seconds']:.2f} x the time"


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _made(cost: dict[str, Any] | None) -> str:
    return f"{cost['seconds']:.0f} s" if cost else ""
