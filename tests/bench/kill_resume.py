"""Checks that `llq quantize`, killed and repeated, writes the same bytes as an unbroken run.

    python tests/bench/kill_resume.py               the bundled demo, GPTQ at 3 bits
    python tests/bench/kill_resume.py --model FOLDER --method quip --bits 2 --calibration ids.npy

The kills (SIGKILL, `--kills` of them) are spread over the whole run, one at random in each of as
many equal parts: from the moment the run's journal appears, before which nothing is on disk, to
that of its config.json, which is written last. It exits with 1 where a single byte differs.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005


@dataclass
class Run:
    """A finished process.

    seconds: in all. work_seconds: from its journal to its config.json. killed: before that.
    """

    seconds: float
    work_seconds: float
    killed: bool


def run(command: list[str], out: Path, kill_after: float | None = None) -> Run:
    """Run `command`; kill it `kill_after` seconds after its journal appeared, if not yet done."""
    started = time.perf_counter()
    appeared = done = None
    journal, last = journal_of(out), out / "config.json"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if appeared is None and journal.is_file():
                    appeared = now
                if done is None and last.is_file():
                    done = now
                if kill_after is not None and appeared is not None and now - appeared >= kill_after:
                    process.kill()
                    break
                time.sleep(POLL_SECONDS)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
        if code not in (0, -9):
            log.seek(0)
            sys.exit(
                f"{' '.join(command)} ended with {code}:\n"
                f"{log.read().decode(errors='replace')[-3000:]}"
            )
    ended = time.perf_counter()
    return Run(
        ended - started, (done or ended) - (appeared or ended), code == -9 and not last.is_file()
    )


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal.jsonl")


def digests(out: Path) -> dict[str, str]:
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


def finished_blocks(journal: Path) -> int:
    """Whole lines of the journal after its head."""
    count = 0
    for line in journal.read_text().splitlines()[1:]:
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--calibration", help="default: that of llq (demo: its own text)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)

    options = ["--method", arguments.method, "--bits", str(arguments.bits), "--device", "cpu"]
    options += ["--calibration-samples", str(arguments.samples)]
    options += ["--calibration", arguments.calibration] if arguments.calibration else []

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "llq_hf", "quantize", arguments.model, str(out), *options]

    with tempfile.TemporaryDirectory(prefix="llq-kill-") as folder:
        unbroken = Path(folder) / "unbroken"
        whole = run(command(unbroken), unbroken)
        wanted = digests(unbroken)
        print(f"llq quantize {arguments.model} OUT {' '.join(options)}")
        print(
            f"unbroken: {whole.seconds:.1f} s, {whole.work_seconds:.2f} s of them work, "
            f"{len(wanted)} files"
        )
        print(
            f"{'kill':>4} {'after s':>8} {'blocks done':>11} {'files':>5} {'resumed in s':>12}"
            "  result",
            flush=True,
        )
        wrong = 0
        for index in range(arguments.kills):
            out = Path(folder) / f"killed-{index}"
            journal = journal_of(out)
            moment = whole.work_seconds * (index + draw.random()) / arguments.kills
            tries = 0
            while not run(command(out), out, moment).killed:  # it was faster, and finished
                for file in (*out.iterdir(), journal):
                    file.unlink()
                moment *= 0.8
                if (tries := tries + 1) == 10:
                    sys.exit("the run is too short to be killed; give a larger --samples")
            blocks = finished_blocks(journal)
            files = len(list(out.iterdir())) if out.is_dir() else 0
            again = run(command(out), out)
            found = digests(out)
            differing = sorted(
                name for name in {*wanted, *found} if wanted.get(name) != found.get(name)
            )
            wrong += bool(differing)
            result = f"DIFFERS: {', '.join(differing)}" if differing else "same bytes"
            row = f"{index + 1:4d} {moment:8.2f} {blocks:11d} {files:5d} {again.seconds:12.1f}"
            row += f"  {result}"
            print(row, flush=True)
    print(f"{arguments.kills - wrong} of {arguments.kills} killed runs resumed to the same bytes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
