"""Loads and runs thousands of damaged checkpoints of every method, in processes that may crash.

    python tests/bench/fuzz_checkpoints.py --cases 3000
    python tests/bench/fuzz_checkpoints.py --cases 3000 --sanitize

--sanitize builds the kernels with AddressSanitizer and UBSan, which report every stray read and
every overflow; whole checkpoints are run first, and must give no report. All instruction sets that
this processor has take turns. It prints a table of what came of the cases, and exits with 1 where
one crashed, hung, failed inside llq_hf, or passed for a whole checkpoint though every tensor was
compared. A case is a number: --first N --cases 1 runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]
AT_ONCE = 100  # cases of one process
SECONDS = 100  # for one case, or to begin
# Cases before all others: whole checkpoints, which must give no report, and a read behind the end
# of a tensor, which must.
WHOLE, STRAY = -1, -2
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-g"]
REPORTS = ("AddressSanitizer", "runtime error:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--work", type=Path, help="keep checkpoints and kernels here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.work, given.first, given.cases)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(parent(work, given.first, given.cases, given.sanitize))


def parent(work: Path, first: int, cases: int, sanitize: bool) -> int:
    """Run all cases; the exit status."""
    prepare(work)
    isas = build(work) if sanitize else [""]
    log = work / "outcomes.jsonl"
    log.unlink(missing_ok=True)
    faults: list[str] = []
    if sanitize:
        for isa in isas:
            faults += spawn(work, WHOLE, 1, isa, sanitize)
        if not spawn(work, STRAY, 1, isas[0], sanitize):
            faults.append("a stray read was not reported: the sanitizers do not work here")
    log.unlink(missing_ok=True)
    at = first
    while at < first + cases:
        count = min(AT_ONCE, first + cases - at)
        faults += spawn(work, at, count, isas[at // AT_ONCE % len(isas)], sanitize)
        at = 1 + max(line["number"] for line in outcomes(log))  # of a crash, the case behind it
    report(log, faults)
    return 1 if faults or any(line["wrong"] for line in outcomes(log)) else 0


def outcomes(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def spawn(work: Path, first: int, count: int, isa: str, sanitize: bool) -> list[str]:
    """Run cases in a process; what it did wrong as a process: crashes, hangs, reports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if isa:
        environment["LLQ_CPU_ISA"] = isa
    if sanitize:
        find = "-print-file-name=lib{}.so"
        libraries = [output("g++", find.format(name)) for name in ("asan", "ubsan")]
        environment |= {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",
            "LLQ_FUZZ_KERNELS": str(work / "kernels"),
        }
    command = [sys.executable, str(HERE), "--child", "--work", str(work)]
    command += ["--first", str(first), "--cases", str(count)]
    current = work / "current"
    current.write_text(f"{first} begins")
    with (work / "stderr.txt").open("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
        hung = False
        seen, since = "", time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if current.read_text() != seen:
                seen, since = current.read_text(), time.monotonic()
            if time.monotonic() - since > SECONDS * (4 if sanitize else 1):
                hung = True
                process.kill()
        errors.seek(0)
        text = errors.read()
    faults = [line for line in text.splitlines() if any(each in line for each in REPORTS)]
    if hung:
        faults.append("hung")
    elif process.returncode and not faults:
        faults.append(f"exit status {process.returncode}: {text[-600:]}")
    number = (current.read_text() or str(first)).split()[0]  # it may be killed while it writes
    if faults:
        (work / f"report-{number}.txt").write_text(text)
        if process.returncode:
            with (work / "outcomes.jsonl").open("a") as log:
                lost = {"number": int(number), "what": "crashed or hung", "wrong": True}
                log.write(json.dumps({**lost, "change": "", "mode": "", "text": faults[0]}) + "\n")
    return [f"case {number} {isa}: {fault}" for fault in faults]


def child(work: Path, first: int, cases: int) -> None:
    """Run cases in this process, and write down each outcome; case -1: whole checkpoints."""
    import torch
    import transformers
    from contract.fuzz import Variant, is_wrong, run, run_case

    from llq_hf.kernels import build as building

    if kernels := os.environ.get("LLQ_FUZZ_KERNELS"):
        building.PACKAGED = Path(kernels)
        from llq_hf.kernels import native

        native.PACKAGED = Path(kernels)
        assert native.backend() is not None, "the sanitized kernels were not found"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = sorted(folder.parent for folder in work.glob("[0-9]*/config.json"))
    if first == STRAY:
        read_behind_the_end()
    if first == WHOLE:
        for folder in folders:
            (work / "current").write_text(f"{WHOLE} {folder.name}")
            run(folder)
    if first < 0:
        return
    # Their logits by the kernels of this process: others sum in another order.
    variants = [Variant(folder.name, folder, run(folder)) for folder in folders]
    for number in range(first, first + cases):
        (work / "current").write_text(str(number))
        found = run_case(number, variants, work / "scratch")
        line = {**vars(found), "wrong": is_wrong(found)}
        with (work / "outcomes.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def read_behind_the_end() -> None:
    """Decode more columns than a weight has, past the check that refuses it."""
    from unittest import mock

    import torch

    from llq_hf.kernels import Part, UniformCodes, native, views

    weight = torch.zeros(8, 4, dtype=torch.int32)
    with mock.patch.object(views, "check_view"):
        view = UniformCodes(weight, 640, (Part(8, 640),), 1.0, 0.0, 640)
    native.decode(view, 0, 8, torch.empty(8, 640))


def prepare(work: Path) -> None:
    """Make the whole checkpoints, unless `work` holds them from before."""
    if (work / "made").is_file():
        return
    import numpy
    import torch
    from conftest import make_llama
    from contract.fuzz import SIZES, make_variants

    base = make_llama(work / "base", **SIZES)
    random = torch.Generator().manual_seed(1)
    numpy.save(work / "ids.npy", torch.randint(2, 320, (8, 32), generator=random).numpy())
    make_variants(base, work / "ids.npy", work)
    (work / "made").touch()


def build(work: Path) -> list[str]:
    """Build the kernels with sanitizers; the instruction sets that this processor has."""
    from llq_hf.kernels import build as building
    from llq_hf.kernels import native

    folder = work / "kernels"
    folder.mkdir(exist_ok=True)
    flags = [each for each in building.FLAGS if "static-lib" not in each and each != "-O3"]
    for isa in native.supported():
        target = building.library(folder, isa)
        source = str(building.SOURCES / "cpu.cpp")
        command = [
            "g++",
            "-O1",
            *flags,
            *SANITIZERS,
            *building.ISAS[isa],
            source,
            "-o",
            str(target),
        ]
        if not target.is_file():
            subprocess.run(command, check=True)
    return native.supported()


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def report(log: Path, faults: list[str]) -> None:
    lines = outcomes(log)
    counts = Counter((line["mode"], line["what"]) for line in lines)
    print(f"{len(lines)} cases")
    for (mode, what), count in sorted(counts.items()):
        print(f"  {mode:10} {what:24} {count}")
    theirs = Counter(
        line["text"].partition(":")[0] for line in lines if "transformers" in line["what"]
    )
    print("  errors of transformers:", dict(theirs.most_common()))
    unseen = Counter(
        line["change"].partition(":")[0]
        for line in lines
        if line["mode"] == "quick" and line["what"] in ("changed", "not finite")
    )
    print("  passed unseen at a quick load:", dict(unseen))
    for line in lines:
        if line["wrong"]:
            print(line)
    for fault in faults:
        print(fault)


if __name__ == "__main__":
    if shutil.which("g++") is None and "--sanitize" in sys.argv:
        sys.exit("--sanitize needs g++")
    main()
