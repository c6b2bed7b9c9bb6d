"""Answers that changed: counted by hand, their p by all ways to flip, and in the report."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llq_hf.common.progress import Progress
from llq_hf.study.cell import Setup, run_cell
from llq_hf.study.flips import Flips, flips, right_answers
from llq_hf.study.plan import Cell
from llq_hf.study.record import DONE, Record, read_record, write_record
from llq_hf.study.report import write_report

DENSE = Cell(model="some/model", method="none", tasks=("llq_piqa", "llq_arc_easy"))
RTN = replace(DENSE, method="rtn", options={"bits": 4})
BEFORE = {"llq_piqa": "1111100", "llq_arc_easy": "10"}
AFTER = {"llq_piqa": "1100010", "llq_arc_easy": "11"}


def test_flips_are_counted() -> None:
    assert Flips.between("1111100", "1100010") == Flips(7, before=5, after=3, lost=3, won=1)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 1), (1, 3), (2, 2), (5, 0), (12, 4)])
def test_p_is_that_of_all_ways_to_flip(lost: int, won: int) -> None:
    """Of all equally likely ways that so many answers flip, the share at least as uneven."""
    ways = list(product((0, 1), repeat=lost + won))
    uneven = sum(abs(2 * sum(way) - len(way)) >= abs(lost - won) for way in ways)
    assert Flips(99, 50, 50, lost, won).p == pytest.approx(uneven / len(ways))


def test_right_answers_are_those_of_lm_eval_s_samples() -> None:
    rows: list[dict[str, Any]] = [{"doc_id": i, "acc": float(i % 2)} for i in (2, 0, 1, 3)]
    samples = {
        "choice": rows,
        "perplexity": [{"doc_id": 0, "token_perplexity": (1.0, 2)}],
        "partly": [{"doc_id": 0, "acc": 0.5}, {"doc_id": 1, "acc": 1.0}],
    }
    assert right_answers(samples) == {"choice": "0101"}


def record(cell: Cell, right: dict[str, str]) -> Record:
    return Record.of(cell, DONE, right=right)


def test_the_table() -> None:
    other = replace(RTN, limit=4)  # other questions than full precision's
    lines = flips([record(RTN, AFTER), record(DENSE, BEFORE), record(other, AFTER)]).lines
    shown = [[value.text for value in line.values] for line in lines]
    assert shown == [
        ["rtn bits=4", "llq_piqa", "7", "60.0", "3", "1", "0.625"],
        ["rtn bits=4", "llq_arc_easy", "2", "200.0", "0", "1", "1"],
        ["rtn bits=4", "all", "9", "83.3", "3", "2", "1"],
    ]
    assert lines[0].values[2].figure == "right.llq_piqa"
    many = {f"task{i}": "10" for i in range(11)}
    lines = flips([record(DENSE, many), record(RTN, many)]).lines
    assert [line.values[1].text for line in lines] == ["all"]


def test_the_report_has_the_table(tmp_path: Path) -> None:
    for each in (record(RTN, AFTER), record(DENSE, BEFORE)):
        assert read_record(write_record(tmp_path, each)) == each
    (page,) = write_report(tmp_path, tmp_path, ["md"])
    assert "| rtn bits=4 | llq_piqa | 7 | 60.0 | 3 | 1 | 0.625 |" in page.read_text()


def test_a_cell_keeps_its_answers(tmp_path: Path) -> None:
    cell = Cell(model="demo", method="none", tasks=("llq_demo",), limit=20)
    done = run_cell(cell, Progress(), Setup(batch_size=20, cache=tmp_path))
    assert done.status == "done", done.trace
    right = done.right["llq_demo_mc"]
    assert set(done.right) == {"llq_demo_mc"}
    assert len(right) == 20
    assert right.count("1") / 20 == pytest.approx(done.results["llq_demo_mc"]["acc"])
