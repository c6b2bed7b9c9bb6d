"""Text or image-text pairs: which one should a model that sees be calibrated on? Measured on the demo VLM.

    uv run --extra vision python bench/vlm_calibration.py [--out FILE.md] [--samples 128]

Every method at every width is calibrated twice, on the same number of sequences: windows of the demo's own text, and
pairs of a drawing and a question with its answer, whose visual tokens then take part in the statistics. Accuracy is
that of `llq_demo_vqa`, through lmms-eval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from llq_hf.demo import drawings
from llq_hf.lmms_eval import LLQ

METHODS = ("gptq", "awq", "slim_llm", "quip")
WIDTHS = (4, 3, 2)


def accuracy(manager: TaskManager, **model_args: object) -> float:
    """Share of right answers of one model."""
    model = LLQ(pretrained="demo-vlm", device="cpu", batch_size=32, **model_args)
    found = simple_evaluate(
        model=model, tasks=["llq_demo_vqa"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )
    halves = {task: result for task, result in found["results"].items() if "accuracy,none" in result}
    sizes = {task: found["n-samples"][task]["effective"] for task in halves if task in found["n-samples"]}
    return float(sum(halves[task]["accuracy,none"] * size for task, size in sizes.items()) / sum(sizes.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of either kind")
    args = parser.parse_args()
    manager = TaskManager(model_name="llq")
    lines = ["| | text | image-text pairs |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = drawings.write_pairs(Path(scratch) / "pairs", args.samples)
        for method in METHODS:
            for bits in WIDTHS:
                options = {"method": method, "bits": bits, "cache_dir": f"{scratch}/cache"}
                options["calibration_samples"] = args.samples
                scores = [accuracy(manager, **options, **data) for data in ({}, {"calibration": str(pairs)})]
                lines.append(f"| {method}, {bits} bits | {scores[0]:.1%} | {scores[1]:.1%} |")
                print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
