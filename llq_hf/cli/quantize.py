"""`llq quantize`: a dense model into a packed checkpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checkpoints.records import Report
from ..data.calibration import CalibrationOptions
from ..methods import METHODS, method_type
from .app import QUANTIZE, app, console
from .info import print_served
from .options import RUN, Device, with_calibration_options, with_method_options


@app.command(rich_help_panel=QUANTIZE)
@with_method_options
@with_calibration_options
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="The full-precision model: a folder, a Hub id, a .gguf file, `demo`, `demo-vlm` "
            "or `smollm2`."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write. It must not exist, or hold the same run, killed."),
    ],
    method: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}. `llq methods` lists their options.")
    ],
    preset: Annotated[
        str,
        typer.Option(help="`study`: as in the paper; `best`: better, and no more bits are stored."),
    ] = "study",
    *,
    calibration: CalibrationOptions,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the calibration passes: auto (the model's), float32, bfloat16, float16.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    offload: Annotated[
        Path | None,
        typer.Option(
            help="Keep the calibration activations in files of this folder, not in memory.",
            rich_help_panel=RUN,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of the model on the Hub. Default: main.",
            rich_help_panel=RUN,
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="Partial sums of the statistics; they decide the last bits of the result. "
            "Default: the number of processes.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, run one block, write nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    options: dict[str, Any],
) -> None:
    """Quantize a model into a packed checkpoint, which from_pretrained loads.

    The model is read, quantized and written one block at a time: peak memory is one block, whatever
    the depth. After a kill, the same command continues where the run stopped.

    Examples:

    - `llq quantize demo /tmp/demo-quip --method quip --bits 2`
    - `llq quantize meta-llama/Meta-Llama-3-8B out --method gptq --bits 3 --calibration c4`
    - `torchrun --nproc_per_node 2 -m llq_hf quantize ...` shares one run between two processes.
    """
    import torch
    from transformers import AutoConfig

    from ..common.machine import auto_device, check_device, peak_bytes
    from ..common.progress import Progress
    from ..common.terminal import RichProgress
    from ..demo import resolve
    from ..engine.execute import quantize_checkpoint
    from ..engine.options import RunOptions
    from ..engine.prepare import prepare
    from ..engine.team import Team
    from ..models.load import auto_class

    built = method_type(method).build(preset, **options)
    data = calibration.for_model(model)
    device = auto_device(device, f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    check_device(device)
    team = Team.join(torch.device(device))
    run = RunOptions(
        device,
        None if dtype == "auto" else dtype,
        offload,
        revision,
        shards=shards or team.size,
        team=team,
    )
    progress = RichProgress() if team.leads else Progress()
    if dry_run:
        try:
            prepare(resolve(model), built, data, run, out, progress)
        finally:
            progress.close()
        return
    started = time.perf_counter()
    report = quantize_checkpoint(resolve(model), out, built, data, run, progress)
    if not team.leads:
        return
    seconds = time.perf_counter() - started
    table = _bits_table(f"{built.title} of {model}", report)
    table.add_row("time", f"{seconds:.1f} s")
    table.add_row("peak memory", f"{peak_bytes() / 2**30:.2f} GiB")
    _warn_of_fallbacks(report)
    console.print(table)
    print_served(report["linears"])
    kind = auto_class(AutoConfig.from_pretrained(out)).__name__
    print(f"Load it: {kind}.from_pretrained({str(out)!r})")  # not rich: it would break the line


def _bits_table(title: str, report: Report) -> Table:
    bits = report["bits"]
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("nominal bits", f"{bits['nominal']:g}")
    table.add_row("stored bits per quantized weight", f"{bits['stored']:.3f}")
    table.add_row("bits per weight of the whole model", f"{bits['whole_model']:.3f}")
    table.add_row("size on disk", f"{bits['bytes'] / 2**20:.1f} MiB")
    table.add_row("quantized linears", str(len(report["linears"])))
    return table


def _warn_of_fallbacks(report: Report) -> None:
    fallen = [record["name"] for record in report["linears"] if "fallback" in record]
    if fallen:
        console.print(
            f"[yellow]{len(fallen)} linears fell back to rounding to nearest, the first:"
            f" {fallen[0]}"
        )
