"""The table of README's "The demo VLM": methods and widths on the bundled demo VLM, through
lmms-eval.

    uv run --extra vision python tests/bench/demo_vlm_table.py [--out FILE.md] [--only WORDS]

Each row is `lmms-eval --model llq --model_args pretrained=demo-vlm,method=...,bits=... --tasks
llq_demo_vqa`, in one process. CPU; calibration on the text of the questions, which is the default
for this model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from llq_hf.hosts.lmms_eval_model import LLQ

Row = tuple[str, dict[str, object]]


def rows(title: str, method: str, widths: tuple[int, ...], **options: object) -> list[Row]:
    """A method at several widths, widest first, with the study's settings and with `preset=best`."""
    presets: dict[str, dict[str, object]] = {"": {}, ", `preset=best`": {"preset": "best"}}
    return [
        (f"{title}, {bits} bits{words}", {"method": method, "bits": bits, **preset, **options})
        for words, preset in presets.items()
        for bits in widths
    ]


ROWS: list[Row] = [
    ("full precision", {"method": "none"}),
    *rows("RTN", "rtn", (4, 3, 2)),
    *rows("GPTQ", "gptq", (4, 3, 2)),
    *rows("AWQ", "awq", (4, 3, 2)),
    *rows("SliM-LLM", "slim_llm", (4, 3, 2)),
    *rows("QuIP", "quip", (4, 3, 2)),
]


def score(
    manager: TaskManager, options: dict[str, object], cache: str
) -> tuple[list[float], dict[str, object]]:
    """(accuracy of perception, of cognition, and of all questions; what was scored) of one row."""
    model = LLQ(pretrained="demo-vlm", device="cpu", batch_size=32, cache_dir=cache, **options)
    found = simple_evaluate(
        model=model,
        tasks=["llq_demo_vqa"],
        task_manager=manager,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    halves = [f"llq_demo_vqa_{half}" for half in ("perception", "cognition")]
    accuracy = [found["results"][half]["accuracy,none"] for half in halves]
    sizes = [found["n-samples"][half]["effective"] for half in halves]
    total = sum(share * size for share, size in zip(accuracy, sizes, strict=True)) / sum(sizes)
    return [*accuracy, total], found["llq"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    manager = TaskManager(model_name="llq")
    lines = [
        "| | nominal bits | stored bits | perception | cognition | all |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, options in ROWS:
            if args.only not in name:
                continue
            accuracy, info = score(manager, options, cache)
            nominal, stored = info.get("nominal_bits"), info.get("stored_bits")
            packed = isinstance(nominal, float) and isinstance(stored, float)
            bits = f"{nominal:g} | {stored:.3f}" if packed else "16 | 16"
            lines.append(
                f"| {name} | {bits} | "
                + " | ".join(f"{100 * share:.1f} %" for share in accuracy)
                + " |"
            )
            print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
