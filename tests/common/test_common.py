"""Files that are written whole or not at all, and what device=auto means."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout

import llq_hf
from llq_hf.common import files
from llq_hf.common.errors import LLQError
from llq_hf.common.files import locked, read_json, replaced, write_json
from llq_hf.common.machine import auto_device, peak_resident_bytes
from llq_hf.common.words import nearest, one_line


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replaced(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_stays_where_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replaced(path) as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_drafts_of_killed_writers_are_deleted_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    (tmp_path / "a.json.tmp").mkdir()
    (tmp_path / "a.json.tmp" / ".tmp9dmyrS").write_text("of a library")
    write_json(path, {})
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "a.json.tmp").write_text("a file, as older versions wrote drafts")
    write_json(path, {"a": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_file_that_goes_away_keeps_its_promise(tmp_path: Path) -> None:
    """Each holder deletes it in the end, and those that wait must not hold what was deleted."""
    lock, inside, most, turns = tmp_path / "x.lock", [0], [0], [0]

    def work() -> None:
        for _ in range(15):
            with locked(lock):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                turns[0] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == ([1], [90])
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_is_a_timeout(tmp_path: Path) -> None:
    with locked(tmp_path / "x.lock"):
        with pytest.raises(Timeout), locked(tmp_path / "x.lock", timeout=0):
            pass
        assert (tmp_path / "x.lock").exists()


def test_equal_json_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    write_json(first, {"b": 1, "a": [2]})
    write_json(second, {"a": [2], "b": 1})
    assert first.read_bytes() == second.read_bytes()
    assert read_json(first) == {"a": [2], "b": 1}


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", "should hold a JSON object")]
)
def test_broken_json_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LLQError, match=message):
        read_json(path)
    with pytest.raises(LLQError, match="is missing"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(("there", "device"), [(True, "cuda:1"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(
    there: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert auto_device("auto", "cuda:1") == device
    assert auto_device("mps", "cuda:1") == "mps"


def test_the_peak_where_the_system_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no /proc and no module `resource`."""
    assert peak_resident_bytes() > 2**20
    opens = Path.open

    def no_proc(self: Path, *args: Any, **options: Any) -> Any:
        if self.parts[1:2] == ("proc",):
            raise FileNotFoundError(self)
        return opens(self, *args, **options)

    monkeypatch.setattr(Path, "open", no_proc)
    assert peak_resident_bytes() > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_resident_bytes() == 0


def test_words() -> None:
    assert nearest("gpqt", ["gptq", "rtn"]) == " (did you mean 'gptq'?)"
    assert nearest("xxxx", ["gptq", "rtn"]) == ""
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError("")) == "ValueError"


# Who else writes: in place, to be checked by the journal; into a folder of its own that is thrown
# away; logs; what can be drawn again; the kernels' build, which may import nothing of the package.
WRITERS = {
    "common/files.py",
    "checkpoints/shards.py",
    "demo/drawings.py",
    "hosts/hf_models.py",
    "kernels/build.py",
    "study/cost.py",
    "study/launch.py",
}
WRITING = re.compile(
    r"\.write_(text|bytes)\(|os\.(replace|rename)\(|\w\.rename\(|shutil\.(copy|move)|save_file\(|np\.save\("
    r"|torch\.save\(|open\([^)]*[\"'][wax]b?\+?[\"']"
)


def test_all_files_are_written_by_the_functions_that_sync() -> None:
    package = Path(llq_hf.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if WRITING.search(line) and "draft.write_" not in line
    }
    assert found == WRITERS


def test_nothing_lies_beside_a_file_that_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is killed right behind the renaming leaves nothing that nobody would delete."""
    beside: list[list[str]] = []

    def look(folder: Path) -> None:
        beside.append(sorted(path.name for path in folder.iterdir()))

    monkeypatch.setattr(files, "sync_folder", look)  # what follows the renaming
    write_json(tmp_path / "note.json", {})
    assert beside == [["note.json"]]


@pytest.mark.parametrize("left", ["note.json.tmp", "note.json.ready.tmp"])
def test_the_next_writer_deletes_what_a_killed_one_left(tmp_path: Path, left: str) -> None:
    if left.endswith("ready.tmp"):
        (tmp_path / left).write_text("half")
    else:
        (tmp_path / left).mkdir()
        (tmp_path / left / "note.json").write_text("half")
    write_json(tmp_path / "note.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
    assert read_json(tmp_path / "note.json") == {"a": 1}
