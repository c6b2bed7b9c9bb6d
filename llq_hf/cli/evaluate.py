"""llq eval."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from .app import app


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def eval(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(help="Folder or Hub id of a packed checkpoint (or of a dense one: method=none).")
    ],
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, ours among them: llq_demo, llq_wikitext2, llq_csqa, ...")
    ],
    model_args: Annotated[str, typer.Option(help="More model_args, as key=value,key=value.")] = "",
) -> None:
    """Score a checkpoint with lm-evaluation-harness; all further options go to `lm_eval` as they are.

    Example: **llq eval /tmp/demo-quip --tasks llq_demo --batch_size 8 --output_path /tmp/results**
    """
    args = ",".join(filter(None, [f"pretrained={path}", model_args]))
    command = [sys.executable, "-m", "lm_eval", "--model", "llq", "--model_args", args, "--tasks", tasks, *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
