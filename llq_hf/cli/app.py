"""The typer application that every command joins, and the console that all of them print to."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Low-bit LLaMA models for real: quantize, look into, evaluate. `llq COMMAND --help` tells more.",
)
console = Console()
