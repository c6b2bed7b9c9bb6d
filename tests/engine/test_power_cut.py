"""The power fails at any moment of a run: what is left loads as before, or not at all, and the same
command ends in the same bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common.power import MODES, Cut, Disk

from llq_hf.checkpoints.hashes import damage
from llq_hf.checkpoints.shards import Shards
from llq_hf.common import files
from llq_hf.common.files import append, copy, remove, write_json, write_text
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.export.convert import export
from llq_hf.export.dense import DenseFormat
from llq_hf.methods import build

Run = Callable[[Path], Any]


def recorded(root: Path, run: Run) -> list[Cut]:
    """Every moment of a run that writes in the folder `root`."""
    disk = Disk(root)
    with disk.watched():
        run(root)
    return disk.cuts


def contents(root: Path) -> dict[str, bytes | None]:
    """Of every file; None for folders. Journals tell of seconds, so only that there is one."""
    return {
        path.relative_to(root).as_posix(): None
        if path.is_dir()
        else b"journal"
        if path.suffix == ".jsonl"
        else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def survives(cuts: list[Cut], scratch: Path, run: Run, wanted: dict[str, bytes | None]) -> int:
    """Cut the power at these moments in every mode, look, run again, compare; how many disks."""
    draw, number = random.Random(0), 0
    for cut in cuts:
        for mode in MODES:
            root = scratch / f"cut-{number}"
            cut.leave(root, mode, draw)
            if (root / "out" / "config.json").is_file():
                assert damage(root / "out") == [], mode
            run(root)
            assert contents(root) == wanted, mode
            number += 1
    return number


def spread(cuts: list[Cut], count: int) -> list[Cut]:
    """So many of the moments, evenly, with the last ones, when files get their names."""
    return [*cuts[:: max(len(cuts) // count, 1)], *cuts[-count:]]


@pytest.fixture
def quantize(tiny_llama: Path, calibration_npy: Path) -> Callable[..., Run]:
    def make(name: str = "rtn", **options: Any) -> Run:
        def run(root: Path) -> None:
            quantize_checkpoint(
                str(tiny_llama),
                root / "out",
                build(name, **options),
                Calibration(str(calibration_npy), samples=4),
            )

        return run

    return make


@pytest.mark.parametrize(
    ("name", "options", "shards"),
    [
        ("rtn", {"bits": 4}, True),
        ("spinquant", {"bits": 4, "rotations": "learned", "learn_steps": 2}, False),
        ("db_llm", {"steps": 2}, False),
    ],
    ids=["shards", "learned", "tuned"],
)
def test_a_run(quantize, tmp_path, monkeypatch, name, options, shards) -> None:
    if shards:
        monkeypatch.setattr(Shards, "limit_bytes", 60_000)
    run, root = quantize(name, **options), tmp_path / "root"
    root.mkdir()
    cuts = recorded(root, run)
    wanted = contents(root)
    assert set(wanted) >= {"out/config.json", "out.journal.jsonl"}
    assert not [file for file in wanted if file.endswith((".lock", ".tmp", ".part"))]
    assert survives(spread(cuts, 3), tmp_path, run, wanted) >= 30


def test_mending_a_finished_folder(quantize, tmp_path) -> None:
    run, root = quantize(), tmp_path / "root"
    root.mkdir()
    run(root)
    wanted = contents(root)
    with (root / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")
    # Every moment but the first, when the damage is not yet seen
    cuts = [cut for cut in recorded(root, run) if cut.pending]
    assert contents(root) == wanted
    for number, cut in enumerate(spread(cuts, 6)):
        again = tmp_path / f"again-{number}"
        cut.leave(again, random.Random(number).choice(MODES), random.Random(number))
        run(again)
        assert contents(again) == wanted


def test_an_export(quantize, tmp_path) -> None:
    quantize()(tmp_path)

    def run(root: Path) -> None:
        if not (root / "exported").exists():
            export(tmp_path / "out", root / "exported", DenseFormat)

    root = tmp_path / "root"
    root.mkdir()
    cuts = recorded(root, run)
    assert survives(spread(cuts, 4), tmp_path, run, contents(root)) >= 30


def test_single_files(tmp_path) -> None:
    """After a cut a file is the old one or the new one; once the writer has returned, the new."""
    writers: list[tuple[Callable[[Path], Any], bytes | None]] = [
        (lambda path: write_text(path, "new"), b"new"),
        (lambda path: write_json(path, {"a": 1}), b'{\n  "a": 1\n}\n'),
        (lambda path: copy(Path(__file__), path), Path(__file__).read_bytes()),
        (lambda path: append(path, " and new"), b"old and new"),
        (remove, None),
    ]
    for number, (write, new) in enumerate(writers):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "file").write_bytes(b"old")
        cuts = recorded(root, lambda root, write=write: write(root / "file"))
        for place, cut in enumerate(cuts):
            for mode in MODES:
                left = tmp_path / f"{number}-{place}-{mode}"
                cut.leave(left, mode, random.Random(place))
                found = (left / "file").read_bytes() if (left / "file").exists() else None
                assert found in ((new,) if place == len(cuts) - 1 else (b"old", new)), mode


# --- the simulation notices what is not synced ----------------------------------------------------


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_what_is_not_synced_is_noticed(quantize, tmp_path, monkeypatch, forgotten) -> None:
    run, root = quantize(), tmp_path / "root"
    root.mkdir()
    with monkeypatch.context() as patch:
        for module in (files, *_users_of(forgotten)):
            patch.setattr(module, forgotten, lambda path: None)
        cuts = recorded(root, run)
    with pytest.raises((AssertionError, files.LLQError)):
        survives(spread(cuts, 8), tmp_path, run, contents(root))


def _users_of(name: str) -> list[Any]:
    from llq_hf.checkpoints import shards

    return [shards] if hasattr(shards, name) else []
