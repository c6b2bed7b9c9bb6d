"""Text or image-text pairs: which one should a model that sees be calibrated on? Measured on the demo VLM.

    uv run --extra vision python bench/vlm_calibration.py [--out FILE.md] [--samples 128]

Every method at every width is calibrated twice, on the same number of sequences: windows of the demo's own text, and
pairs of a drawing and a question with its answer, whose visual tokens then take part in the statistics. Accuracy is
that of all of `llq_demo_vqa`, through lmms-eval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from demo_vlm_table import score
from lmms_eval.tasks import TaskManager

from llq_hf.demo import drawings

METHODS = ("gptq", "awq", "slim_llm", "quip")
WIDTHS = (4, 3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of either kind")
    args = parser.parse_args()
    manager = TaskManager(model_name="llq")
    lines = ["| | text | image-text pairs |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = str(drawings.write_pairs(Path(scratch) / "pairs", args.samples))
        for method in METHODS:
            for bits in WIDTHS:
                options: dict[str, object] = {"method": method, "bits": bits, "calibration_samples": args.samples}
                text, images = (score(manager, options | data, scratch)[0][-1] for data in ({}, {"calibration": pairs}))
                lines.append(f"| {method}, {bits} bits | {100 * text:.1f} % | {100 * images:.1f} % |")
                print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
