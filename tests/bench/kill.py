"""Kills every kind of run with SIGKILL and repeats its command: the same set of the same bytes?

    python tests/bench/kill.py [--kills 200] [--only gptq,study] [--seed 0] [--blocks 3]

Runs of every method, of fine-tuning, of a study and of exports take turns, on a random Llama that
it makes. Each command runs unbroken once, and then again and again in a folder of its own: it is
killed, once or several times in succession, and repeated until it ends well. Half of the kills come
at a random moment of the run, the others at a random one of its operations on files. All that lies
in and beside the folder is compared with the unbroken run's, but for what tells of time, memory and
machine. It prints a line for each run that differs and a table in the end, and exits with 1 where
one differs. --keep FOLDER keeps logs and what differs.

Runs are children of a fork server that has imported everything. A study's cells run in its process.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
PRELOADED = [
    "kill",
    "llq_hf.cli",
    "llq_hf.common.terminal",
    "llq_hf.engine.execute",
    "llq_hf.export.convert",
    "llq_hf.finetune.trainer",
    "llq_hf.hosts.lm_eval_model",
    "llq_hf.study.cell",
    "lm_eval.tasks",
    "transformers.models.llama.modeling_llama",
]
SECONDS = 300  # for one run
METHODS: dict[str, str] = {  # variants, by what `llq quantize` is given
    "rtn": "--method rtn --bits 3 --group-size 64",
    "rtn, shards": "--method rtn --bits 4 --group-size 32",
    "gptq": "--method gptq --bits 3 --act-order",
    "gptq offload": "--method gptq --bits 3 --offload ROOT/offload",
    "gptq best": "--method gptq --bits 3 --preset best",
    "awq": "--method awq --bits 4",
    "smoothquant": "--method smoothquant --bits 8",
    "omniquant": "--method omniquant --bits 4 --epochs 2",
    "spinquant": "--method spinquant --bits 4",
    "spinquant learned": "--method spinquant --bits 4 --rotations learned --learn-steps 6",
    "quip": "--method quip --bits 2",
    "slim_llm": "--method slim_llm --bits 2 --group-size 64",
    "slim_llm+": "--method slim_llm --bits 2 --plus --epochs 2",
    "db_llm": "--method db_llm --steps 8",
    "pb_llm": "--method pb_llm --bits 1.7",
    "billm": "--method billm",
    "nf4 icq": "--method nf4 --bits 3 --icq",
    "efficient_qat": "--method efficient_qat --bits 2 --epochs 1 --tune-epochs 2",
    "hybrid": "--method hybrid --bits 2.8 --candidates rtn:2+rtn:3+rtn:4",
    "hybrid rules": "--method hybrid --rules "
    "*.layers.0.*=omniquant:4:epochs=2+*.down_proj=quip:2+*=gptq:3",
}
LORA = (
    "--max-steps 6 --save-steps 2 --rank 4 --micro-batch 2 --batch-size 4 --heldout 4"
    " --prompt-tokens 32 --answer-tokens 16 --no-recompute --device cpu"
)
TIMES = {  # what differs from run to run
    *("seconds", "peak_bytes", "added_bytes", "processor_seconds", "cost", "run", "finished"),
    *("began", "train_runtime"),
}


@dataclass(frozen=True)
class Variant:
    """A command. It ends well in a folder `root`, which is where it writes everything."""

    kind: str
    name: str
    words: Callable[[Path], list[str]]
    shards: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Unbroken:
    """What the run makes that nobody kills, how long it takes, and how often it touches files."""

    files: dict[str, str]
    seconds: float
    operations: int


# --- in the child ---------------------------------------------------------------------------------


def command(words: list[str], root: Path, shards: bool, kill_at: int | None) -> None:
    """`llq ...`, which kills itself at its file operation number `kill_at`; None counts them."""
    import torch

    import llq_hf.cli
    from llq_hf.checkpoints.shards import Shards
    from llq_hf.study import launch

    torch.set_num_threads(1)
    log = os.open(root.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ["LLQ_CACHE"] = str(root / "cache")
    if shards:
        Shards.limit_bytes = 200_000
    launch.local = _in_this_process  # type: ignore[assignment]
    count = _watch(str(root), kill_at)
    sys.argv = ["llq", *words]
    try:
        llq_hf.cli.main()
    finally:
        if kill_at is None:
            root.with_name("operations").write_text(str(count()))


def _in_this_process(cells: Sequence[Any], work: Any, out: Path, watcher: Any) -> Iterator[Any]:
    for cell in cells:
        watcher.cell(cell)
        yield work(cell, watcher)


def _watch(root: str, kill_at: int | None) -> Callable[[], int]:
    """Count operations on files under `root`, and kill this process before one of them."""
    count = 0

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not event.startswith(("open", "os.", "shutil.")):
            return
        if not any(
            isinstance(each, str | os.PathLike) and str(each).startswith(root) for each in arguments
        ):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    return lambda: count


# --- in the parent --------------------------------------------------------------------------------


class Killer:
    """Starts commands, kills them, and compares what they leave."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.root = work / "now" / "root"  # of all runs: names of folders are in some files
        warm_up = self.context.Process(target=_untimed, args=(HERE,))  # the server imports
        warm_up.start()
        warm_up.join()

    def unbroken(self, variant: Variant) -> Unbroken:
        self._clear()
        started = time.perf_counter()
        self._end(variant)
        seconds = time.perf_counter() - started
        operations = int(self.root.with_name("operations").read_text())
        return Unbroken(contents(self.root), seconds, operations)

    def killed(self, variant: Variant, whole: Unbroken, number: int) -> tuple[int, str]:
        """How many kills hit, and what differs in the end ("" for nothing)."""
        draw = random.Random(f"{self.seed} {variant.title} {number}")
        self._clear()
        hits = 0
        for _ in range(draw.choice([1, 1, 2, 3])):
            if draw.random() < 0.5:
                code = self._run(variant, seconds=draw.uniform(0, whole.seconds))
            else:
                code = self._run(variant, kill_at=draw.randint(1, whole.operations))
            hits += code == -signal.SIGKILL
        is_over = variant.kind == "export" and (self.root / "out").exists()
        if not is_over:  # an export refuses a folder that is there
            self._end(variant)
        return hits, difference(whole.files, contents(self.root))

    def _end(self, variant: Variant) -> None:
        code = self._run(variant)
        if code:
            log = self.root.with_name("log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{variant.title} ended with {code}:\n{log}")

    def _run(
        self, variant: Variant, seconds: float | None = None, kill_at: int | None = None
    ) -> int | None:
        words = variant.words(self.root)
        process = self.context.Process(
            target=command, args=(words, self.root, variant.shards, kill_at)
        )
        process.start()
        process.join(SECONDS if seconds is None else seconds)
        if process.is_alive():
            process.kill()
            process.join()
            if seconds is None:
                raise RuntimeError(f"{variant.title} went on for {SECONDS} s")
        return process.exitcode

    def _clear(self) -> None:
        shutil.rmtree(self.root.parent, ignore_errors=True)
        self.root.mkdir(parents=True)


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file by name, without what differs from run to run. Folders count as well."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            found[name + "/"] = ""
        elif name.startswith("cache/verified/") or name.endswith(".cost.json"):
            found[name] = "sizes and times"
        else:
            found[name] = hashlib.sha256(_untimed(path)).hexdigest()
    return found


