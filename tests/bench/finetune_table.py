"""The table of README's fine-tuning section: bases of the demo model before and after LoRA, on
questions it never saw.

    uv run python tests/bench/finetune_table.py [--steps N] [--out FILE.md] [--only WORDS]

Held-out questions are about people that no training row asks about. CPU seconds are of quantizing,
training and both scorings of answers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models import huggingface  # noqa: F401 (registers what the hook extends)

from llq_hf.data.calibration import CalibrationOptions
from llq_hf.demo import instructions, resolve
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.finetune import rows, trainer
from llq_hf.hosts.lm_eval_model import LLQLM
from llq_hf.method import Method
from llq_hf.methods import build
from llq_hf.models.load import load_tokenizer

HELDOUT = 400


@dataclass(frozen=True)
class Row:
    """A base, and whether its adapters have IR-QLoRA's connections."""

    base: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    adapter: str = "LoRA"
    connections: bool = False

    def build(self) -> Method:
        return build(self.method, **self.options)


ROWS = [
    Row("NF4", "nf4", adapter="QLoRA"),
    Row("NF4, `icq`", "nf4", {"icq": True}, "IR-QLoRA", connections=True),
    Row("GPTQ, 2 bits", "gptq", {"bits": 2}),
    Row("QuIP, 2 bits", "quip", {"bits": 2}),
    Row("NF2", "nf4", {"bits": 2}, "QLoRA"),
    Row("NF2, `icq`", "nf4", {"bits": 2, "icq": True}, "IR-QLoRA", connections=True),
    Row("GPTQ, 2 bits, `preset=best`", "gptq", {"bits": 2, "preset": "best"}),
    Row("RTN, 8 bits", "rtn", {"bits": 8}),
]


def demo_scores(path: str, cache: str, **options: Any) -> tuple[float, float, dict[str, Any]]:
    """(perplexity, accuracy, what was scored) of llq_demo."""
    model = LLQLM(pretrained=path, cache_dir=cache, batch_size=16, device="cpu", **options)
    results = lm_eval.simple_evaluate(model=model, tasks=["llq_demo"], verbosity="ERROR")["results"]
    perplexity = results["llq_demo_ppl"]["token_perplexity,none"]
    return perplexity, results["llq_demo_mc"]["acc,none"], model.get_model_info()["llq"]


def line(
    name: str, bits: str, answers: dict[str, float], demo: tuple[float, float], seconds: float
) -> str:
    right, known = f"{100 * answers['accuracy']:.1f} %", f"{100 * demo[1]:.1f} %"
    return f"| {name} | {bits} | {answers['loss']:.3f} | {right} | {demo[0]:.3f} | {known} | {seconds:.0f} |"


def full_precision(machine: trainer.Machine) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(Path(resolve("demo")))
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=machine.dtype)
    tokens = rows.Tokens(tokenizer, 384, 128)
    heldout = [tokens(rows.Row(*row)) for row in islice(instructions.rows("heldout"), HELDOUT)]
    return trainer.score(model, tokenizer, heldout, machine)


def lines(row: Row, recipe: trainer.Recipe, machine: trainer.Machine, work: Path) -> list[str]:
    """The row of the base, and the row of its adapter."""
    base, out = work / "base", work / "out"
    started = time.process_time()
    method = row.build()
    quantize_checkpoint(resolve("demo"), base, method, CalibrationOptions().for_model("demo"))
    quantized = time.process_time() - started
    note = trainer.finetune(str(base), out, "demo", recipe, machine)
    trained = time.process_time() - started
    found = []
    for name, path, answers, seconds in (
        (row.base, base, note["before"], quantized),
        (f"{row.base} + {row.adapter}", out, note["after"], trained),
    ):
        perplexity, accuracy, info = demo_scores(str(path), str(work))
        bits = f"{info['nominal_bits']:g} | {info['stored_bits']:.3f}"
        found.append(line(name, bits, answers, (perplexity, accuracy), seconds))
    return found


def main() -> None:
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose base contains this")
    args = parser.parse_args()
    machine = trainer.Machine()
    recipe = trainer.Recipe(
        rank=16,
        alpha=32,
        max_steps=args.steps,
        micro_batch=16,
        learning_rate=3e-3,
        heldout=HELDOUT,
        recompute=False,
    )
    table = [
        "| | nominal bits | stored bits | answers: nats per token | right | perplexity | accuracy | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        if not args.only:
            perplexity, accuracy, _ = demo_scores("demo", cache, method="none")
            table.append(
                line(
                    "full precision", "16 | 16", full_precision(machine), (perplexity, accuracy), 0
                )
            )
            print(table[-1], flush=True)
        for number, row in enumerate(ROWS):
            if args.only in row.base:
                recipe = replace(recipe, connections=row.connections)
                table += (new := lines(row, recipe, machine, Path(cache) / str(number)))
                print("\n".join(new), flush=True)
    table.append(
        f"\nCPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.steps} steps of 16 rows."
    )
    print(table[-1])
    if args.out is not None:
        args.out.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
