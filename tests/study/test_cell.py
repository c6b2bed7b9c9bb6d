"""One real cell of a tiny model: what its record holds, twice the same, and how it ends when
something is wrong.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llq_hf.checkpoints.packed import read_report
from llq_hf.common.progress import Progress
from llq_hf.study import cell as cells
from llq_hf.study.cell import Setup, Timed, run_cell
from llq_hf.study.cost import Workload
from llq_hf.study.plan import Cell

TEXT = "the old king of the hill had a small red fox and the fox had a secret name. " * 12


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    load = Workload(batches=(1, 2), prompt_tokens=8, new_tokens=2, rounds=2)
    return Setup(batch_size=4, cache=tmp_path_factory.mktemp("cache"), load=load)


@pytest.fixture(scope="module")
def gptq(tiny_llama: Path, calibration_npy: Path, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return Cell(
        model=str(tiny_llama),
        method="gptq",
        tasks=("llq_wikitext2",),
        options={"bits": 3},
        calibration={"source": str(calibration_npy), "samples": 8},
        metadata={"text_file": str(text), "seqlen": 32},
    )


def test_a_cell(gptq: Cell, setup: Setup) -> None:
    record = run_cell(gptq, Progress(), setup)
    assert (record.status, record.reason) == ("done", None), record.trace
    assert math.isfinite(record.results["llq_wikitext2"]["token_perplexity"])
    quantized = record.quantized
    assert quantized["config"]["bits"] == quantized["nominal_bits"] == 3
    (folder,) = (path for path in setup.cache.iterdir() if path.is_dir())
    assert quantized["linears"] == read_report(folder)["linears"]
    cost = record.cost
    assert cost["disk_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert cost["quantize"]["seconds"] == pytest.approx(sum(cost["quantize"]["phases"].values()))
    assert "linears" in cost["quantize"]["phases"]
    assert cost["quantize"]["processor_seconds"] > 0
    assert 0 <= cost["quantize"]["added_bytes"] < cost["quantize"]["peak_bytes"]
    own, reference = cost["own"], cost["reference"]
    assert cost["ratios"]["loaded_bytes"] == own["loaded_bytes"] / reference["loaded_bytes"] < 1
    assert set(own["speed"]) == {"1", "2"}
    assert len(own["speed"]["2"]["rounds"]) == setup.load.rounds
    again = run_cell(gptq, Progress(), setup)
    assert again.stable == record.stable
    # Taken from beside the checkpoint, which was not made again
    assert again.cost["quantize"] == cost["quantize"]


def test_a_fine_tuned_cell(gptq: Cell, setup: Setup, tmp_path: Path) -> None:
    """The adapter trains on the packed checkpoint of the plain cell, and is what is scored and
    measured.
    """
    rows = [
        {"instruction": f"where were you, fox {i}?", "input": "", "output": "at the river"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {
        "max_steps": 2,
        "rank": 2,
        "batch_size": 2,
        "micro_batch": 2,
        "heldout": 2,
        "learning_rate": 0.1,
    }
    small |= {"prompt_tokens": 48, "answer_tokens": 16}
    tuned = replace(gptq, finetune={"data": str(tmp_path / "rows.jsonl"), **small})
    record = run_cell(tuned, Progress(), setup)
    assert record.status == "done", record.trace or record.reason
    plain = run_cell(gptq, Progress(), setup)
    assert record.quantized == plain.quantized
    answers = record.results.pop("answers"), record.results.pop("answers_before")
    assert all(set(found) == {"loss", "accuracy"} for found in answers)
    assert answers[0]["loss"] != answers[1]["loss"]
    assert set(record.results) == set(plain.results)
    assert record.results != plain.results
    assert record.cost["disk_bytes"] > plain.cost["disk_bytes"]
    assert record.cost["finetune"]["seconds"] > 0
    assert record.cost["own"]["loaded_bytes"] > plain.cost["own"]["loaded_bytes"]
    again = run_cell(tuned, Progress(), setup)
    assert again.results.pop("answers") == answers[0]
    assert again.results.pop("answers_before") == answers[1]
    assert again.stable == record.stable
    assert again.cost["finetune"] == record.cost["finetune"]
    wrong = run_cell(replace(gptq, finetune={"ranks": 2}), Progress(), setup)
    assert (wrong.status, "'ranks'" in str(wrong.reason)) == ("refused", True)


def test_a_task_of_divergence_compares_with_the_cell_s_model(gptq: Cell, setup: Setup) -> None:
    """It gives what the plan's `divergence` gives on the same windows; full precision has none."""
    metadata = {**gptq.metadata, "seqlen": 64}
    options = {"windows": 99, "seqlen": 64, "file": gptq.metadata["text_file"]}
    cell = replace(gptq, tasks=("llq_kl",), metadata=metadata, divergence=options)
    record = run_cell(cell, Progress(), setup)
    assert record.status == "done", record.trace or record.reason
    found, measured = record.results["llq_kl"], dict(record.results["divergence"])
    del measured["token_perplexity"]
    assert {name: found[name] for name in measured} == pytest.approx(measured, rel=1e-4)
    assert found["kl"] > 0
    dense = replace(gptq, method="none", options={}, tasks=("llq_kl",), metadata=metadata)
    assert run_cell(dense, Progress(), setup).results["llq_kl"]["kl"] == 0


