"""Which answers a quantization changed: counts of flips, and whether they are more than chance.

Two models may have the same accuracy and answer differently. An answer that was right in full
precision and is wrong now is a flip, and so is the reverse. McNemar's exact test asks how likely at
least such an imbalance of the two is if either direction of a flip were as likely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any, NamedTuple

from .plan import DENSE
from .record import DONE, Record
from .tables import Line, ReportTable, Value, percent

ALL = "all"
MOST_TASKS = 10  # more have one line together
NOTE = (
    "Against the full-precision cell with the same questions. Left: right answers now per right "
    "answer then, in percent. p: McNemar's exact test, two-sided."
)
HEAD = ["cell", "task", "answers", "left", "right to wrong", "wrong to right", "p"]


class Flips(NamedTuple):
    """Answers of one task in full precision and now."""

    answers: int
    before: int  # right ones
    after: int
    lost: int  # right before, wrong now
    won: int  # wrong before, right now

    @classmethod
    def between(cls, before: str, after: str) -> Flips:
        """From strings of "1" (right) and "0", in the order of the questions."""
        pairs = list(zip(before, after, strict=True))
        lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
        return cls(len(pairs), before.count("1"), after.count("1"), lost, won)

    @property
    def p(self) -> float:
        """Two-sided p of McNemar's exact test; 1 where nothing flipped."""
        flipped = self.lost + self.won
        tail = sum(comb(flipped, k) for k in range(min(self.lost, self.won) + 1))
        return min(1.0, 2 * tail / (1 << flipped))


def right_answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Task -> "1" or "0" per question, from lm-eval's samples of tasks that are scored by `acc`."""
    found = {}
    for task, rows in samples.items():
        scores = {row["doc_id"]: row["acc"] for row in rows if row.get("acc") in (0, 1)}
        if scores and len(scores) == len({row["doc_id"] for row in rows}):
            found[task] = "".join(str(int(scores[doc])) for doc in sorted(scores))
    return found


def flips(records: Iterable[Record]) -> ReportTable:
    """A line for each task of each quantized cell that has a full-precision one beside it."""
    done = [record for record in records if record.status == DONE and record.right]
    baselines = {_questions(r): r for r in done if r.cell["method"] == DENSE}
    lines = [
        line
        for record in done
        if record.cell["method"] != DENSE and _questions(record) in baselines
        for line in _lines(record, baselines[_questions(record)])
    ]
    return ReportTable("flips", "Answers that changed", HEAD, lines, [NOTE], words=2)


def _questions(record: Record) -> str:
    """What decides the questions and the model that answers them."""
    keys = ("model", "revision", "dtype", "tasks", "metadata", "limit", "num_fewshot")
    return repr([record.cell[key] for key in keys])


def _lines(record: Record, baseline: Record) -> list[Line]:
    both = [task for task in baseline.right if task in record.right]
    parts = {task: (baseline.right[task], record.right[task]) for task in both}
    parts = {task: pair for task, pair in parts.items() if len(pair[0]) == len(pair[1])}
    joined = {ALL: tuple(map("".join, zip(*parts.values(), strict=True)))} if len(parts) > 1 else {}
    shown = {**(parts if len(parts) <= MOST_TASKS else {}), **joined}
    return [
        _line(record, task, Flips.between(before, after)) for task, (before, after) in shown.items()
    ]


def _line(record: Record, task: str, found: Flips) -> Line:
    place = "right" if task == ALL else f"right.{task}"
    left = percent(100 * found.after / found.before) if found.before else ""
    texts = [str(found.answers), left, str(found.lost), str(found.won), f"{found.p:.3g}"]
    figures = [Value(text, record.name, place) for text in texts]
    return Line([Value(record.title), Value(task), *figures])
