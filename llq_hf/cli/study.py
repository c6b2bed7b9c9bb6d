"""llq study, llq report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import LLQError
from .app import app, console

if TYPE_CHECKING:
    from ..study.launch import Engine
    from ..study.plan import Cell


@app.command()
def study(
    out: Annotated[
        Path, typer.Option(help="Folder of records; the same command goes on where it was killed.")
    ],
    plan: Annotated[
        Path | None, typer.Argument(help="Plan file (YAML); or give --preset, or flags alone.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Tables of the study, paper-table1 to paper-table12: a,b,...; paper: all."
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Folders or Hub ids, or `demo`: a,b,...")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="gptq,quip,... or all.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="Widths, 4,3,2; all: every width of the method.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Another option of the methods, with its values: group_size=64,128"),
    ] = None,
    presets: Annotated[str | None, typer.Option(help="Of the methods: study,best.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-eval or lmms-eval: llq_wikitext2,llq_csqa,...")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the calibration draws: 0,1,2")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many documents a task, to try a plan out.")
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(help="JSON for the tasks, as lm-eval's --metadata.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Of the evaluation; auto where the harness can.")
    ] = "1",
    parallelize: Annotated[
        bool, typer.Option("--parallelize", help="Spread a model over all GPUs.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where packed checkpoints are kept.")
    ] = None,
    speed: Annotated[
        bool, typer.Option(help="Also measure speed beside the full-precision model.")
    ] = True,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the cells are tasks of a Ray cluster.")
    ] = "local",
    resources: Annotated[
        str,
        typer.Option(
            help="Of a cell on Ray: cpus=4,gpus=1,memory_gib=40,retries=2,address=ray://..."
        ),
    ] = "",
    only: Annotated[
        str, typer.Option(help="Only the cells whose title (see --dry-run) contains this.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, run none.")] = False,
) -> None:
    """Run every cell of a plan: quantize, evaluate, measure; one record file each. Safe to kill at
    any time.

    A cell that fails or is refused is recorded with its reason and does not stop the rest.

    Example: **llq study --models demo --methods gptq,quip --bits 3,2 --tasks llq_demo --out runs**
    """
    from ..common.machine import chosen_device
    from ..study.cell import Setup, run_cell
    from ..study.cost import Workload
    from ..study.launch import sweep
    from ..study.paper import remember
    from ..study.plan import expand
    from ..study.watch import RichWatcher

    flags = {"models": models, "presets": presets, "tasks": tasks, "seeds": seeds}
    over = {key: _values(text) for key, text in flags.items() if text is not None} | _methods(
        methods, bits, option
    )
    over |= {
        key: value
        for key, value in (("limit", limit), ("metadata", _json(metadata)))
        if value is not None
    }
    cells = expand([{**each, **over} for each in _plans(plan, preset)])
    cells = [cell for cell in cells if only in cell.title]
    if not cells:
        raise LLQError(f"no cell has a title that contains {only!r}; list them with --dry-run")
    if dry_run:
        for cell in cells:
            print(cell.name, cell.title)
        return
    setup = Setup(
        chosen_device(device),
        _values(batch_size)[0],
        parallelize,
        cache_dir,
        load=Workload() if speed else None,
    )
    chosen = _engine(engine, resources)
    remember(out, _presets(preset))
    sweep(cells, partial(run_cell, setup=setup), out, chosen, RichWatcher())
    _conclude(out, cells)


def _conclude(out: Path, cells: list[Cell]) -> None:
    from ..study.record import file_of, read_record

    counts = Counter(read_record(file_of(out, cell.name)).status for cell in cells)
    console.print(
        ", ".join(f"{count} {status}" for status, count in counts.items()), highlight=False
    )
    print(f"Look at it: llq report {out}")


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of records, of `llq study`.")],
    formats: Annotated[
        str, typer.Option("--format", help="html, md, csv, latex, svg: a,b,...")
    ] = "html,md,csv,latex",
    into: Annotated[Path | None, typer.Option(help="Folder to write; default: OUT itself.")] = None,
    name: Annotated[str, typer.Option(help="Of the files, without suffix.")] = "report",
) -> None:
    """Tables and plots of a study: ours beside the published figures, each with the record file it
    stands in.

    Example: **llq report runs --format html,md**
    """
    from ..study.report import write_report

    for path in write_report(out, into or out, formats.split(","), name):
        print(path)


def _plans(path: Path | None, preset: str | None) -> list[dict[str, Any]]:
    """The plan of a file, those of presets, or an empty one for the flags to fill."""
    from ..study.paper import plan_of
    from ..study.plan import load_plan

    if path is not None and preset is not None:
        raise LLQError("give a plan file or --preset, not both")
    if preset is not None:
        return [plan_of(name) for name in _presets(preset)]
    return [{} if path is None else load_plan(path)]


def _presets(text: str | None) -> list[str]:
    from ..study.paper import tables

    if text == "paper":
        return [table.preset for table in tables().values()]
    return [] if text is None else text.split(",")


def _values(text: str) -> list[Any]:
    """What a YAML list of these words would hold: "3,2" is two numbers."""
    import yaml

    return [yaml.safe_load(word) for word in text.split(",") if word.strip()]


def _methods(methods: str | None, bits: str | None, options: list[str] | None) -> dict[str, Any]:
    """The `methods` of a plan, from flags."""
    varied: dict[str, Any] = {
        key: _values(values)
        for key, _, values in (option.partition("=") for option in options or [])
    }
    if bits is not None:
        varied = {"bits": bits if bits == "all" else _values(bits), **varied}
    if methods is None and varied:
        raise LLQError(
            "--bits and --option belong to --methods; a plan file or preset says them itself"
        )
    return (
        {}
        if methods is None
        else {"methods": [{"method": name, **varied} for name in methods.split(",")]}
    )


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise LLQError(
            f'--metadata is not valid JSON ({error}); write \'{{"text_file": "wiki.txt"}}\''
        ) from error


def _engine(name: str, resources: str) -> Engine:
    from ..study.launch import RayCluster, local

    given = {
        key: value
        for key, _, value in (pair.partition("=") for pair in resources.split(",") if pair)
    }
    if name == "local" and not given:
        return local
    if name != "ray":
        raise LLQError(
            f"--engine {name} with --resources {resources!r}: engines are local, and ray with "
            "resources"
        )
    known = [each.name for each in fields(RayCluster)]
    if unknown := set(given) - set(known):
        raise LLQError(f"--resources has no {unknown.pop()!r}; it has: {', '.join(known)}")
    return RayCluster(**{key: _values(value)[0] for key, value in given.items()})
