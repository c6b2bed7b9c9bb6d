"""`llq convert`: a checkpoint that another library quantized becomes one of llq."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import QUANTIZE, app, console


@app.command(rich_help_panel=QUANTIZE)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a checkpoint that GPTQModel, AutoGPTQ, AutoAWQ or "
            "llm-compressor quantized: formats gptq, awq (gemm), compressed-tensors "
            "(pack-quantized)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub. Default: main.")
    ] = None,
) -> None:
    """Take in a checkpoint that another library quantized: same codes, same weights.

    Nothing is rounded again. The result loads with from_pretrained, is scored by `llq eval`, runs
    on llq's kernels and goes out again by `llq export`. What has no equal (other layouts, quantized
    activations, some linears left dense) is refused, with the reason.

    Examples:

    - `llq convert user/Llama-3-8B-GPTQ /tmp/llama-gptq`
    - `llq eval /tmp/llama-gptq --tasks llq_wikitext2`
    """
    from ..common.terminal import RichProgress
    from ..export import take_in

    report = take_in(source, out, revision, RichProgress())
    bits, identity = report["bits"], report["identity"]
    table = Table(title=f"{source}, taken in", show_header=False, title_justify="left")
    table.add_row("stored as", f"the grid of {identity['method']}")
    table.add_row("nominal bits", f"{bits['nominal']:g}")
    table.add_row("stored bits per quantized weight", f"{bits['stored']:.3f}")
    table.add_row("size on disk", f"{bits['bytes'] / 2**20:.1f} MiB")
    table.add_row("quantized linears", str(len(report["linears"])))
    console.print(table)
