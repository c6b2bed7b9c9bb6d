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
        str,
        typer.Argument(
            help="Folder or Hub id of a packed checkpoint (or of a dense one: method=none)."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-eval or of lmms-eval, ours among them: llq_demo, llq_wikitext2, llq_mllm, ..."
        ),
    ],
    model_args: Annotated[str, typer.Option(help="More model_args, as key=value,key=value.")] = "",
) -> None:
    """Score a checkpoint with the harness that has the tasks, lm-eval or lmms-eval; all further
    options go to it.

    A task about text that both have is lm-eval's. The exit status is not 0 where the evaluation
    failed.

    Example: **llq eval /tmp/demo-quip --tasks llq_demo --batch_size 8 --output_path /tmp/results**
    """
    from ..hosts.harnesses import harness_of

    harness = harness_of(tasks)
    # lmms-eval's own module exits with 0 after an error, unless it is imported, as ours does
    start = ["-m", "lm_eval"] if harness == "lm_eval" else ["-m", "llq_hf", "lmms_eval"]
    args = ",".join(filter(None, [f"pretrained={path}", model_args]))
    options = ["--model", "llq", "--model_args", args, "--tasks", tasks, *context.args]
    raise typer.Exit(subprocess.run([sys.executable, *start, *options], check=False).returncode)
