"""`llq eval`: score a checkpoint with the harness that has the tasks."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from .app import MEASURE, app


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MEASURE,
)
def eval(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a packed checkpoint, or of a dense one with "
            "--model-args method=none."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-eval or of lmms-eval, joined by commas; of ours llq_demo, "
            "llq_wikitext2, llq_mllm, ..."
        ),
    ],
    model_args: Annotated[
        str, typer.Option(help="Further model_args of the harness: key=value,key=value.")
    ] = "",
) -> None:
    """Score a checkpoint with lm-eval or lmms-eval, whichever has the tasks.

    All further options go to the harness. A task about text that both have is lm-eval's. The exit
    status is not 0 where the evaluation failed.

    Examples:

    - `llq eval /tmp/demo-quip --tasks llq_demo --batch_size 8 --output_path /tmp/results`
    - `llq eval demo --model-args method=none --tasks llq_demo` scores the full-precision model.
    """
    from ..hosts.harnesses import harness_of

    harness = harness_of(tasks)
    # `python -m lmms_eval` exits with 0 after an error; through our __main__ it does not.
    start = ["-m", "lm_eval"] if harness == "lm_eval" else ["-m", "llq_hf", "lmms_eval"]
    args = ",".join(filter(None, [f"pretrained={path}", model_args]))
    options = ["--model", "llq", "--model_args", args, "--tasks", tasks, *context.args]
    raise typer.Exit(subprocess.run([sys.executable, *start, *options], check=False).returncode)
