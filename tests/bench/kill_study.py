"""Checks that `llq study`, killed and repeated, leaves the same records as an unbroken study.

    python tests/bench/kill_study.py [--methods rtn,gptq,quip,billm] [--bits 3,2] [--kills 3]

It runs on the bundled demo model and its own tasks, on the CPU. Each kill (SIGKILL) hits the study
and all its processes, two seconds into a cell. It compares everything in a record except time,
memory and machine: results, fingerprints, stored bits, what was refused and why. It exits with 1
where a record differs or is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_finetune import finish, llq

INTO_A_CELL = 2.0  # seconds
MEASURED = {"cost", "run", "seconds", "peak_bytes", "finished", "began", "added_bytes"}


def unmeasured(value: Any) -> Any:
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def records(out: Path) -> dict[str, Any]:
    return {
        file.name: unmeasured(json.loads(file.read_text()))
        for file in sorted((out / "records").glob("*.json"))
    }


def kill_after(command: list[str], out: Path, done: int) -> None:
    """Start or resume the study; kill it when `done` records are there and another cell runs."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, start_new_session=True, stdout=quiet, stderr=quiet)
    while len(list((out / "records").glob("*.json"))) < done:
        if process.poll() is not None:
            sys.exit(f"the study ended with {process.returncode} before its record number {done}")
        time.sleep(0.05)
    time.sleep(INTO_A_CELL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="rtn,gptq,quip,billm")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llq-kill-") as name:
        root = Path(name)
        whole, killed = root / "whole", root / "killed"
        options = [
            "--methods",
            args.methods,
            "--bits",
            args.bits,
            "--presets",
            "study,best",
            "--tasks",
            "llq_demo",
        ]
        command = llq("study", "--models", "demo", *options, "--batch-size", "16", "--out")
        os.environ["LLQ_CACHE"] = str(root / "whole-cache")
        finish([*command, str(whole)])
        wanted = records(whole)
        os.environ["LLQ_CACHE"] = str(root / "killed-cache")
        for kill in range(args.kills):
            done = (kill + 1) * len(wanted) // (args.kills + 1)
            kill_after([*command, str(killed)], killed, done)
            print(f"killed after {done} of {len(wanted)} records", flush=True)
        finish([*command, str(killed)])
        resumed = records(killed)
    names = wanted.keys() | resumed.keys()
    differing = [name for name in names if wanted.get(name) != resumed.get(name)]
    states = [record["status"] for record in wanted.values()]
    print(", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))
    print(f"DIFFERS: {', '.join(sorted(differing))}" if differing else "the same records")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
