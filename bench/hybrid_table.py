"""The tables of README on trained grids and hybrid allocation: KL from full precision and perplexity, per stored bit.

    uv run python bench/hybrid_table.py [--out FILE.md] [--only WORDS] [--cache FOLDER]

On the bundled demo model, CPU. KL(full precision || quantized) is in nats per token over 64 windows of 256 tokens of
the held-out text, perplexity over all of it, both in fp32. Packed models stay in the cache folder, so that a run goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llq_hf.demo import calibration_for, resolve, world
from llq_hf.demo.train import ids_of, perplexity
from llq_hf.lm_eval import cached
from llq_hf.methods import build
from llq_hf.packed import read_report
from llq_hf.quantize import RunOptions
from llq_hf.run import load_tokenizer

WINDOW, WINDOWS = 256, 64
QUIP = "+".join(f"quip:{bits}" for bits in (2, 3, 4))
MIXED = QUIP + "+gptq:2:preset=best+gptq:3:preset=best"
HALVES = "*.layers.0.*=quip:3+*.layers.1.*=quip:3+*=quip:2"
ROWS: dict[str, dict[str, object]] = {
    "GPTQ, 2 bits, groups of 64, `preset=best`": {"method": "gptq", "bits": 2, "group_size": 64, "preset": "best"},
    "OmniQuant, 2 bits, groups of 64, `preset=best`": {
        "method": "omniquant",
        "bits": 2,
        "group_size": 64,
        "preset": "best",
    },
    "QuIP, 2 bits, `preset=best`": {"method": "quip", "bits": 2, "preset": "best"},
    "SpinQuant, 2 bits, `preset=best`": {"method": "spinquant", "bits": 2, "preset": "best"},
    "AWQ, 2 bits, `preset=best`": {"method": "awq", "bits": 2, "preset": "best"},
    "EfficientQAT, 2 bits": {"method": "efficient_qat", "bits": 2},
    "EfficientQAT, 2 bits, `preset=best`, Block-AP alone": {
        "method": "efficient_qat",
        "bits": 2,
        "preset": "best",
        "tune_epochs": 0,
    },
    "EfficientQAT, 2 bits, `preset=best`": {"method": "efficient_qat", "bits": 2, "preset": "best"},
    "QuIP, 2 bits": {"method": "quip", "bits": 2},
    "QuIP, 3 bits": {"method": "quip", "bits": 3},
    "QuIP, first half of the blocks 3 bits, others 2": {"method": "hybrid", "rules": HALVES},
    "hybrid of QuIP, 2.548 bits": {"method": "hybrid", "bits": 2.548, "candidates": QUIP},
    "hybrid of QuIP, 3.048 bits": {"method": "hybrid", "bits": 3.048, "candidates": QUIP},
    "hybrid of QuIP and GPTQ, 2.548 bits": {"method": "hybrid", "bits": 2.548, "candidates": MIXED},
}


@cache
def full_precision() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32).eval()
    return model


@cache
def text_ids() -> Tensor:
    return ids_of(load_tokenizer(Path(resolve("demo"))), world.heldout_text())


@torch.no_grad()
def divergence(model: nn.Module) -> float:
    """KL(full precision || model) in nats per token."""
    total = 0.0
    for ids_BS in text_ids()[: WINDOW * WINDOWS].view(-1, WINDOW).split(16):
        p, q = (each(ids_BS).logits.log_softmax(-1) for each in (full_precision(), model))
        total += float((p.exp() * (p - q)).sum(-1).mean()) * len(ids_BS)
    return total / WINDOWS


def line(name: str, options: dict[str, object], root: Path) -> str:
    """A row of the table."""
    method = build(**options)  # type: ignore[arg-type]
    data = calibration_for("demo", None, None, None)
    folder = cached(resolve("demo"), method, data, RunOptions(dtype="float32"), root)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = read_report(folder)["bits"]["stored"]
    return f"| {name} | {stored:.3f} | {divergence(model):.4f} | {perplexity(model, text_ids(), WINDOW):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/llq-hybrid-table"), help="where packed models stay")
    args = parser.parse_args()
    lines = ["| | stored bits | KL | perplexity |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for name, options in ROWS.items():
        if args.only in name:
            lines.append(line(name, options, args.cache))
            print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
