"""Makes the cards of the demo checkpoints in `model_cards/`: quantize, score, `llq card`.

    python tests/bench/demo_cards.py [--out model_cards]

It takes about two minutes on one core. A card changes when the code, the demo model or the last
digit of a sum does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKPOINTS = {
    "demo-gptq-4bit": ["--method", "gptq", "--bits", "4", "--preset", "best"],
    "demo-quip-2bit": ["--method", "quip", "--bits", "2"],
}


def llq(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "llq_hf", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "model_cards")
    out = parser.parse_args().out.resolve()
    for name, options in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            llq("quantize", "demo", folder, *options, "--device", "cpu")
            llq(
                "eval",
                folder,
                "--tasks",
                "llq_demo",
                "--batch_size",
                16,
                "--output_path",
                folder / "results",
            )
            llq("card", folder, "--out", out / f"{name}.md")


if __name__ == "__main__":
    main()
