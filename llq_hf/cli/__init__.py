"""The command line: one file per command, or per two that belong together.

An LLQError is printed on stderr as one sentence, without a traceback, and the exit status is 1.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.markup import escape

from ..common.errors import LLQError

# PyTorch's threads otherwise spin after each operation, on the cores that our kernels' threads and
# other programs want: a step takes ten times as long on a busy machine. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from . import (
    bench,
    build_kernels,
    convert,
    diagnose,
    evaluate,
    export,
    finetune,
    info,
    publish,
    quantize,
    show,
    study,
)
from .app import app

__all__ = [
    "app",
    "bench",
    "build_kernels",
    "convert",
    "diagnose",
    "evaluate",
    "export",
    "finetune",
    "info",
    "main",
    "publish",
    "quantize",
    "show",
    "study",
]


def main() -> None:
    """Entry point of `llq`."""
    try:
        app(standalone_mode=True)
    except LLQError as error:
        Console(stderr=True).print(
            f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, which typer turns into this exit
            Console(stderr=True).print(
                "Interrupted; the same command continues where this one stopped."
            )
        raise
