"""Checks that `llq finetune`, killed and repeated, makes the same adapter as an unbroken run.

    python tests/bench/kill_finetune.py [--steps 120] [--save-steps 20] [--kills 3]

It trains on NF4 of the bundled demo model and its own questions, on the CPU. Each kill (SIGKILL)
comes when a checkpoint has just appeared; the kills are spread over the run. It exits with 1 where
a byte differs.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPARED = ("adapter_model.safetensors", "adapter_config.json", "llq_adapter.json")
RECIPE = [
    "--data",
    "demo",
    "--micro-batch",
    "16",
    "--rank",
    "16",
    "--heldout",
    "64",
    "--no-recompute",
]


def llq(*words: object) -> list[str]:
    return [sys.executable, "-m", "llq_hf", *map(str, words)]


def finish(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-3000:]}")


def kill_at(command: list[str], checkpoint: Path) -> None:
    """Start, or go on, until `checkpoint` is there; then SIGKILL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.exists():
        if process.poll() is not None:
            sys.exit(
                f"{' '.join(command)} ended with {process.returncode} "
                f"before {checkpoint.name} was there"
            )
        time.sleep(0.02)
    process.kill()
    process.wait()


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in COMPARED}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    saves = args.steps // args.save_steps - 1  # what is saved last is the adapter itself
    options = [*RECIPE, "--max-steps", args.steps, "--save-steps", args.save_steps]
    with tempfile.TemporaryDirectory(prefix="llq-kill-") as folder:
        base, whole, killed = (Path(folder) / name for name in ("base", "whole", "killed"))
        finish(llq("quantize", "demo", base, "--method", "nf4"))
        finish(llq("finetune", base, whole, *options))
        for kill in range(args.kills):
            step = (1 + kill * (saves - 1) // max(args.kills - 1, 1)) * args.save_steps
            kill_at(
                llq("finetune", base, killed, *options),
                killed.with_name("killed.training") / f"checkpoint-{step}",
            )
            print(
                f"killed when the checkpoint of step {step} of {args.steps} had appeared",
                flush=True,
            )
        finish(llq("finetune", base, killed, *options))
        wanted, found = digests(whole), digests(killed)
    differing = [name for name in COMPARED if wanted[name] != found[name]]
    print(f"DIFFERS: {', '.join(differing)}" if differing else "resumed to the same bytes")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
