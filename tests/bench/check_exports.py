"""Checks the `gptq` and `awq` exports of the demo model: GPTQModel's logits beside our own.

    python tests/bench/check_exports.py [--environment /tmp/llq-gptqmodel]

GPTQModel cannot be installed beside lmms-eval, so uv makes an environment for it (6 GB) unless it
is there. The script runs on the CPU. It prints the largest difference of a logit in fp32
arithmetic, next to the spread of the logits, and fails where the difference is more than what
rounding scales to fp16 once more explains.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

PACKAGES = ["gptqmodel>=7.7", "optimum", "transformers==5.23.0"]
CASES = {
    "gptq-4bit": ("gptq", ["--method", "gptq", "--bits", "4"]),
    "gptq-4bit-act-order": ("gptq", ["--method", "gptq", "--bits", "4", "--act-order"]),
    "gptq-3bit": ("gptq", ["--method", "gptq", "--bits", "3"]),
    "rtn-2bit": ("gptq", ["--method", "rtn", "--bits", "2", "--group-size", "32"]),
    "rtn-8bit-symmetric": ("gptq", ["--method", "rtn", "--bits", "8", "--sym"]),
    "rtn-4bit": ("awq", ["--method", "rtn", "--bits", "4"]),
    "awq-4bit": ("awq", ["--method", "awq", "--bits", "4", "--group-size", "64"]),
}
CALIBRATION = ["--calibration-samples", "16"]
LOGITS = """
import sys
import torch
from safetensors.torch import save_file
{imports}
with torch.no_grad():
    logits = model(torch.arange(2, 66)[None]).logits.float().contiguous()
save_file({{"logits": logits}}, sys.argv[2])
"""
OURS = LOGITS.format(
    imports="from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()"
)
THEIRS = LOGITS.format(
    imports="from gptqmodel import BACKEND, GPTQModel\n"
    "backend = BACKEND.TORCH_AWQ if sys.argv[3] == 'awq' else BACKEND.TORCH\n"
    "how = {'backend': backend, 'device': 'cpu', 'dtype': torch.float16}\n"
    "model = GPTQModel.load(sys.argv[1], **how).model.eval()"
)
TOLERANCE = 0.02  # of the logits' standard deviation: GPTQModel computes in fp16


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


def environment(folder: Path, packages: list[str]) -> Path:
    """The interpreter of an environment with these packages, which uv makes unless it is there."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(
            "uv",
            "venv",
            "--quiet",
            "--python",
            f"{sys.version_info[0]}.{sys.version_info[1]}",
            folder,
        )
        # From there: in a folder of this project uv would hold it to this project's tested
        # versions.
        run("uv", "pip", "install", "--quiet", "--directory", folder, "--python", python, *packages)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, default=Path("/tmp/llq-gptqmodel"))
    python, failed = environment(parser.parse_args().environment, PACKAGES), []
    for name, (form, options) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            packed, exported = Path(scratch) / "packed", Path(scratch) / "exported"
            run(
                sys.executable,
                "-m",
                "llq_hf",
                "quantize",
                "demo",
                packed,
                *options,
                *CALIBRATION,
                "--device",
                "cpu",
            )
            run(sys.executable, "-m", "llq_hf", "export", packed, exported, "--format", form)
            run(sys.executable, "-c", OURS, packed, packed / "logits")
            run(python, "-c", THEIRS, exported, exported / "logits", form)
            ours, theirs = (load_file(folder / "logits")["logits"] for folder in (packed, exported))
        off = float((ours - theirs).abs().max() / ours.std())
        print(f"{name} as {form}: largest difference {off:.5f} of the logits' spread", flush=True)
        failed += [name] if not off < TOLERANCE or not torch.isfinite(theirs).all() else []
    sys.exit(f"not ours: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
