"""The command line: llq quantize, info, methods, eval. Every error is one sentence on stderr and exit status 1."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import LLQError
from .method import Method, field_defaults, field_types
from .methods import METHODS, method_type

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Low-bit LLaMA models for real: quantize, look into, evaluate. `llq COMMAND --help` tells more.",
)
console = Console()


def _method_options() -> list[inspect.Parameter]:
    """One command-line option per field of any method; the help says which methods have it, with which default."""
    owners: dict[str, dict[str, Any]] = {}
    types: dict[str, type] = {}
    for name, method in METHODS.items():
        for field, kind in field_types(method).items():
            types[field] = float if {kind, types.get(field, kind)} == {int, float} else kind
        for field, default in field_defaults(method).items():
            owners.setdefault(field, {})[name] = default
    parameters = []
    for field, defaults in owners.items():
        values = set(map(str, defaults.values()))
        shown = values.pop() if len(values) == 1 else ", ".join(f"{n} {v}" for n, v in defaults.items())
        help_text = f"default {shown}; {'all methods' if len(defaults) == len(METHODS) else ', '.join(defaults)}"
        names = [f"--{field.replace('_', '-')}"]
        if types[field] is bool:
            names = [f"{names[0]}/--no-{field.replace('_', '-')}"]
        option = typer.Option(*names, help=help_text, rich_help_panel="Options of the method", show_default=False)
        parameters.append(
            inspect.Parameter(
                field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[types[field] | None, option]
            )
        )
    return parameters


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option per method field; it receives those that were set as the dict `options`."""

    def wrapper(**kwargs: Any) -> None:
        names = {parameter.name for parameter in _method_options()}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        given = {name: value for name, value in options.items() if value is not None}
        whole = {n: int(v) for n, v in given.items() if isinstance(v, float) and v.is_integer()}  # floats take ints too
        command(**kwargs, options={**given, **whole})

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature([*own, *_method_options()])  # type: ignore[attr-defined]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


@app.command()
@with_method_options
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the full-precision model, or `demo`.")],
    out: Annotated[
        Path, typer.Argument(help="Folder to write; must not exist, or hold an interrupted run of the same.")
    ],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}. `llq methods` tells more.")],
    options: dict[str, Any],
    preset: Annotated[
        str, typer.Option(help="`study` reproduces the paper; `best` stores no more bits, and is better.")
    ] = "study",
    calibration: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, ptb, demo, or a file: .txt .json .jsonl .parquet, .npy of token ids."),
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Sequences; default 128.")] = None,
    calibration_seqlen: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default 2048 (demo: 256).")
    ] = None,
    calibration_seed: Annotated[int, typer.Option(help="Seed of the windows drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the calibration passes: auto (the model's), float32, bfloat16, float16.")
    ] = "auto",
    offload: Annotated[Path | None, typer.Option(help="Keep calibration activations in files of this folder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run one block, write nothing.")] = False,
) -> None:
    """Quantize a model block by block into a packed checkpoint that from_pretrained loads.

    Peak memory is one block, whatever the depth. A killed run goes on where it stopped when the same command is given
    again.

    Example: **llq quantize demo /tmp/demo-quip --method quip --bits 2**
    """
    import torch

    from .demo import calibration_for, resolve
    from .progress import RichProgress
    from .quantize import RunOptions
    from .run import peak_bytes, prepare, quantize_checkpoint

    built = method_type(method).build(preset, **options)
    data = calibration_for(model, calibration, calibration_samples, calibration_seqlen, calibration_seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    run = RunOptions(device=device, dtype=None if dtype == "auto" else dtype, offload=offload, revision=revision)
    if dry_run:
        progress = RichProgress()
        try:
            prepare(resolve(model), built, data, run, out, progress)
        finally:
            progress.close()
        return
    started = time.perf_counter()
    report = quantize_checkpoint(resolve(model), out, built, data, run, RichProgress())
    seconds = time.perf_counter() - started
    table = _bits_table(f"{built.title} of {model}", report)
    table.add_row("time", f"{seconds:.1f} s")
    table.add_row("peak memory", f"{peak_bytes() / 2**30:.2f} GiB")
    _warn_of_fallbacks(report)
    console.print(table)
    print(f"Load it: AutoModelForCausalLM.from_pretrained({str(out)!r})")  # not rich: it would break the line


def _bits_table(title: str, report: dict[str, Any]) -> Table:
    bits = report["bits"]
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("nominal bits", f"{bits['nominal']:g}")
    table.add_row("stored bits per quantized weight", f"{bits['stored']:.3f}")
    table.add_row("bits per weight of the whole model", f"{bits['whole_model']:.3f}")
    table.add_row("size on disk", f"{bits['bytes'] / 2**20:.1f} MiB")
    table.add_row("quantized linears", str(len(report["linears"])))
    return table


def _warn_of_fallbacks(report: dict[str, Any]) -> None:
    fallen = [record["name"] for record in report["linears"] if "fallback" in record]
    if fallen:
        console.print(f"[yellow]{len(fallen)} linears fell back to rounding to nearest, the first: {fallen[0]}")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    linears: Annotated[bool, typer.Option("--linears", help="Also a line per quantized linear.")] = False,
) -> None:
    """What a packed checkpoint is: method, options, bits counted from its files, fingerprint, how each linear went."""
    from .inspection import inspect_checkpoint

    found = inspect_checkpoint(path)
    if as_json:
        print(json.dumps(found, indent=2))
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
    ):
        value = found[key]
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row("options", ", ".join(f"{k}={v}" for k, v in found["config"].items()))
    table.add_row("calibration", json.dumps(found["calibration"]))
    console.print(table)
    if linears:
        console.print(_linears_table(found["linears"]))


def _linears_table(records: list[dict[str, Any]]) -> Table:
    table = Table("linear", "shape", "stored bits", "weight error", "output error", "notes", "seconds")
    known = {"name", "shape", "stored_bits", "weight_error", "output_error", "seconds"}
    for record in records:
        notes = ", ".join(f"{k}={v}" for k, v in record.items() if k not in known)
        output = f"{record['output_error']:.3g}" if "output_error" in record else ""
        seconds = f"{record['seconds']:.2f}" if "seconds" in record else ""
        shape = " x ".join(map(str, record["shape"]))
        bits, error = f"{record['stored_bits']:.3f}", f"{record['weight_error']:.3g}"
        table.add_row(record["name"], shape, bits, error, output, notes, seconds)
    return table


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """The methods, their options with defaults, and what preset=best changes."""
    described = {name: _describe(method) for name, method in METHODS.items()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name, each in described.items():
        console.print(f"[bold]{name}[/bold]  {each['title']}, {each['bits'][0]} to {each['bits'][-1]} bits")
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
    from .method import stored_bits

    return round(stored_bits(method.build(bits=bits).layout(4096, 4096), 4096, 4096), 4)


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


def main() -> None:
    """Entry point of `llq`."""
    try:
        app(standalone_mode=True)
    except LLQError as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, which typer turns into this
            Console(stderr=True).print("Interrupted; the same command goes on where this one stopped.")
        raise
