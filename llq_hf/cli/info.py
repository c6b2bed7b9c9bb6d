"""`llq info`, `llq verify`, `llq methods`: what a packed checkpoint is, whether it is as it was
written, and what can be made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checkpoints.records import LinearRecord
from ..checkpoints.serving import Served
from ..method import Method, field_defaults, stored_bits
from ..methods import METHODS
from .app import QUANTIZE, app, console


@app.command(rich_help_panel=QUANTIZE)
def info(
    path: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all linears.")] = False,
    linears: Annotated[
        bool, typer.Option("--linears", help="Also print a row per quantized linear.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="First compare every tensor and file, as `llq verify` does."),
    ] = False,
) -> None:
    """Show what a packed checkpoint is: method, options, bits, calibration, fingerprint; and which
    kernels multiply its linears on this machine's CPU.

    Bits are counted from the stored tensors. With --linears it also shows the errors and notes of
    each linear.

    Example:

    - `llq info /tmp/demo-quip --linears`
    """
    from ..checkpoints.hashes import damage, refuse
    from ..checkpoints.inspection import inspect_checkpoint
    from ..checkpoints.serving import served
    from ..kernels import describe, describe_gpu

    if verify:
        refuse(path, damage(path))
    found = inspect_checkpoint(path)
    with console.status("asking which kernels serve"):
        shown: dict[str, Any] = {
            **found,
            "kernels": describe(),
            "gpu_kernels": describe_gpu(),
            "served": served(path),
        }
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    table = Table(show_header=False)
    for key in (
        "method",
        "nominal_bits",
        "stored_bits",
        "whole_model_bits",
        "bytes",
        "quantized_linears",
        "fingerprint",
        "content",
        "kernels",
        "gpu_kernels",
    ):
        value = shown[key]
        table.add_row(
            key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)
        )
    table.add_row("options", ", ".join(f"{k}={_brief(str(v))}" for k, v in found["config"].items()))
    table.add_row("calibration", json.dumps(found["calibration"]))
    made_from = found["made_from"] or {}
    if converted := made_from.get("converted"):
        origin = f"{made_from['model']}, in the format {converted['format']}"
        table.add_row("converted from", origin)
    console.print(table)
    console.print(_kernels_table(shown["served"]))
    print_served(found["linears"])
    if linears:
        console.print(_linears_table(found["linears"]))


@app.command(rich_help_panel=QUANTIZE)
def verify(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a packed checkpoint.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub. Default: main.")
    ] = None,
) -> None:
    """Compare every tensor, file and field of a packed checkpoint with how it was written.

    What is damaged or missing is listed by name, with the block that a tensor belongs to, and the
    exit status is 1. The `llq quantize` that made a folder mends it: it does the damaged blocks
    again. Loading compares what it can without reading a tensor, and everything where the
    environment has LLQ_VERIFY=1.

    Example:

    - `llq verify /tmp/demo-quip`
    """
    from ..checkpoints.dense import fetch
    from ..checkpoints.hashes import CURE, Hashes, damage

    folder = fetch(path, revision)
    found = damage(folder)
    for phrase in found:
        print(phrase)
    if found:
        print(f"{len(found)} of {path} not as written. To have it whole, {CURE}.")
        raise typer.Exit(1)
    hashes = Hashes.read(folder)
    content = f" (content {hashes.digest})" if hashes else ""
    print(f"{path} is as it was written: every tensor, file and field{content}")


def _kernels_table(kinds: list[Served]) -> Table:
    """Which kernel serves which linears, and what faster ones need."""
    table = Table("linears", "shape", "1 token", "2 to 16", "more", "why no faster kernel")
    for kind in kinds:
        table.add_row(
            ", ".join(name.removesuffix("_proj") for name in kind["linears"]),
            " x ".join(map(str, kind["shape"])),
            kind["one_token"],
            kind["few_tokens"],
            kind["more_tokens"],
            "; ".join(kind["reasons"]),
        )
    return table


def _brief(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def print_served(records: list[LinearRecord]) -> None:
    """Where methods are mixed, print which one serves which linear, a row per block."""
    served: dict[str, dict[str, str]] = {}
    for record in records:
        if "served_by" in record:
            block, linear = re.findall(r"^(.*?\.\d+)\.(.*)$", record["name"])[0]
            served.setdefault(block, {})[linear] = record["served_by"]
    if served:
        columns = list(dict.fromkeys(linear for linears in served.values() for linear in linears))
        table = Table(
            "block", *(column.rpartition(".")[2].removesuffix("_proj") for column in columns)
        )
        for block, linears in served.items():
            table.add_row(
                block.rpartition(".")[2], *(linears.get(column, "") for column in columns)
            )
        console.print(table)


def _linears_table(records: list[LinearRecord]) -> Table:
    table = Table(
        "linear", "shape", "stored bits", "weight error", "output error", "notes", "seconds"
    )
    known = {"name", "shape", "stored_bits", "weight_error", "output_error", "seconds"}
    for record in records:
        notes = ", ".join(f"{k}={v}" for k, v in record.items() if k not in known)
        output = f"{record['output_error']:.3g}" if "output_error" in record else ""
        seconds = f"{record['seconds']:.2f}" if "seconds" in record else ""
        shape = " x ".join(map(str, record["shape"]))
        bits = f"{record['stored_bits']:.3f}"
        error = f"{record['weight_error']:.3g}" if "weight_error" in record else ""
        table.add_row(record["name"], shape, bits, error, output, notes, seconds)
    return table


@app.command(rich_help_panel=QUANTIZE)
def methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with stored bits for every width.")
    ] = False,
) -> None:
    """List the methods: their widths, their options with defaults, and what preset=best changes."""
    described = {name: _describe(method) for name, method in METHODS.items()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name, each in described.items():
        console.print(
            f"[bold]{name}[/bold]  {each['title']}, {each['bits'][0]} to {each['bits'][-1]} bits"
        )
        for option, default in each["options"].items():
            best = f"   best: {each['best'][option]}" if option in each["best"] else ""
            console.print(f"    {option} = {default}{best}", highlight=False)


def _describe(method: type[Method]) -> dict[str, Any]:
    return {
        "title": method.title,
        "bits": list(method.bits_range),
        "needs_calibration": method.build().calibrated,
        "options": field_defaults(method),
        "best": dict(method.best),
        "stored_bits_4096x4096": {bits: _stored(method, bits) for bits in method.bits_range},
    }


def _stored(method: type[Method], bits: float) -> float:
    return round(stored_bits(method.build(bits=bits).layout(4096, 4096), 4096, 4096), 4)
