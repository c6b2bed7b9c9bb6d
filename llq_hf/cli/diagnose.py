"""`llq diagnose`: which parts of a model lose most when they are rounded, and what tells it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..common.errors import LLQError
from ..data.calibration import CalibrationOptions
from .app import MEASURE, app, console
from .options import Device, with_calibration_options

if TYPE_CHECKING:
    from ..common.progress import Progress
    from ..study.diagnose import Diagnosis, Rounding

SAMPLES, SEQLEN = 4, 256  # of the text, where the user leaves it open


@app.command(rich_help_panel=MEASURE)
@with_calibration_options
def diagnose(
    models: Annotated[
        list[str],
        typer.Argument(help="Full-precision models: folders, Hub ids, GGUF files, demo, smollm2."),
    ],
    calibration: CalibrationOptions,
    out: Annotated[Path, typer.Option(help="The page to write, a file that ends in .html.")],
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Width to round to. Give it again for more. Default: 4, 3 and 2."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    device: Device = "auto",
) -> None:
    """Find out why one model is harder to quantize than another.

    Rounds each linear and each block to nearest, alone, and measures the KL divergence of the
    model's predictions from full precision. Beside the losses stand figures that could have told
    them: outliers and kurtosis of weights and inputs, massive activations, the effective rank of
    inputs, each with its rank correlation. Writes one page with plots and tables, and the same
    figures as JSON beside it. Several models stand side by side.

    The text is chosen by the options of the calibration; by default 4 sequences of 256 tokens.

    Examples:

    - `llq diagnose demo --out /tmp/demo.html`
    - `llq diagnose smollm2 meta-llama/Llama-3.2-1B --out two.html --device cuda`
    """
    from ..common.files import write_json, write_text
    from ..common.terminal import RichProgress
    from ..study.diagnose import Rounding
    from ..study.diagnose_page import diagnosis_page

    if out.suffix != ".html":
        raise LLQError(f"{out} is no name of a page; give a file that ends in .html")
    rounding = Rounding(tuple(bits or (4, 3, 2)), group_size)
    text = CalibrationOptions(**{"samples": SAMPLES, "seqlen": SEQLEN, **calibration.given})
    progress = RichProgress()
    try:
        found = [_of(model, text, rounding, device, progress) for model in models]
    finally:
        progress.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, diagnosis_page(found))
    write_json(out.with_suffix(".json"), {"models": [each.to_dict() for each in found]})
    for each in found:
        console.print(_summary(each))
    console.print(f"{escape(str(out))} shows the whole, {escape(out.stem)}.json holds the figures")


def _of(
    model: str, text: CalibrationOptions, rounding: Rounding, device: str, progress: Progress
) -> Diagnosis:
    """The diagnosis of one model, which is in memory meanwhile."""
    from ..common.machine import auto_device, check_device
    from ..engine.prepare import open_dense, token_windows
    from ..models.load import build_skeleton, load_dense
    from ..study.diagnose import diagnose as measured

    device = auto_device(device)
    check_device(device)
    path = open_dense(model, None, progress).path
    skeleton = build_skeleton(path)
    options = text.for_model(model)
    if options.has_images:
        raise LLQError(f"{options.source} holds images; give a text")
    ids_NS = token_windows(options, skeleton.config, path, progress)
    progress.stage(f"loading {model}")
    dense = load_dense(path, skeleton.config, skeleton.dtype, device)
    return measured(Path(model).name, dense, ids_NS, rounding, progress)


def _summary(diagnosis: Diagnosis) -> Table:
    """The most sensitive linears."""
    from ..study.diagnose_page import middle

    width = middle(diagnosis)
    table = Table(title=f"{diagnosis.model}: KL when one linear alone is rounded, nats per token")
    table.add_column("linear")
    for bits in diagnosis.rounding.bits:
        table.add_column(f"{bits} bits", justify="right")
    for part in sorted(diagnosis.of_kind(block=False), key=lambda part: -part.kl[width])[:5]:
        table.add_row(part.name, *(f"{part.kl[bits]:.5f}" for bits in diagnosis.rounding.bits))
    return table
