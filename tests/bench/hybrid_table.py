"""The tables of README on trained grids and hybrid allocation: KL from full precision and
perplexity, per stored bit.

    uv run python tests/bench/hybrid_table.py [--out FILE.md] [--only WORDS] [--cache FOLDER]

On the bundled demo model, CPU. KL(full precision || quantized) in nats per token, and perplexity, over 16 windows of
256 tokens of the held-out text, in fp32. Packed models stay in the cache folder, so that a run goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llq_hf.checkpoints.packed import read_report
from llq_hf.data.calibration import CalibrationOptions
from llq_hf.demo import resolve, world
from llq_hf.demo.train import ids_of
from llq_hf.engine.cached import cached
from llq_hf.engine.options import RunOptions
from llq_hf.methods import build
from llq_hf.models.load import load_tokenizer

WINDOW, WINDOWS = 256, 16
WIDTHS = "rtn:2+rtn:3+rtn:4+rtn:5+rtn:6+rtn:8"
QUIPS = "+".join(f"quip:{bits}:preset=best" for bits in (2, 3, 4, 5))


def halves(more: int, fewer: int) -> str:
    """Rules that give the first half of the demo model's blocks more bits."""
    return f"*.layers.0.*=rtn:{more}+*.layers.1.*=rtn:{more}+*=rtn:{fewer}"


HYBRIDS: dict[str, dict[str, object]] = {"": {}, ", costs predicted": {"measured": False}}
BEST: dict[str, object] = {"bits": 2, "preset": "best"}
ROWS: dict[str, dict[str, object]] = {
    "SpinQuant, 2 bits, `preset=best`": {"name": "spinquant", **BEST},
    "SpinQuant, 2 bits, groups of 64, `preset=best`": {
        "name": "spinquant",
        "group_size": 64,
        **BEST,
    },
    "QuIP, 2 bits, `preset=best`": {"name": "quip", **BEST},
    "AWQ, 2 bits, `preset=best`": {"name": "awq", **BEST},
    "GPTQ, 2 bits, groups of 64, `preset=best`": {"name": "gptq", "group_size": 64, **BEST},
    "OmniQuant, 2 bits, groups of 64, `preset=best`": {
        "name": "omniquant",
        "group_size": 64,
        **BEST,
    },
    "EfficientQAT, 2 bits": {"name": "efficient_qat", "bits": 2},
    "EfficientQAT, 2 bits, `preset=best`, Block-AP alone": {
        "name": "efficient_qat",
        "tune_epochs": 0,
        **BEST,
    },
    "EfficientQAT, 2 bits, `preset=best`": {"name": "efficient_qat", **BEST},
    "QuIP, 3 bits, `preset=best`": {"name": "quip", "bits": 3, "preset": "best"},
    "SpinQuant, 3 bits, `preset=best`": {"name": "spinquant", "bits": 3, "preset": "best"},
    **{
        f"hybrid of QuIP `preset=best`, {bits} bits": {
            "name": "hybrid",
            "bits": bits,
            "candidates": QUIPS,
        }
        for bits in (2.281, 2.549, 3.049)
    },
    "RTN, 3 bits": {"name": "rtn", "bits": 3},
    "RTN, 4 bits": {"name": "rtn", "bits": 4},
    "RTN, first half of the blocks 4 bits, the others 3": {"name": "hybrid", "rules": halves(4, 3)},
    **{
        f"hybrid of RTN, {bits} bits{words}": {
            "name": "hybrid",
            "bits": bits,
            "candidates": WIDTHS,
            **options,
        }
        for words, options in HYBRIDS.items()
        for bits in (3.149, 3.653, 4.157)
    },
}


@cache
def full_precision() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        resolve("demo"), dtype=torch.float32
    ).eval()
    return model


@cache
def text_ids() -> Tensor:
    return ids_of(load_tokenizer(Path(resolve("demo"))), world.heldout_text())


@torch.no_grad()
def measured(model: nn.Module) -> tuple[float, float]:
    """KL(full precision || model) in nats per token, and perplexity."""
    divergence = nats = 0.0
    for ids_BS in text_ids()[: WINDOW * WINDOWS].view(-1, WINDOW).split(16):
        p_BSV, q_BSV = (each(ids_BS).logits.log_softmax(-1) for each in (full_precision(), model))
        divergence += float((p_BSV.exp() * (p_BSV - q_BSV)).sum(-1).mean()) * len(ids_BS)
        nats -= float(q_BSV[:, :-1].gather(-1, ids_BS[:, 1:, None]).mean()) * len(ids_BS)
    return divergence / WINDOWS, math.exp(nats / WINDOWS)


def line(name: str, options: dict[str, object], root: Path) -> str:
    """A row of the table."""
    method = build(**options)  # type: ignore[arg-type]
    data = CalibrationOptions().for_model("demo")
    folder = cached(resolve("demo"), method, data, RunOptions(dtype="float32"), root)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = read_report(folder)["bits"]["stored"]
    divergence, perplexity = measured(model)
    return f"| {name} | {stored:.3f} | {divergence:.4f} | {perplexity:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/llq-hybrid-table"), help="where packed models stay"
    )
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
