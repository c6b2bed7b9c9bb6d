"""Text or image-text pairs: which one should a model that sees be calibrated on? Measured on the
demo VLM.

    uv run --extra vision python tests/bench/vlm_calibration.py [--out FILE.md] [--samples 128]

Every method at every width is calibrated three times: on windows of the demo's own text, 256 tokens
each; on as many pairs of a drawing and a question with its answer, whose visual tokens then take
part in the statistics; and on as many pairs as have about as many tokens as the text. Accuracy is
that of all of `llq_demo_vqa`, through lmms-eval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from demo_vlm_table import score
from lmms_eval.tasks import TaskManager

from llq_hf.demo import drawings

PAIRS_A_WINDOW = 6  # a pair has 24 visual tokens and about 20 of text
METHODS = ("gptq", "awq", "slim_llm", "quip")
WIDTHS = (4, 3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of text")
    args = parser.parse_args()
    manager = TaskManager(model_name="llq")
    lines = ["| | text | as many pairs | pairs of as many tokens |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        many = PAIRS_A_WINDOW * args.samples
        pairs = str(drawings.write_pairs(Path(scratch) / "pairs", many))
        sources: list[dict[str, object]] = [
            {"calibration_samples": args.samples},
            {"calibration_samples": args.samples, "calibration": pairs},
            {"calibration_samples": many, "calibration": pairs},
        ]
        for method in METHODS:
            for bits in WIDTHS:
                options: dict[str, object] = {"method": method, "bits": bits}
                shares = [score(manager, options | source, scratch)[0][-1] for source in sources]
                lines.append(
                    f"| {method}, {bits} bits | "
                    + " | ".join(f"{100 * share:.1f} %" for share in shares)
                    + " |"
                )
                print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
