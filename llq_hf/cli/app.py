"""The typer application that every command joins, and the console that all of them print to."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# Panels of `llq --help`, and the order of the commands, in which a newcomer needs them.
QUANTIZE = "Quantize"
MEASURE = "Measure"
PUBLISH = "Publish"
OTHER = "Other"
ORDER = (
    *("quantize", "convert", "info", "verify", "methods"),
    *("eval", "bench", "diagnose", "show", "study", "report"),
    *("export", "card", "push"),
    *("finetune", "build-kernels"),
)


class _InOrder(TyperGroup):
    """Lists the commands in the order of ORDER."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Quantize LLaMA and LLaVA models to 1-8 bits, look into the result, score and publish it.

Start with the bundled demo model, which needs no network:

- `llq quantize demo /tmp/demo-quip --method quip --bits 2`
- `llq info /tmp/demo-quip`
- `llq eval /tmp/demo-quip --tasks llq_demo`

`llq COMMAND --help` explains a command and its options.
""",
)
console = Console()
