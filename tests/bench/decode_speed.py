"""Measures whole decoding steps from packed weights beside bf16, in the shape of LLaMA-3-8B.

    python tests/bench/decode_speed.py [--methods rtn:4,rtn:2] [--blocks 4] [--threads 1]

It makes a random checkpoint (436 MB a block; the vocabulary is small, as heads stay dense anyway),
quantizes it and calls `llq bench`: attention, norms and Python count as they do in use. It also
prints sizes: the loaded weights should be as large as the file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from streaming_memory import make_checkpoint

LLQ = [sys.executable, "-m", "llq_hf"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="rtn:4,rtn:2")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="llq-decode-") as name:
        root = Path(name)
        make_checkpoint(root / "model", args.blocks, args.hidden, args.ffn, vocab=1024)
        packed = []
        for named in args.methods.split(","):
            method, bits = named.split(":")
            packed.append(str(root / f"{method}-{bits}"))
            command = [
                *LLQ,
                "quantize",
                str(root / "model"),
                packed[-1],
                "--method",
                method,
                "--bits",
                bits,
            ]
            calibration = ["--calibration", str(root / "ids.npy"), "--calibration-samples", "4"]
            subprocess.run([*command, *calibration], check=True)
        batches = ["--batches", "1,8", "--rounds", "3"]
        subprocess.run(
            [*LLQ, "bench", *packed, "--base", str(root / "model"), *batches], check=True
        )


if __name__ == "__main__":
    main()
