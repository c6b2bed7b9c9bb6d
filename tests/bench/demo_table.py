"""The table of README: every method and width on the bundled demo model, through lm-eval as a user
would run it.

    uv run python tests/bench/demo_table.py [--out FILE.md] [--only WORDS] [--part I/N]

CPU; seconds are of processor time, of quantizing with calibration and loading, side by side in one
run on one machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lm_eval
import torch

Row = tuple[str, dict[str, object]]


def rows(
    title: str, method: str, widths: tuple[float, ...], words: str = "", **options: object
) -> list[Row]:
    """A method at several widths, widest first."""
    return [
        (
            f"{title}, {bits:g} bits{', ' * bool(words)}{words}",
            {"method": method, "bits": bits, **options},
        )
        for bits in widths
    ]


def best(title: str, method: str, widths: tuple[float, ...], **options: object) -> list[Row]:
    return rows(title, method, widths, "`preset=best`", preset="best", **options)


ROWS: list[Row] = [
    ("full precision", {"method": "none"}),
    *rows("RTN", "rtn", (8, 4, 3, 2)),
    *best("RTN", "rtn", (4, 3, 2)),
    *rows("GPTQ", "gptq", (8, 4, 3, 2)),
    *best("GPTQ", "gptq", (4, 3, 2)),
    *rows("GPTQ", "gptq", (4, 2), "per channel", group_size=-1),
    *rows("AWQ", "awq", (4, 3, 2)),
    *best("AWQ", "awq", (4, 3, 2)),
    *rows("OmniQuant", "omniquant", (4, 3, 2)),
    *best("OmniQuant", "omniquant", (4, 3, 2)),
    *rows("SpinQuant", "spinquant", (4, 3, 2)),
    *best("SpinQuant", "spinquant", (4, 3, 2)),
    *rows("QuIP", "quip", (8, 4, 3, 2)),
    *best("QuIP", "quip", (8, 4, 3, 2)),
    *rows("SliM-LLM", "slim_llm", (4, 3, 2)),
    *best("SliM-LLM", "slim_llm", (4, 3, 2)),
    *rows("EfficientQAT", "efficient_qat", (4, 3, 2)),
    *best("EfficientQAT", "efficient_qat", (4, 3, 2)),
    *rows("DB-LLM", "db_llm", (2,)),
    *best("DB-LLM", "db_llm", (2,)),
    *rows("PB-LLM", "pb_llm", (2.0, 1.7)),
    *best("PB-LLM", "pb_llm", (2.0, 1.7)),
    *rows("BiLLM", "billm", (1.1,)),
    *best("BiLLM", "billm", (1.1,)),
    *(
        row
        for n in (8, 6, 4)
        for row in rows("SmoothQuant", "smoothquant", (n,), f"activations {n}")
    ),
    *best("SmoothQuant", "smoothquant", (8, 6, 4)),
    *(
        row
        for n in (6, 4)
        for row in rows("OmniQuant", "omniquant", (n,), f"activations {n}", a_bits=n, group_size=-1)
    ),
    *(
        row
        for n in (8, 4)
        for row in rows("SpinQuant", "spinquant", (4,), f"activations {n}", a_bits=n)
    ),
    *rows("SpinQuant", "spinquant", (4,), "activations and cache 4", a_bits=4, kv_bits=4),
]


def score(args: dict[str, object], cache: str) -> tuple[float, float, dict[str, object], float]:
    """(perplexity, accuracy, what was scored, CPU seconds to load or quantize) of one row."""
    from lm_eval.models import huggingface  # noqa: F401 (registers what the hook extends)

    from llq_hf.hosts.lm_eval_model import LLQLM

    started = time.process_time()
    model = LLQLM(pretrained="demo", cache_dir=cache, batch_size=16, device="cpu", **args)  # type: ignore[arg-type]
    seconds = time.process_time() - started
    found = lm_eval.simple_evaluate(model=model, tasks=["llq_demo"], verbosity="ERROR")
    results = found["results"]
    ppl = results["llq_demo_ppl"]["token_perplexity,none"]
    return ppl, results["llq_demo_mc"]["acc,none"], model.get_model_info()["llq"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--part", default="1/1", help="I/N: every N-th row from the I-th on, to share out the work"
    )
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    lines = [
        "| | nominal bits | stored bits | perplexity | accuracy | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, options in ROWS[part - 1 :: parts]:
            if args.only not in name:
                continue
            ppl, accuracy, info, seconds = score(options, cache)
            nominal, stored = info.get("nominal_bits"), info.get("stored_bits")
            packed = isinstance(nominal, float) and isinstance(stored, float)
            bits = f"{nominal:g} | {stored:.3f}" if packed else "16 | 16"
            lines.append(
                f"| {name} | {bits} | {ppl:.3f} | {100 * accuracy:.1f} % | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    lines.append(f"\nCPU, {torch.get_num_threads()} threads, torch {torch.__version__}.")
    print(lines[-1])
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
