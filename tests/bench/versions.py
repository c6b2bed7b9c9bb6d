"""Runs the core tests on other versions than CI's: the lowest that pyproject.toml allows, the
newest there are, and transformers from its lower bound on.

    python tests/bench/versions.py lowest newest [--python 3.11 3.13] [--folder DIR]
    python tests/bench/versions.py 5.18 5.20 5.22 [--python 3.11]

Each case is an environment that uv makes, with a clone of HEAD, outside of this repository: no
constraint of pyproject.toml holds there. A case "5.20" is the lowest of everything, and the newest
transformers 5.20. The table has versions, and tests passed and failed; DIR/CASE-PYTHON.log has what
they printed. The exit status says whether all passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import UV

ROOT = Path(__file__).parents[2]
TOOLS = ["pytest>=9.0", "pytest-xdist>=3.6"]
# What a user does first: quantize, load, check, score, by two methods that need no more packages.
CORE = ["tests/contract", "tests/checkpoints", "tests/cli", "tests/hosts/test_lm_eval.py"]
ONLY = "rtn or gptq or not contract"
SHOWN = ["torch", "transformers", "lm_eval", "accelerate", "huggingface_hub", "numpy"]
VERSIONS = """
import importlib.metadata, json, platform
print(json.dumps([platform.python_version(), *map(importlib.metadata.version, {})]))
"""


def environment(folder: Path, case: str, python: str) -> Path:
    """The interpreter of a new environment, with the code in folder/src."""
    subprocess.run([*UV, "venv", "--quiet", "--python", python, folder / "venv"], check=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "src"], check=True)
    interpreter = folder / "venv" / "bin" / "python"
    install = [*UV, "pip", "install", "--quiet", "--python", interpreter]
    resolution = ["--resolution", "highest" if case == "newest" else "lowest-direct"]
    subprocess.run(
        [*install, *resolution, "-e", f"{folder / 'src'}[gguf]", *TOOLS], check=True, cwd=folder
    )
    if case not in ("newest", "lowest"):
        wanted = f"transformers~={case}.0"
        subprocess.run([*install, wanted], check=True, cwd=folder)
    return interpreter


def row(folder: Path, case: str, python: str) -> tuple[list[str], bool]:
    """A row of the table, and whether all tests passed."""
    name = f"{case}-{python.strip('/').replace('/', '-')}"
    place, log = folder / name, folder / f"{name}.log"
    try:
        interpreter = environment(place, case, python)
    except subprocess.CalledProcessError:
        return [case, python, *["cannot be installed"] * (len(SHOWN) + 1)], False
    versions = subprocess.run(
        [interpreter, "-c", VERSIONS.format(SHOWN)], check=True, capture_output=True, text=True
    )
    with log.open("w") as out:
        command = [interpreter, "-m", "pytest", *CORE, "-n", "0", "-k", ONLY, "-v"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=out, stderr=out, cwd=place / "src", env=environ)
    counts = re.findall(r"(\d+) (passed|failed|errors?)", log.read_text().splitlines()[-1])
    failed = sum(int(number) for number, what in counts if what != "passed")
    outcome = ", ".join(f"{number} {what}" for number, what in counts) or f"no result: see {log}"
    return [case, *json.loads(versions.stdout), outcome], bool(counts) and not failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", nargs="+", help="lowest, newest, or a minor of transformers")
    parser.add_argument(
        "--python", nargs="+", default=["3.11"], help="versions, or paths of interpreters"
    )
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="llq-versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    header = ["case", "Python", *SHOWN, "tests"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    sound = True
    for python in asked.python:
        for case in asked.case:
            cells, passed = row(folder, case, python)
            sound &= passed
            print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
