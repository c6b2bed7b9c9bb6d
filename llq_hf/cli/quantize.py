"""`llq quantize`: a dense model into a packed checkpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..checkpoints.records import Report
from ..data.calibration import CalibrationOptions
from ..methods import METHODS, method_type
from .app import QUANTIZE, app, console
from .info import print_served
from .options import RUN, Device, with_calibration_options, with_method_options

if TYPE_CHECKING:
    from ..engine.choose import Budget, Choice


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
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}. `llq methods` lists their options. Left out: the best one "
            "that was measured for --bits, --size or --memory."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="`study`: as in the paper; `best`: better, and no more bits are stored."),
    ] = "study",
    size: Annotated[
        str | None,
        typer.Option(help="Without --method: bytes of the checkpoint at most, as 24GB or 5.5GiB."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Without --method: memory that the loaded model may take, with a cache of 8192 "
            "tokens."
        ),
    ] = None,
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
    speak: Annotated[
        bool,
        typer.Option(
            help="Let the finished model answer three prompts, for the report. Left out by itself "
            "where the model does not fit into memory.",
            rich_help_panel=RUN,
        ),
    ] = True,
    options: dict[str, Any],
) -> None:
    """Quantize a model into a packed checkpoint, which from_pretrained loads.

    The model is read, quantized and written one block at a time: peak memory is one block, whatever
    the depth. After a kill, the same command continues where the run stopped.

    Examples:

    - `llq quantize demo /tmp/demo-quip --method quip --bits 2`
    - `llq quantize meta-llama/Meta-Llama-3-8B out --method gptq --bits 3 --calibration c4`
    - `llq quantize meta-llama/Meta-Llama-3-8B out --bits 3.2 --preset best` chooses the method.
    - `torchrun --nproc_per_node 2 -m llq_hf quantize ...` shares one run between two processes.
    """
    import torch
    from transformers import AutoConfig

    from ..common.machine import auto_device, check_device, peak_bytes
    from ..common.progress import Progress
    from ..common.terminal import RichProgress
    from ..demo import resolve
    from ..engine.choose import Choice
    from ..engine.execute import quantize_checkpoint
    from ..engine.options import RunOptions
    from ..engine.prepare import prepare
    from ..engine.team import Team
    from ..hosts.first_words import first_words
    from ..models.load import auto_class

    choice: Choice | None = None
    if method is None:
        choice = Choice.of(resolve(model), _budget(options, size, memory), preset, revision)
        built = choice.best.method
    else:
        if size is not None or memory is not None:
            raise typer.BadParameter(
                f"--size and --memory choose a method; leave out --method {method}"
            )
        built = method_type(method).build(preset, **options)
    data = calibration.for_model(model)
    cost: dict[str, float] = {}  # of quantizing: its end, and its peak memory

    def measure() -> None:
        cost.setdefault("end", time.perf_counter())
        cost.setdefault("peak", peak_bytes())

    def speak_up(folder: Path, config: dict[str, Any], nbytes: int) -> dict[str, Any]:
        measure()  # what follows loads the packed model
        progress.stage("first words")
        return first_words(folder, config, nbytes, device)

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
        speak=speak_up if speak else None,
    )
    progress = RichProgress() if team.leads else Progress()
    if choice is not None and team.leads:
        console.print(_choice_table(choice))
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
    measure()
    table = _bits_table(f"{built.title} of {model}", report)
    table.add_row("time", f"{cost['end'] - started:.1f} s")
    table.add_row("peak memory", f"{cost['peak'] / 2**30:.2f} GiB")
    _warn_of_fallbacks(report)
    console.print(table)
    _show_first_words(report.get("first_words", {}))
    print_served(report["linears"])
    kind = auto_class(AutoConfig.from_pretrained(out)).__name__
    print(f"Load it: {kind}.from_pretrained({str(out)!r})")  # not rich: it would break the line


def _budget(options: dict[str, Any], size: str | None, memory: str | None) -> Budget:
    """The budget that a method is chosen by."""
    from ..engine.choose import Budget, bytes_of

    if others := sorted(set(options) - {"bits"}):
        raise typer.BadParameter(
            f"--{others[0].replace('_', '-')} is an option of a method; give --method, or only "
            "--bits, --size or --memory, which choose one"
        )
    if not options and size is None and memory is None:
        raise typer.BadParameter(
            "give --method, or a budget that chooses one: --bits, --size or --memory"
        )
    return Budget(
        bits=options.get("bits"),
        size=None if size is None else bytes_of(size),
        memory=None if memory is None else bytes_of(memory),
    )


SHOWN = 5  # lines of the table of a choice


def _choice_table(choice: Choice) -> Table:
    """The best few within the budget; the first is taken."""
    table = Table(
        title=f"Measured within {choice.budget}: the first is taken",
        caption="KL: nats per token from full precision, of SmolLM2-135M-Instruct on each text.",
        title_justify="left",
    )
    texts = list(choice.best.measured.kl)
    for name in ("method", "stored bits", "GB", *(f"KL {text}" for text in texts)):
        table.add_column(name, justify="left" if name == "method" else "right")
    for each in choice.ranked[:SHOWN]:
        figures = [f"{each.measured.kl[text]:.3f}" for text in texts]
        table.add_row(each.measured.words, f"{each.bits:.3f}", f"{each.bytes / 1e9:.3g}", *figures)
    return table


def _bits_table(title: str, report: Report) -> Table:
    bits = report["bits"]
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("nominal bits", f"{bits['nominal']:g}")
    table.add_row("stored bits per quantized weight", f"{bits['stored']:.3f}")
    table.add_row("bits per weight of the whole model", f"{bits['whole_model']:.3f}")
    table.add_row("size on disk", f"{bits['bytes'] / 2**20:.1f} MiB")
    table.add_row("quantized linears", str(len(report["linears"])))
    return table


def _show_first_words(found: dict[str, Any]) -> None:
    """What the model answers; louder where that is no language."""
    if "skipped" in found:
        console.print(f"First words: none were asked for, as {found['skipped']}.")
    for prompt, answer in found.get("answers", []):
        console.print(f"[dim]{escape(prompt)}[/]{escape(answer)}")
    if "problem" in found:
        console.print(
            f"[yellow]The model answers {escape(found['problem'])}: give it more bits, another "
            "method, or --preset best; llq diagnose names its sensitive linears"
        )


def _warn_of_fallbacks(report: Report) -> None:
    fallen = [record["name"] for record in report["linears"] if "fallback" in record]
    if fallen:
        console.print(
            f"[yellow]{len(fallen)} linears fell back to rounding to nearest, the first:"
            f" {fallen[0]}"
        )
