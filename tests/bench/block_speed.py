"""Measures how long GPTQ takes for one block of LLaMA-3-8B's shape, here and in other tools.

    python tests/bench/block_speed.py [--samples 16] [--length 2048] [--threads 2]
        [--peers llmcompressor,gptqmodel]

All tools get the same random checkpoint of one block and the same random token ids; 4 bits, groups
of 128, on the CPU. Each runs as a process of its own, the peers in environments that uv makes for
them (6 GB each). The whole process counts: loading, quantizing and saving. It prints the seconds of
the clock and of the processor, and ratios of the latter to ours, which are the fairer ones on a
machine with other work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from environments import GPTQMODEL, environment
from streaming_memory import make_checkpoint

PACKAGES = {"llmcompressor": ["llmcompressor>=0.14"], "gptqmodel": GPTQMODEL}
IDS = """
import sys
import numpy as np
model_path, out, ids = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
"""
PROGRAMS = {
    "llmcompressor": IDS
    + """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="bfloat16")
rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
how = {"targets": "Linear", "scheme": "W4A16_ASYM", "ignore": ["lm_head"]}
recipe = GPTQModifier(**how, dampening_frac=0.01)
size = {"max_seq_length": ids.shape[1], "num_calibration_samples": len(ids)}
oneshot(model=model, dataset=rows, recipe=recipe, **size)
model.save_pretrained(out)
""",
    "gptqmodel": IDS
    + """
from gptqmodel import GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=4, group_size=128, sym=False, damp_percent=0.01, device="cpu")
model = GPTQModel.load(model_path, config)
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
model.quantize(rows, batch_size=1)
model.save(out)
""",
}


def timed(command: Sequence[str | Path], log: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processor; exits with the log's end where it fails."""
    started = time.perf_counter()
    with log.open("wb") as file:
        # Some write logs
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{command[0]} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="llmcompressor,gptqmodel")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    args = parser.parse_args()
    # On two cores it picks one, which its own check refuses
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Passive: waiting must not count as the time of the processor.
    os.environ.update(
        OMP_NUM_THREADS=str(args.threads), OMP_WAIT_POLICY="PASSIVE", CUDA_VISIBLE_DEVICES=""
    )
    with tempfile.TemporaryDirectory(prefix="llq-block-") as name:
        root = Path(name)
        make_checkpoint(root / "model", 1, args.hidden, args.ffn, vocab=1024)
        np.save(
            root / "ids.npy",
            np.random.default_rng(0).integers(0, 1024, (args.samples, args.length)),
        )
        ours = [
            sys.executable,
            "-m",
            "llq_hf",
            "quantize",
            str(root / "model"),
            str(root / "llq"),
            "--method",
            "gptq",
        ]
        ours += [
            "--bits",
            "4",
            "--calibration",
            str(root / "ids.npy"),
            "--calibration-samples",
            str(args.samples),
        ]
        commands = {"llq": [*ours, "--device", "cpu"]}
        for peer in filter(None, args.peers.split(",")):
            files = [str(root / "model"), str(root / peer), str(root / "ids.npy")]
            python = environment(Path(tempfile.gettempdir()) / f"llq-{peer}", PACKAGES[peer])
            commands[peer] = [str(python), "-c", PROGRAMS[peer], *files]
        size = f"hidden {args.hidden}, ffn {args.ffn}, {args.samples} x {args.length} tokens"
        shape = f"{size}, {args.threads} threads"
        print(f"GPTQ, 4 bits, groups of 128, one block: {shape}\n")
        print("| tool | clock | processor | ratio |\n|---|---|---|---|")
        base = 0.0
        for tool, command in commands.items():
            clock, processor = timed(command, root / f"{tool}.log")
            base = base or processor
            print(
                f"| {tool} | {clock:.0f} s | {processor:.0f} s | {processor / base:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