def _untimed(path: Path) -> bytes:
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return "\n".join(json.dumps(_without_times(json.loads(line))) for line in lines).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in TIMES}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def difference(wanted: dict[str, str], found: dict[str, str]) -> str:
    words = [f"{name} is missing" for name in wanted if name not in found]
    words += [f"{name} is left over" for name in found if name not in wanted]
    words += [f"{name} differs" for name in found if found[name] != wanted.get(name, found[name])]
    return "; ".join(words)


# --- what is run ----------------------------------------------------------------------------------


def prepare(work: Path, blocks: int) -> list[Variant]:
    """Make the base, data, and packed checkpoints to train on and to export; all variants."""
    import numpy
    import torch
    from conftest import make_llama
    from contract.fuzz import SIZES

    from llq_hf.data.calibration import Calibration
    from llq_hf.engine.execute import quantize_checkpoint
    from llq_hf.methods import build

    base, ids = work / "base", work / "ids.npy"
    make_llama(base, **{**SIZES, "num_hidden_layers": blocks})
    numpy.save(ids, torch.randint(2, 320, (8, 32), generator=torch.Generator().manual_seed(1)))
    rows = [{"prompt": f"the fox {i}", "completion": f"ran {i % 7} times"} for i in range(64)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = Calibration(str(ids), samples=8, seqlen=32)
    for name, options in (("nf4", {}), ("gptq", {"bits": 4, "group_size": 32})):
        quantize_checkpoint(str(base), work / name, build(name, **options), calibration)
    calibrated = ["--calibration", str(ids), "--calibration-samples", "8", "--device", "cpu"]

    def variants() -> Iterator[Variant]:
        for name, options in METHODS.items():
            words = functools.partial(_words, ["quantize", str(base)], options.split() + calibrated)
            yield Variant("quantize", name, words, shards="shards" in name)
        data = [*LORA.split(), "--data", str(work / "rows.jsonl")]
        for name, method, model in (
            ("qlora", "qlora", work / "nf4"),
            ("ir_qlora", "ir_qlora", work / "nf4"),
            ("qlora, dense base", "qlora", base),
        ):
            more = ["--method", method, *data]
            yield Variant(
                "finetune", name, functools.partial(_words, ["finetune", str(model)], more)
            )
        study = (
            f"study --models {base} --methods rtn,gptq,quip --bits 3,9 --tasks llq_demo_ppl"
            " --limit 1 --no-speed --device cpu --out"
        )
        yield Variant("study", "sweep", functools.partial(_words, study.split(), []))
        for form in ("dense", "gptq", "compressed-tensors"):
            yield Variant(
                "export",
                form,
                functools.partial(_words, ["export", str(work / "gptq")], ["--format", form]),
            )

    return list(variants())


def _words(before: list[str], after: list[str], root: Path) -> list[str]:
    return [*before, str(root / "out"), *(word.replace("ROOT", str(root)) for word in after)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default="", help="variants whose names contain one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONWARNINGS="ignore:resource_tracker",  # semaphores of what was killed
    )
    with tempfile.TemporaryDirectory(prefix="llq-kill-") as scratch:
        work = (given.keep or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        only = given.only.split(",")
        variants = [
            each for each in prepare(work, given.blocks) if any(word in each.title for word in only)
        ]
        return run(Killer(work, given.seed), variants, given.kills, keep=given.keep is not None)


def run(killer: Killer, variants: list[Variant], kills: int, keep: bool) -> int:
    """Let the variants take turns until `kills` have hit; the exit status."""
    whole: dict[str, Unbroken] = {}
    hits: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    wrong: dict[str, list[str]] = defaultdict(list)
    started, number = time.perf_counter(), 0
    while hits.total() < kills:
        for variant in variants:
            title = variant.title
            if title not in whole:
                whole[title] = killer.unbroken(variant)
            try:
                hit, differing = killer.killed(variant, whole[title], number)
            except RuntimeError as error:
                hit, differing = 1, str(error)
            hits[title] += hit
            runs[title] += 1
            if differing:
                wrong[title].append(differing)
                print(f"DIFFERS: {title}, number {number}: {differing}", flush=True)
                if keep:
                    kept = killer.work / f"differs-{title.replace(' ', '-')}-{number}"
                    shutil.copytree(killer.root.parent, kept, dirs_exist_ok=True)
            minutes = (time.perf_counter() - started) / 60
            print(f"{hits.total()} of {kills} kills, {minutes:.1f} min: {title}", flush=True)
            if hits.total() >= kills:
                break
        number += 1
    print("\n| run | seconds | file operations | kills | repeated runs | not the same |")
    print("|---|---:|---:|---:|---:|---:|")
    for title, each in whole.items():
        print(
            f"| {title} | {each.seconds:.1f} | {each.operations} | {hits[title]} | {runs[title]} |"
            f" {len(wrong[title])} |"
        )
    differing_runs = sum(map(len, wrong.values()))
    print(f"\n{hits.total()} kills, {runs.total()} runs repeated, {differing_runs} not the same")
    return 1 if differing_runs else 0


if __name__ == "__main__":
    sys.exit(main())
