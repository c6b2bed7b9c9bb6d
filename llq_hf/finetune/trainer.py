"""Trains a LoRA adapter on a packed base. A run that is killed goes on to the same loss curve.

Files
    OUT.training/ beside OUT holds what only the run needs: the tokens of the rows, and Trainer's
    checkpoints. OUT becomes an adapter when its adapter_config.json is written, as the last file;
    before that nothing loads it as one. OUT.lock keeps other runs away; both go in the end.

Recipe
    The defaults are those of the study's LoRA track: QLoRA's Alpaca script, constant learning rate.

Departures
    Rows are shuffled, not grouped by length: Trainer's grouping draws from the global generator, so
    that a resumed run would get another order. `packing` saves the padding instead. A model without
    a pad token is padded with EOS behind the attention mask; the authors' code adds a token and
    resizes the embeddings.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..checkpoints.adapter import ADAPTER, BASE, NOTE, WEIGHTS, identity_of, is_whole
from ..checkpoints.dense import fetch
from ..checkpoints.fingerprint import differences
from ..common.errors import LLQError
from ..common.files import (
    copy,
    locked,
    make_folder,
    read_json,
    remove,
    remove_drafts,
    sha256_file,
    write_json,
)
from ..common.machine import auto_device
from ..common.progress import Progress
from ..hosts.hf_quantizer import check_quantized, count_quantized
from ..layers.linear import QuantLinear
from ..models.load import load_tokenizer
from . import elastic, rows
from .checkpoints import WholeCheckpoints, drop_others, last_checkpoint

IDENTITY = "identity.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run that decides the adapter, except base and data.

    connections: IR-QLoRA's. batch_size: rows per step, over all processes. micro_batch: rows per
    forward pass of one process. packing: the rows of a pass follow each other in one sequence
    without padding, and each attends to itself only. streaming: rows are read while training, and
    none are stored. paged: AdamW whose state may leave the GPU (bitsandbytes). recompute: gradient
    checkpointing.
    """

    connections: bool = False
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.0
    max_steps: int = 10_000
    batch_size: int = 16
    micro_batch: int = 4
    learning_rate: float = 2e-4
    max_grad_norm: float = 0.3
    prompt_tokens: int = 384
    answer_tokens: int = 128
    heldout: int = 1024
    packing: bool = False
    streaming: bool = False
    paged: bool = False
    recompute: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        counts = (
            "rank",
            "alpha",
            "max_steps",
            "batch_size",
            "micro_batch",
            "prompt_tokens",
            "answer_tokens",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise LLQError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heldout < 0:
            raise LLQError(f"heldout={self.heldout} must not be negative")
        if not 0 <= self.dropout < 1:
            raise LLQError(f"dropout={self.dropout} must lie in 0..1")
        if not 0 < self.learning_rate < math.inf:
            raise LLQError(f"learning_rate={self.learning_rate} must be positive")

    def accumulation(self, processes: int) -> int:
        """Passes per step."""
        passes, rest = divmod(self.batch_size, self.micro_batch * processes)
        if rest or not passes:
            raise LLQError(
                f"batch_size={self.batch_size} is no multiple of "
                f"micro_batch={self.micro_batch} x {processes} processes; change one of them"
            )
        return passes


@dataclass(frozen=True)
class Machine:
    """Where to train. dtype: of activations; save_steps: steps between checkpoints."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    save_steps: int = 250

    @property
    def processes(self) -> PartialState:
        """The processes that train together.

        accelerate must be told that it runs on CPUs when it is first asked, else each process
        trains alone.
        """
        return PartialState(cpu=self.device == "cpu")


def machine(device: str, dtype: str, save_steps: int) -> Machine:
    """The machine of a user's options. dtype "auto" is bf16 on a GPU and fp32 on a CPU."""
    device = auto_device(device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes["auto"] = dtypes["float32" if device == "cpu" else "bfloat16"]
    if dtype not in dtypes:
        raise LLQError(f"dtype={dtype!r} is not one of auto, float32, bfloat16")
    if save_steps < 1:
        raise LLQError(f"save_steps={save_steps} must be at least 1")
    return Machine(device, dtypes[dtype], save_steps)


def finetune(
    base: str,
    out: Path,
    data: str,
    recipe: Recipe,
    machine: Machine,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train an adapter for the packed checkpoint `base` (folder or Hub id) into the folder `out`.

    Returns its note: "base", "identity", "losses" of all steps, and "before" and "after", the
    held-out scores without and with the adapter. The same call goes on where a killed one stopped;
    it leaves a finished adapter as it is, unless its weights are gone or damaged. LLQError for
    anything wrong with the input.
    """
    out = out.absolute()
    with _alone(out, machine.processes):
        return _finetune(base, out, data, recipe, machine, progress or Progress())


@contextmanager
def _alone(out: Path, processes: PartialState) -> Iterator[None]:
    """Keep other runs from the folder: they wait, and then find the work done."""
    with ExitStack() as stack:
        if processes.is_main_process:
            make_folder(out.parent)
            stack.enter_context(locked(out.with_name(out.name + ".lock")))
        processes.wait_for_everyone()
        yield


def _finetune(
    base: str, out: Path, data: str, recipe: Recipe, machine: Machine, progress: Progress
) -> dict[str, Any]:
    work = out.with_name(out.name + ".training")
    processes = machine.processes
    accumulation = recipe.accumulation(processes.num_processes)
    _check(out, work, recipe, machine)
    progress.stage("loading the base")
    model, tokenizer = _load(base, machine)
    identity = _identity(model, data, recipe, processes.num_processes)
    if (out / NOTE).is_file() and (out / ADAPTER).is_file():
        note = read_json(out / NOTE)
        _check_same(note["identity"], identity, out)
        if is_whole(out, note):
            _clean(out, work, processes)
            return note
    _begin(work, identity, out, processes)
    progress.stage("reading rows")
    with processes.main_process_first():
        train_rows, heldout_rows = _rows(data, tokenizer, recipe, work)
    model = _add_adapters(model, base, recipe)
    # The base is scored with adapters that add nothing yet: Trainer takes no bare packed model.
    progress.stage("scoring the base")
    before = score(model, tokenizer, heldout_rows, machine)
    trainer = _trainer(model, tokenizer, train_rows, recipe, machine, work, accumulation)
    trainer.add_callback(TrainerProgress(progress))
    trainer.add_callback(WholeCheckpoints())
    last = last_checkpoint(work)
    if processes.is_main_process:
        drop_others(work, keep=last)  # torn ones
    processes.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    elastic.merge(model)
    progress.stage("scoring the adapter")
    after = score(model, tokenizer, heldout_rows, machine)
    note = {
        "base": identity["base"],
        "identity": identity,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "before": before,
        "after": after,
    }
    if processes.is_main_process:
        note = _write(model, out, work, note)
    _clean(out, work, processes)
    return note


def _check(out: Path, work: Path, recipe: Recipe, machine: Machine) -> None:
    if recipe.paged and (
        machine.device == "cpu" or importlib.util.find_spec("bitsandbytes") is None
    ):
        raise LLQError(
            "paged=True needs a GPU and bitsandbytes; install llq-hf[kernels], or leave it out"
        )
    others = [file.name for file in sorted(out.glob("*")) if not file.name.startswith(BASE)]
    if out.is_file() or (others and not (out / NOTE).is_file() and not (work / IDENTITY).is_file()):
        raise LLQError(
            f"{out} is not empty ({others[0] if others else 'a file'}) and no adapter; "
            "give another folder"
        )


def _load(base: str, machine: Machine) -> tuple[Any, Any]:
    folder = fetch(base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=machine.dtype)
    check_quantized(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise LLQError(
            f"the tokenizer of {base} has no EOS token, with which every answer ends; "
            "name one in its config"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.use_cache = False
    return model.to(machine.device), tokenizer


def _identity(model: nn.Module, data: str, recipe: Recipe, processes: int) -> dict[str, Any]:
    """Everything that decides the adapter."""
    path = Path(data).expanduser()
    content = sha256_file(path) if path.is_file() else None
    return {
        "base": identity_of(model),
        "data": {"source": data, "sha256": content},
        "recipe": asdict(recipe),
        "processes": processes,
    }


def _check_same(begun: dict[str, Any], identity: dict[str, Any], out: Path) -> None:
    differing = differences(begun, identity)
    if differing:
        raise LLQError(
            f"{out} was begun with other inputs: {'; '.join(differing)}. "
            f"Give another folder, or delete {out} and {out.name}.training to start anew"
        )


def _begin(work: Path, identity: dict[str, Any], out: Path, processes: PartialState) -> None:
    """Write down what is trained, or check that an interrupted run trained the same."""
    if (work / IDENTITY).is_file():
        _check_same(read_json(work / IDENTITY), identity, out)
        return
    processes.wait_for_everyone()  # nobody writes before all have looked
    if processes.is_main_process:
        make_folder(work)
        write_json(work / IDENTITY, identity)
    processes.wait_for_everyone()


def _rows(data: str, tokenizer: Any, recipe: Recipe, work: Path) -> tuple[Any, Any]:
    tokens = rows.Tokens(tokenizer, recipe.prompt_tokens, recipe.answer_tokens)
    if recipe.streaming:
        return rows.streamed_rows(data, tokens, recipe.heldout, recipe.seed)
    return rows.stored_rows(data, tokens, recipe.heldout, recipe.seed, work)


def _add_adapters(model: Any, base: str, recipe: Recipe) -> Any:
    """The model with fresh adapters on all of its quantized linears, which alone are trained."""
    set_seed(recipe.seed)
    names = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=sorted(names),
        task_type="CAUSAL_LM",
    )
    quantized = count_quantized(model)
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = (
        str(Path(base).resolve()) if Path(base).is_dir() else base
    )
    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    if adapted != quantized:
        raise LLQError(
            f"{adapted} linears would get adapters, but {quantized} are quantized; "
            "is it a text model?"
        )
    if recipe.connections:
        elastic.connect(model)
    return model


def _trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Any,
    recipe: Recipe,
    machine: Machine,
    work: Path,
    accumulation: int,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=machine.device == "cpu",
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=recipe.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=0.0,
        optim="paged_adamw_32bit" if recipe.paged else "adamw_torch",
        logging_steps=1,
        save_steps=machine.save_steps,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # Every process reads for itself: batches of one row cannot be split.
        accelerator_config={"dispatch_batches": False},
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    padded = DataCollatorForSeq2Seq(tokenizer, padding=True)
    collator = DataCollatorWithFlattening() if recipe.packing else padded
    return _silent(
        Trainer(model=model, args=arguments, train_dataset=train_rows, data_collator=collator)
    )


def _silent(trainer: Trainer) -> Trainer:
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def score(model: Any, tokenizer: Any, heldout: Any, machine: Machine) -> dict[str, float]:
    """{"loss": nats per token of held-out answers, "accuracy": share of answers that are right}.

    An answer is right where every token of it, and the EOS after it, is the likeliest one. heldout:
    tokens as `rows.Tokens` makes them. {} where nothing is held out.
    """
    if len(heldout) == 0:
        return {}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            use_cpu=machine.device == "cpu",
            per_device_eval_batch_size=16,
            disable_tqdm=True,
            report_to="none",
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        compute_metrics=_right_answers,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = _silent(trainer).evaluate(heldout)
    # accelerate marks what it prepared to be scored, and would then not wrap it to be trained by
    # several processes
    vars(model).pop("_is_accelerate_prepared", None)
    return {"loss": metrics["eval_loss"], "accuracy": metrics["eval_right"]}


def _right_answers(prediction: Any) -> dict[str, float]:
    guess_NT, label_NT = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    right_N = ((guess_NT == label_NT) | (label_NT == -100)).all(-1)
    return {"right": float(right_N.mean())}


def _write(model: Any, out: Path, work: Path, note: dict[str, Any]) -> dict[str, Any]:
    """Write note and adapter into OUT, the adapter's config last.

    Returns the note, with the hash of the weights.
    """
    draft = work / "adapter"
    shutil.rmtree(draft, ignore_errors=True)
    for config in model.peft_config.values():
        # peft writes a set, in another order in every process.
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(draft)
    make_folder(out)
    remove(out / ADAPTER)  # nothing loads the folder until all is written
    note = {**note, "weights_sha256": sha256_file(draft / WEIGHTS)}
    write_json(out / NOTE, note)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == ADAPTER):
        copy(file, out / file.name)
    return note


def _clean(out: Path, work: Path, processes: PartialState) -> None:
    """Delete what a finished run needs no more."""
    if processes.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        remove_drafts(out)
    processes.wait_for_everyone()


class TrainerProgress(TrainerCallback):  # type: ignore[misc]
    """Passes Trainer's progress on to ours."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stage("training", state.max_steps)
        self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.progress.linear(f"loss {float(logs['loss']):.4f}")
