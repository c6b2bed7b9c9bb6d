"""`llq export`: packed checkpoints in formats of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..common.errors import LLQError
from .app import PUBLISH, app, console

DTYPES = ("float32", "bfloat16", "float16")


@app.command(rich_help_panel=PUBLISH)
def export(
    path: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq, awq, dense, or gguf-f16 (for llama.cpp's converter).",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of scales and of all that is not quantized. Default: float16; for `dense` the "
            "base model's."
        ),
    ] = None,
) -> None:
    """Write a packed checkpoint in the format of vLLM, GPTQModel, AutoAWQ or llama.cpp's converter.

    Codes are carried over as they are. What the format cannot hold is refused, with the reason.

    Example:

    - `llq export /tmp/demo-gptq /tmp/demo-vllm --format compressed-tensors`
    """
    import torch

    from ..common.terminal import RichProgress
    from ..common.words import nearest
    from ..export import FORMATS
    from ..export import export as write

    if to not in FORMATS:
        raise LLQError(
            f"--format {to} is unknown{nearest(to, FORMATS)}; give one of {', '.join(FORMATS)}"
        )
    if dtype not in (None, *DTYPES):
        raise LLQError(f"--dtype {dtype} is unknown; give one of {', '.join(DTYPES)}")
    kind = FORMATS[to]
    found = write(path, out, kind, getattr(torch, dtype) if dtype else None, RichProgress())
    table = Table(title=f"{path} as {to}", show_header=False, title_justify="left")
    table.add_row("stored bits per quantized weight, packed", f"{found['stored_bits']:.3f}")
    table.add_row("stored bits per quantized weight, exported", f"{found['exported_bits']:.3f}")
    table.add_row("size on disk", f"{found['bytes'] / 2**20:.1f} MiB")
    table.add_row("read by", kind.reader)
    console.print(table)
