"""Measures what the start-up hook adds to every Python process of an environment.

    uv run python tests/bench/startup_cost.py [--processes 15]

It prints the median over fresh processes, in microseconds, by `-X importtime`, of `llq_hf._startup`
with its package and all that they import. The aim is 500.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys


def microseconds() -> int:
    command = [sys.executable, "-X", "importtime", "-c", "pass"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"^import time:\s+\d+ \|\s+(\d+) \|\s+llq_hf\._startup$", text, re.MULTILINE)
    if found is None:
        sys.exit("llq-hf's hook is not installed in this environment, or LLQ_DISABLE is set")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=15)
    count = parser.parse_args().processes
    print(
        f"start-up: median {statistics.median(microseconds() for _ in range(count)):.0f} us "
        f"of {count} processes"
    )


if __name__ == "__main__":
    main()
