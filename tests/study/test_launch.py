"""Sweeps that are killed, resumed, crash, or run on a cluster: invented cells, real processes."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from study import fakes

from llq_hf import LLQError
from llq_hf.common.progress import Progress
from llq_hf.study.launch import RayCluster, Watcher, local, sweep
from llq_hf.study.plan import Cell, expand
from llq_hf.study.record import Record, file_of, read_record, read_records, write_record
from llq_hf.study.report import write_report

CELLS = expand(
    [
        {
            "models": ["demo"],
            "tasks": ["llq_demo"],
            "methods": [{"method": "rtn", "bits": [4, 3, 2]}, {"method": "gptq", "bits": [3, 2]}],
        }
    ]
)


def inline(cells, work, out, watcher):
    """The engine of tests that care for records only."""
    for cell in cells:
        yield work(cell, watcher)


def report_of(out: Path) -> list[str]:
    """Every figure of the report, but for what the list of records says of the machine."""
    (path,) = write_report(out, out, ["csv"])
    return [line for line in path.read_text().splitlines() if not line.startswith("records,")]


def stable(out: Path) -> list[dict]:
    return [record.stable for record in read_records(out)]


def test_killed_three_times_the_report_is_the_same(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken" / "runs", tmp_path / "unbroken" / "runs"
    killers = [CELLS[i] for i in (0, 2, 4)]
    work = partial(fakes.work, folder=tmp_path, killers=tuple(cell.fingerprint for cell in killers))
    codes = []
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(
            target=sweep, args=(CELLS, work, broken, local)
        )
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes == [-9, -9, -9, 0]
    calls = (tmp_path / "calls.txt").read_text().split()
    assert calls == [
        c.fingerprint for c in CELLS for _ in range(2 if c in killers else 1)
    ]  # none that was done
    for killer in killers:  # the child of a killed parent is gone
        FileLock(tmp_path / f"{killer.fingerprint}.alive", timeout=60).acquire()
    sweep(CELLS, fakes.work, unbroken, inline)
    assert stable(broken) == stable(unbroken)
    assert report_of(broken) == report_of(unbroken)


def test_a_crash_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    crash = Cell(model="demo", method=fakes.CRASH, tasks=("llq_demo",))
    told: list[str] = []

    class Told(Watcher):
        def stage(self, text: str, total: int = 0) -> None:
            told.append(text)

    records = sweep([CELLS[0], crash, CELLS[1]], fakes.work, tmp_path, local, Told())
    assert [record.status for record in records] == ["done", "failed", "done"]
    assert "SIGKILL" in str(records[1].reason)
    assert told == ["inventing"] * 3
    assert read_record(file_of(tmp_path, crash.name)) == records[1]
    again = sweep([CELLS[0], crash, CELLS[1]], fakes.work, tmp_path, local)
    assert [record.name for record in again] == [
        crash.name
    ]  # what failed is tried again, what is done is not


SECOND_SWEEP = """
import sys
from pathlib import Path
from filelock import FileLock
sys.path.insert(0, sys.argv[1])
from study import test_launch as t
out = Path(sys.argv[2])
with FileLock(out / ".lock"):
    try:
        t.sweep(t.CELLS, t.fakes.work, out, t.inline)
    except t.LLQError as error:
        print(error)
"""


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    # In a process of its own: what else this one has imported must not matter to its locks.
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", SECOND_SWEEP, tests, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "another `llq study` is at work" in done.stdout


def test_a_sweep_leaves_no_drafts_and_no_lock(tmp_path: Path) -> None:
    (tmp_path / "records" / "x.json.tmp").mkdir(parents=True)
    (tmp_path / "records" / "x.json.tmp" / "x.json").write_text("half")
    sweep([], fakes.work, tmp_path, inline)
    assert list(tmp_path.rglob("*")) == [tmp_path / "records"]


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    path = write_record(tmp_path, fakes.invented(CELLS[1]))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(LLQError, match=path.name):
        sweep(CELLS, fakes.work, tmp_path, inline)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    record = fakes.invented(CELLS[3])
    assert read_record(write_record(tmp_path, record)) == record
    assert (
        json.loads(file_of(tmp_path, record.name).read_text())["fingerprint"]
        == CELLS[3].fingerprint
    )


def test_records_from_before_a_field_are_read(tmp_path: Path) -> None:
    record = fakes.invented(CELLS[3])
    path = write_record(tmp_path, record)
    content = json.loads(path.read_text())
    del content["cell"]["finetune"], content["cell"]["limit"]
    path.write_text(json.dumps(content))
    assert read_record(path) == record


def test_two_nodes_of_ray_give_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two raylets on this machine, one processor each; a crash on a node is tried again and then
    recorded.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    crash = Cell(model="demo", method=fakes.CRASH, tasks=("llq_demo",))
    # The nodes are this machine: nothing to install
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Else everything else on this machine goes first
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # The nodes must find this folder's work
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        engine = RayCluster(address=cluster.address, retries=1)
        sweep([*CELLS, crash], fakes.work, tmp_path / "ray", engine)
    finally:
        ray.shutdown()
        cluster.shutdown()
    sweep(CELLS, fakes.work, tmp_path / "here", inline)
    crashed = read_record(file_of(tmp_path / "ray", crash.name))
    assert crashed.status == "failed"
    assert "WorkerCrashedError" in str(crashed.reason)
    file_of(tmp_path / "ray", crash.name).unlink()
    assert stable(tmp_path / "ray") == stable(tmp_path / "here")


def test_the_invented_work_is_not_trivial() -> None:
    figures = {json.dumps(fakes.work(cell, Progress()).results) for cell in CELLS}
    assert len(figures) == len(CELLS)
    assert isinstance(fakes.work(CELLS[0], Progress()), Record)


def test_a_new_label_names_the_record_and_runs_nothing(tmp_path: Path) -> None:
    sweep(CELLS, fakes.work, tmp_path, inline)
    before = stable(tmp_path)
    labelled = [replace(cell, label=f"cell {i}") for i, cell in enumerate(CELLS)]
    assert sweep(labelled, fakes.work, tmp_path, inline) == []
    records = {record.fingerprint: record for record in read_records(tmp_path)}
    for cell in labelled:
        assert records[cell.fingerprint].title == cell.title
        assert records[cell.fingerprint].cell["label"] == cell.label
    sweep(CELLS, fakes.work, tmp_path, inline)
    assert stable(tmp_path) == before
