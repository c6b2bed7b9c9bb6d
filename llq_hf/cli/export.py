"""`llq export`: packed checkpoints in formats of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..common.errors import LLQError
from .app import PUBLISH, app, console

if TYPE_CHECKING:
    from ..export import Engine, Format

DTYPES = ("float32", "bfloat16", "float16")


@app.command(rich_help_panel=PUBLISH)
def export(
    path: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors (default), gptq, awq, gguf (one file with the tokenizer, for "
            "llama.cpp), dense, or gguf-f16 (for llama.cpp's converter).",
        ),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="In place of --format: the engine that shall load it. vllm, sglang, llama.cpp, "
            "transformers or gptqmodel; its best format is chosen, and what it would not read is "
            "refused.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of scales and of all that is not quantized. Default: float16; for `dense` the "
            "base model's."
        ),
    ] = None,
) -> None:
    """Write a packed checkpoint in the format of vLLM, SGLang, GPTQModel or llama.cpp.

    Codes are carried over as they are. What the format cannot hold is refused, with the reason.

    Examples:

    - `llq export /tmp/demo-gptq /tmp/demo-vllm --for vllm`
    - `llq export /tmp/demo-gptq /tmp/demo-gptqmodel --format gptq`
    - `llq export /tmp/smollm2-rtn /tmp/smollm2-gguf --for llama.cpp`
    """
    import torch

    from ..common.terminal import RichProgress
    from ..export import engine_named, readers
    from ..export import export as write

    if to is not None and reader is not None:
        raise LLQError(f"--for {reader} chooses the format; leave out --format {to}")
    if dtype not in (None, *DTYPES):
        raise LLQError(f"--dtype {dtype} is unknown; give one of {', '.join(DTYPES)}")
    engine = engine_named(reader) if reader is not None else None
    kind = _chosen(path, to, engine)
    found = write(path, out, kind, getattr(torch, dtype) if dtype else None, RichProgress(), engine)
    takes, refuses = readers(kind.name, found["grid"])
    table = Table(title=f"{path} as {kind.name}", show_header=False, title_justify="left")
    table.add_row("stored bits per quantized weight, packed", f"{found['stored_bits']:.3f}")
    table.add_row("stored bits per quantized weight, exported", f"{found['exported_bits']:.3f}")
    table.add_row("size on disk", f"{found['bytes'] / 2**20:.1f} MiB")
    table.add_row("read by", "; ".join(takes))
    console.print(table)
    for phrase in refuses:
        console.print(f"[yellow]{phrase}", soft_wrap=True)
    if kind.file is not None:
        print(f"File: {out / kind.file}")  # not rich: it would break the line


def _chosen(path: Path, to: str | None, engine: Engine | None) -> type[Format]:
    """The format that was asked for; where an engine was, its best, and that is printed."""
    from ..common.words import nearest
    from ..export import DEFAULT, FORMATS, format_for

    if engine is not None:
        kind = format_for(engine, FORMATS, path)
        why = f"the best of what {engine} reads that can hold these codes"
        console.print(f"format: {kind.name}, {why}", soft_wrap=True)
        return kind
    if to is None:
        return DEFAULT
    if to not in FORMATS:
        raise LLQError(
            f"--format {to} is unknown{nearest(to, FORMATS)}; give one of {', '.join(FORMATS)}"
        )
    return FORMATS[to]