def test_the_divergence_of_a_cell(gptq: Cell, setup: Setup) -> None:
    """Beside the cell's own results; of more bits it is less."""
    options = {"windows": 2, "seqlen": 32, "file": gptq.metadata["text_file"]}
    kl = {}
    for bits in (3, 8):
        cell = replace(gptq, divergence=options, options={"bits": bits})
        record = run_cell(cell, Progress(), setup)
        assert record.status == "done", record.trace or record.reason
        assert set(record.results) == {"llq_wikitext2", "divergence"}
        kl[bits] = record.results["divergence"]["kl"]
    assert 0 < kl[8] < 0.1 * kl[3]


def test_full_precision_is_a_cell_too(gptq: Cell, setup: Setup) -> None:
    record = run_cell(replace(gptq, method="none", options={}), Progress(), setup)
    assert record.status == "done", record.trace
    assert record.quantized == {}
    assert set(record.cost) == {"disk_bytes", "own"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cell: replace(cell, options={"bits": 9}), "outside its range"),
        (lambda cell: replace(cell, method="gptk"), "'gptq'"),
        (lambda cell: replace(cell, metadata={"text_file": "/none.txt"}), "no file /none.txt"),
        (lambda cell: replace(cell, calibration={"source": "/none.npy"}), "/none.npy"),
    ],
    ids=["width", "method", "text", "calibration"],
)
def test_what_makes_no_sense_is_refused(
    gptq: Cell, setup: Setup, change: Callable[[Cell], Cell], reason: str
) -> None:
    record = run_cell(change(gptq), Progress(), setup)
    assert record.status == "refused", record.trace
    assert reason in str(record.reason)
    assert record.results == record.quantized == {}


def test_what_breaks_has_failed(gptq: Cell, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(cells, "evaluate", broken)
    record = run_cell(gptq, Progress(), setup)
    assert (record.status, record.reason) == ("failed", "RuntimeError: the disk is on fire")
    assert "broken" in str(record.trace)


def test_seconds_go_to_the_phase_they_were_spent_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(cells.time, "perf_counter", lambda: next(clock))
    timed = Timed(Progress())
    timed.stage("statistics")  # after 1 second
    timed.linear("q_proj")  # after 2 more
    timed.stage("statistics")  # after 4
    timed.close()  # after 8
    assert timed.figures()["phases"] == {"preparing": 1.0, "statistics": 2.0 + 8.0, "linears": 4.0}
    assert timed.figures()["seconds"] == 15.0


def test_a_recipe_is_checked_before_the_model_is_quantized(
    gptq: Cell, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "_quantize", lambda *_: pytest.fail("quantized first"))
    record = run_cell(replace(gptq, finetune={"ranks": 2}), Progress(), setup)
    assert (record.status, "finetune has no 'ranks'" in str(record.reason)) == ("refused", True)


def test_what_a_killed_cell_did_not_note_is_noted_from_the_journal(tmp_path: Path) -> None:
    made, note = tmp_path / "abc", tmp_path / "abc.cost.json"
    lines = [{"identity": {}}, {"block": 0, "seconds": 2.0, "peak_bytes": 7}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "abc.journal.jsonl").write_text(text)
    (tmp_path / "abc.cost.json.tmp").mkdir()  # of the writer that was killed
    found = cells._cost_of(made, None)
    assert found == {"seconds": 2.0, "peak_bytes": 7, "from": "journal"}
    assert json.loads(note.read_text()) == found
    assert cells._cost_of(made, {"seconds": 3.0}) == {"seconds": 3.0}
    assert cells._cost_of(made, None) == {"seconds": 3.0}
    assert {path.name for path in tmp_path.iterdir()} == {note.name, "abc.journal.jsonl"}
