"""llq export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..common.errors import LLQError
from .app import app, console

DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq, awq, dense, gguf-f16 (for llama.cpp's converter).",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of scales and all that is not quantized; default float16, of dense the base's."
        ),
    ] = None,
) -> None:
    """Write a packed checkpoint in a format that vLLM, SGLang, GPTQModel, AutoAWQ or llama.cpp's
    converter reads.

    Codes are carried over as they are. What the format cannot hold is refused, with the reason.

    Example: **llq export /tmp/demo-gptq /tmp/demo-vllm --format compressed-tensors**
    """
    import torch

    from ..common.terminal import RichProgress
    from ..common.words import nearest
    from ..export import FORMATS
    from ..export import export as write

    if to not in FORMATS:
        raise LLQError(
            f"format={to!r} is unknown{nearest(to, FORMATS)}; there are {', '.join(FORMATS)}"
        )
    if dtype not in (None, *DTYPES):
        raise LLQError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    kind = FORMATS[to]
    found = write(path, out, kind, getattr(torch, dtype) if dtype else None, RichProgress())
    table = Table(title=f"{path} as {to}", show_header=False, title_justify="left")
    table.add_row("stored bits per quantized weight, packed", f"{found['stored_bits']:.3f}")
    table.add_row("stored bits per quantized weight, exported", f"{found['exported_bits']:.3f}")
    table.add_row("size on disk", f"{found['bytes'] / 2**20:.1f} MiB")
    table.add_row("read by", kind.reader)
    console.print(table)
