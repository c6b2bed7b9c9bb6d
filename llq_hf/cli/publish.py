"""llq push, llq card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import app, console

Folder = Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        help="Results file of lm-eval or lmms-eval, or a folder of them; default PATH/results.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="Hub id of the base model, where the run started from a folder."
    ),
]


@app.command()
def card(
    path: Folder,
    results: Results = None,
    base_model: Base = None,
    repo: Annotated[
        str | None, typer.Option(help="USER/NAME that the checkpoint will have.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: print.")] = None,
) -> None:
    """The model card of a packed checkpoint: bits, options, calibration, results, licence, all from
    its files.

    Written to PATH/README.md and edited, it is what `llq push` takes.
    """
    from ..publish.card import make_card

    text = str(make_card(path, repo=repo, base=base_model, results=results))
    if out is None:
        print(text)
    else:
        out.write_text(text)


@app.command()
def push(
    path: Folder,
    repo: Annotated[
        str, typer.Argument(help="USER/NAME on the Hub; made where it does not exist.")
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

    Example: **llq push /tmp/demo-quip me/demo-quip-2bit --dry-run**
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
