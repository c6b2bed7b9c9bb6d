"""`optimum-cli llq` is llq: it quantizes, and its errors and exit status are llq's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

from llq_hf.checkpoints.packed import read_report

CLI = Path(sys.executable).with_name("optimum-cli")
REGISTERED = "optimum/commands/register/register_llq.py"


@pytest.mark.skipif(
    not any(str(file) == REGISTERED for file in files("llq-hf") or []),
    reason="llq-hf is not installed with its files",
)
def test_optimum_cli_quantizes(tiny_llama, tmp_path):
    def optimum(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [str(CLI), "llq", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    options = ["--method", "rtn", "--bits", "3", "--group-size", "32", "--device", "cpu"]
    done = optimum("quantize", tiny_llama, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    config = read_report(tmp_path / "out")["identity"]["config"]
    assert (config["bits"], config["group_size"]) == (3, 32)
    wrong = optimum("quantize", tiny_llama, tmp_path / "no", "--method", "rnt")
    assert wrong.returncode == 1
    assert "rnt" in wrong.stderr
