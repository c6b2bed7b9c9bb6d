"""`llq study`, `llq report`: run a plan of many cells, and make tables and plots of the records."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import LLQError
from ..common.words import nearest
from ..data.calibration import CalibrationOptions
from .app import MEASURE, app, console
from .options import RUN, Device, with_calibration_options

if TYPE_CHECKING:
    from ..study.launch import Engine
    from ..study.plan import Cell


PLAN = "Plan, by flags (they replace what a plan file or a preset says)"


@app.command(rich_help_panel=MEASURE)
@with_calibration_options
def study(
    out: Annotated[
        Path,
        typer.Option(help="Folder of records. After a kill, the same command continues there."),
    ],
    plan: Annotated[
        Path | None,
        typer.Argument(help="Plan file (YAML). Or give --preset, or flags alone."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Tables of the paper, `paper-table1` to `paper-table12`, joined by commas; "
            "`paper`: all."
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Folders, Hub ids or `demo`, joined by commas.", rich_help_panel=PLAN),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="gptq,quip,... or `all`.", rich_help_panel=PLAN)
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Widths, as 4,3,2; `all`: every width of the method. Default: the method's.",
            rich_help_panel=PLAN,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Another option of the methods, with its values: group_size=64,128. "
            "May be given again.",
            rich_help_panel=PLAN,
        ),
    ] = None,
    presets: Annotated[
        str | None,
        typer.Option(
            help="Presets of the methods: study,best. Default: study.", rich_help_panel=PLAN
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval or lmms-eval: llq_wikitext2,llq_csqa,...", rich_help_panel=PLAN
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds of the calibration draws: 0,1,2. Default: 0.", rich_help_panel=PLAN
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Only so many documents of each task, to try a plan out.", rich_help_panel=PLAN
        ),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="JSON for the tasks, as lm-eval's --metadata.", rich_help_panel=PLAN),
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[
        str,
        typer.Option(help="Of the evaluation; `auto` where the harness can.", rich_help_panel=RUN),
    ] = "1",
    parallelize: Annotated[
        bool,
        typer.Option("--parallelize", help="Spread a model over all GPUs.", rich_help_panel=RUN),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where packed checkpoints are kept. Default: $LLQ_CACHE, or ~/.cache/llq.",
            rich_help_panel=RUN,
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            help="Also measure speed beside the full-precision model.", rich_help_panel=RUN
        ),
    ] = True,
    engine: Annotated[
        str,
        typer.Option(
            help="`local`, or `ray`: the cells are tasks of a Ray cluster.", rich_help_panel=RUN
        ),
    ] = "local",
    resources: Annotated[
        str,
        typer.Option(
            help="What a cell needs on Ray: cpus=4,gpus=1,memory_gib=40,retries=2,address=ray://...",
            rich_help_panel=RUN,
        ),
    ] = "",
    only: Annotated[
        str,
        typer.Option(
            help="Only the cells whose title (see --dry-run) contains this.", rich_help_panel=RUN
        ),
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the cells, run none.", rich_help_panel=RUN),
    ] = False,
    *,
    calibration: CalibrationOptions,
) -> None:
    """Run every cell of a plan (quantize, evaluate, measure), with a record file for each.

    A cell that fails or is refused is recorded with its reason and does not stop the rest. A kill
    does no harm at any time.

    Examples:

    - `llq study --models demo --methods gptq,quip --bits 3,2 --tasks llq_demo --out runs`
    - `llq study --preset paper-table1 --out runs --dry-run`
    """
    from ..common.machine import auto_device
    from ..hosts.harnesses import check_tasks
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
    drawn = _drawn(calibration)
    plans = [{**each, **over} for each in _plans(plan, preset)]
    cells = expand(
        [{**each, "calibration": {**(each.get("calibration") or {}), **drawn}} for each in plans]
    )
    cells = [cell for cell in cells if only in cell.title]
    if not cells:
        raise LLQError(f"no cell has a title that contains {only!r}; list them with --dry-run")
    if dry_run:
        for cell in cells:
            print(cell.name, cell.title)
        return
    check_tasks(task for cell in cells for task in cell.tasks)
    setup = Setup(
        auto_device(device),
        (_values(batch_size) or [1])[0],
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


@app.command(rich_help_panel=MEASURE)
def report(
    out: Annotated[Path, typer.Argument(help="Folder of records that `llq study` wrote.")],
    formats: Annotated[
        str, typer.Option("--format", help="Any of html, md, csv, latex, svg, joined by commas.")
    ] = "html,md,csv,latex",
    into: Annotated[Path | None, typer.Option(help="Folder to write. Default: OUT itself.")] = None,
    name: Annotated[str, typer.Option(help="Name of the files, without suffix.")] = "report",
) -> None:
    """Write tables and plots of a study, with the published figures beside ours.

    Every figure names the record file that it comes from.

    Example:

    - `llq report runs --format html,md`
    """
    from ..study.report import write_report

    for path in write_report(out, into or out, formats.split(","), name):
        print(path)


def _plans(path: Path | None, preset: str | None) -> list[dict[str, Any]]:
    """The plan of a file, those of presets, or an empty one that flags fill."""
    from ..study.paper import plan_of
    from ..study.plan import load_plan

    if path is not None and preset is not None:
        raise LLQError("give either a plan file or --preset, not both")
    if preset is not None:
        return [plan_of(name) for name in _presets(preset)]
    return [{} if path is None else load_plan(path)]


def _drawn(calibration: CalibrationOptions) -> dict[str, Any]:
    """What flags say of the calibration of all cells."""
    given = {key: value for key, value in asdict(calibration).items() if value is not None}
    if "seed" in given:
        raise LLQError(
            "the cells of a study have --seeds; give that in place of --calibration-seed"
        )
    return given


def _presets(text: str | None) -> list[str]:
    from ..study.paper import tables

    if text == "paper":
        return [table.preset for table in tables().values()]
    return [] if text is None else text.split(",")


def _values(text: str) -> list[Any]:
    """The values that a YAML list of these words would hold: "3,2" gives two numbers."""
    import yaml

    return [yaml.safe_load(word) for word in text.split(",") if word.strip()]


def _methods(methods: str | None, bits: str | None, options: list[str] | None) -> dict[str, Any]:
    """The entry `methods` of a plan, from flags; {} where there are none."""
    varied: dict[str, Any] = {
        key: _values(values)
        for key, _, values in (option.partition("=") for option in options or [])
    }
    if bits is not None:
        varied = {"bits": bits if bits == "all" else _values(bits), **varied}
    if methods is None and varied:
        raise LLQError(
            "--bits and --option belong to --methods; a plan file or a preset says them itself"
        )
    if methods is None:
        return {}
    return {"methods": [{"method": name, **varied} for name in methods.split(",")]}


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
            f"--engine {name} with --resources {resources!r} cannot be run: engines are local,"
            " and ray with resources"
        )
    known = [each.name for each in fields(RayCluster)]
    if unknown := set(given) - set(known):
        name = unknown.pop()
        raise LLQError(
            f"--resources has no {name!r}{nearest(name, known)}; it has: {', '.join(known)}"
        )
    return RayCluster(**{key: _values(value)[0] for key, value in given.items()})
