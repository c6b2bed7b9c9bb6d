"""`llq card`, `llq push`: a packed checkpoint's model card, and its upload to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import PUBLISH, app, console

Folder = Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        help="Results file of lm-eval or lmms-eval, or a folder of them. Default: PATH/results.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="Hub id of the base model. Needed where the run read it from a folder."
    ),
]


@app.command(rich_help_panel=PUBLISH)
def card(
    path: Folder,
    results: Results = None,
    base_model: Base = None,
    repo: Annotated[
        str | None, typer.Option(help="USER/NAME that the checkpoint will have.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: print it.")] = None,
) -> None:
    """Write the model card of a packed checkpoint, from its files.

    The card gives bits, options, calibration, results, and the licence of the base model. Write it
    to PATH/README.md to edit it: `llq push` then takes that.

    Example:

    - `llq card /tmp/demo-quip --repo me/demo-quip-2bit --out /tmp/demo-quip/README.md`
    """
    from ..common.files import write_text
    from ..publish.card import make_card

    text = str(make_card(path, repo=repo, base=base_model, results=results))
    if out is None:
        print(text)
    else:
        write_text(out, text)


@app.command(rich_help_panel=PUBLISH)
def push(
    path: Folder,
    repo: Annotated[
        str, typer.Argument(help="USER/NAME on the Hub. It is made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    results: Results = None,
    base_model: Base = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")
    ] = False,
) -> None:
    """Upload a packed checkpoint with its card, report, journal and results, in one commit.

    The token is that of `hf auth login` or of HF_TOKEN.

    Example:

    - `llq push /tmp/demo-quip me/demo-quip-2bit --dry-run`
    """
    from ..publish.hub import prepare_upload
    from ..publish.hub import push as upload

    prepared = prepare_upload(path, repo, base=base_model, results=results)
    table = Table(
        "file", "bytes", title=f"{repo}{' (private)' if private else ''}", title_justify="left"
    )
    for name, size in prepared.sizes.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    if dry_run:
        console.print("Nothing was uploaded: --dry-run.")
        return
    print(upload(prepared, private=private))
