"""`llq finetune`: train a LoRA adapter on a packed model."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..common.errors import LLQError
from ..common.words import nearest
from ..data.calibration import CalibrationOptions
from ..methods import METHODS, build
from ..methods.nf4 import NF4
from .app import OTHER, app, console
from .options import RUN, Device, with_calibration_options

# Name -> whether the base is calibrated and has elastic connections, as IR-QLoRA's.
ADAPTERS = {"qlora": False, "ir_qlora": True}


ADAPTER = "Adapter"
DATA = "Data"
TRAINING = "Training"
BASE_MODEL = "Packing a dense base first"


@app.command(rich_help_panel=OTHER)
@with_calibration_options
def finetune(
    model: Annotated[
        str,
        typer.Argument(help="A packed checkpoint of any method, a dense model to pack, or `demo`."),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the adapter. It must not exist, or hold the same run."),
    ],
    *,
    method: Annotated[
        str,
        typer.Option(
            help="`qlora`, or `ir_qlora` with a calibrated base and elastic connections.",
            rich_help_panel=ADAPTER,
        ),
    ] = "qlora",
    data: Annotated[
        str,
        typer.Option(
            help="alpaca, demo, a .json, .jsonl or .parquet file, or a dataset on the Hub.",
            rich_help_panel=DATA,
        ),
    ] = "alpaca",
    base_method: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}.", rich_help_panel=BASE_MODEL)
    ] = NF4.name,
    bits: Annotated[
        float | None,
        typer.Option(help="Width of the base. Default: the method's.", rich_help_panel=BASE_MODEL),
    ] = None,
    calibration: CalibrationOptions,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.", rich_help_panel=ADAPTER)] = 64,
    alpha: Annotated[
        int,
        typer.Option(help="The LoRA is scaled by alpha / rank.", rich_help_panel=ADAPTER),
    ] = 16,
    dropout: Annotated[
        float, typer.Option(help="Dropout before the LoRA.", rich_help_panel=ADAPTER)
    ] = 0.0,
    max_steps: Annotated[
        int, typer.Option(help="Steps of the optimizer.", rich_help_panel=TRAINING)
    ] = 10_000,
    batch_size: Annotated[
        int, typer.Option(help="Rows per step, over all processes.", rich_help_panel=TRAINING)
    ] = 16,
    micro_batch: Annotated[
        int,
        typer.Option(help="Rows per forward pass of one process.", rich_help_panel=TRAINING),
    ] = 4,
    learning_rate: Annotated[
        float, typer.Option(help="Constant learning rate.", rich_help_panel=TRAINING)
    ] = 2e-4,
    prompt_tokens: Annotated[
        int, typer.Option(help="Longer prompts are cut.", rich_help_panel=DATA)
    ] = 384,
    answer_tokens: Annotated[
        int, typer.Option(help="Longer answers are cut.", rich_help_panel=DATA)
    ] = 128,
    heldout: Annotated[
        int,
        typer.Option(help="Rows kept out of training, to score on.", rich_help_panel=DATA),
    ] = 1024,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            help="Put the rows of a pass one after the other, without padding.",
            rich_help_panel=DATA,
        ),
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Read rows while training, store none.", rich_help_panel=DATA
        ),
    ] = False,
    paged: Annotated[
        bool,
        typer.Option(
            "--paged",
            help="Let the state of AdamW leave the GPU (needs bitsandbytes).",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    recompute: Annotated[
        bool, typer.Option(help="Gradient checkpointing.", rich_help_panel=TRAINING)
    ] = True,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the adapter, of the order of rows and of what is held out.",
            rich_help_panel=TRAINING,
        ),
    ] = 42,
    save_steps: Annotated[
        int,
        typer.Option(
            help="Steps between saved states, from which a killed run continues.",
            rich_help_panel=RUN,
        ),
    ] = 250,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of activations: float32, bfloat16; `auto`: float32 on a CPU.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
) -> None:
    """Train a LoRA adapter on a packed model (QLoRA, IR-QLoRA).

    OUT becomes an ordinary peft adapter. A dense model is packed first, into OUT/base. After a
    kill, the same command continues where the run stopped. Defaults are the study's recipe for
    Alpaca.

    Examples:

    - `llq finetune demo /tmp/demo-lora --data demo --max-steps 200 --rank 16`
    - `llq finetune meta-llama/Meta-Llama-3-8B lora --method ir_qlora`
    """
    from ..common.progress import Progress
    from ..common.terminal import RichProgress
    from ..finetune import trainer

    if method not in ADAPTERS:
        raise LLQError(
            f"unknown method {method!r}{nearest(method, ADAPTERS)}; give one of"
            f" {', '.join(ADAPTERS)} (how a dense base is packed is --base-method)"
        )
    # transformers has new names for gradient checkpointing, which its earlier 5.x do not know
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    recipe = trainer.Recipe(
        connections=ADAPTERS[method],
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        max_steps=max_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        heldout=heldout,
        packing=packing,
        streaming=streaming,
        paged=paged,
        recompute=recompute,
        seed=seed,
    )
    machine = trainer.machine(device, dtype, save_steps)
    main_process = machine.processes.is_main_process
    progress = RichProgress() if main_process else Progress()
    started = time.perf_counter()
    try:
        base = _packed(
            model, out, base_method, bits, calibration, recipe.connections, machine.device, progress
        )
        note = trainer.finetune(base, out, data, recipe, machine, progress)
    finally:
        progress.close()
    if main_process:
        console.print(_table(note, time.perf_counter() - started))
        print(f"Score it: lm_eval --model llq --model_args pretrained={out} --tasks ...")


def _packed(
    model: str,
    out: Path,
    base_method: str,
    bits: float | None,
    calibration: CalibrationOptions,
    calibrated: bool,
    device: str,
    progress: Any,
) -> str:
    """The packed checkpoint to train on: `model` itself, or what it is packed into."""
    from ..checkpoints.adapter import BASE
    from ..checkpoints.dense import fetch, read_config
    from ..demo import resolve
    from ..engine.execute import execute
    from ..engine.options import RunOptions
    from ..engine.prepare import prepare

    model = resolve(model)
    if "quantization_config" in read_config(fetch(model)):
        return model
    options: dict[str, Any] = (
        {} if bits is None else {"bits": int(bits) if bits.is_integer() else bits}
    )
    if calibrated and base_method == NF4.name:
        options["icq"] = True
    packing = build(base_method, **options)
    data = calibration.for_model(model)
    plan = prepare(model, packing, data, RunOptions(device=device), out / BASE, progress)
    execute(plan, out / BASE, progress)
    return str(out / BASE)


def _table(note: dict[str, Any], seconds: float) -> Table:
    table = Table("", "base", "with adapter", title="Held-out answers", title_justify="left")
    for name, words in (("loss", "nats per token"), ("accuracy", "right to the last token")):
        if note["after"]:
            table.add_row(words, *(f"{note[when][name]:.4f}" for when in ("before", "after")))
    losses = note["losses"]
    table.add_row("training loss, first and last step", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    table.add_row("time", "", f"{seconds:.1f} s")
    return table
