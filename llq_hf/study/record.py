"""Records: one JSON file per cell, OUT/records/NAME.json, written whole or not at all.

key         | what
fingerprint | of the cell
cell        | what was asked for: the fields of `plan.Cell`; `config`: every option of the method
status      | done; refused: the input makes no sense, see `reason`; failed: see `trace` too
quantized   | method, config, nominal_bits, stored_bits, whole_model_bits, bytes, fingerprint,
            | and the errors of the `linears`
results     | task -> metric -> figure; also `divergence` from full precision, `answers` held out
            | from fine-tuning, and `answers_before` it
right       | task -> "1" or "0" per question, where lm-eval scores answers as right or wrong
cost        | quantize, finetune (seconds, processor_seconds, phases, peak_bytes, added_bytes),
            | disk_bytes, own, reference, ratios
run         | machine, versions, device, threads, when it began, seconds, log file
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.errors import LLQError
from ..common.files import make_folder, write_json
from ..common.markup import file_name
from .plan import Cell, defaults

DONE, REFUSED, FAILED = "done", "refused", "failed"
_VOLATILE = ("cost", "run")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a cell; see the head of this file."""

    cell: dict[str, Any]
    fingerprint: str
    name: str
    title: str
    status: str
    reason: str | None = None
    trace: str | None = None
    quantized: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, status: str, **figures: Any) -> Record:
        asked = json.dumps({**asdict(cell), "config": cell.config})
        return cls(
            cell=json.loads(asked),  # with lists for tuples, as when it is read from its file
            fingerprint=cell.fingerprint,
            name=cell.name,
            title=cell.title,
            status=status,
            **figures,
        )

    @property
    def stable(self) -> dict[str, Any]:
        """What is the same wherever and whenever the cell runs."""
        return {key: value for key, value in asdict(self).items() if key not in _VOLATILE}

    def find(self, path: str) -> Any:
        """The value at a path as "results.llq_demo_ppl.token_perplexity"; None where there is none.

        Names in the path hold no dots.
        """
        first, *rest = path.split(".")
        value: Any = getattr(self, first, None)
        for key in rest:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def records_folder(out: Path) -> Path:
    return out / "records"


def file_of(out: Path, name: str) -> Path:
    """The file of a record, whose name may come from a file: it never leads out of the folder."""
    return records_folder(out) / f"{file_name(name)}.json"


def write_record(out: Path, record: Record) -> Path:
    path = file_of(out, record.name)
    make_folder(path.parent)
    write_json(path, asdict(record))
    return path


def read_record(path: Path) -> Record:
    """The record in a file.

    LLQError for a file that is no record: a broken one must not count as a cell that never ran.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**content, "cell": {**defaults(), **content["cell"]}})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise LLQError(
            f"{path} is no record of a study ({error}); delete it, and its cell is run again"
        ) from error


def read_records(out: Path) -> list[Record]:
    """All records of a study, by name. LLQError where there are none."""
    records = [read_record(path) for path in sorted(records_folder(out).glob("*.json"))]
    if not records:
        raise LLQError(f"{out} holds no records; run `llq study ... --out {out}` first")
    return records


def pending(cells: Iterable[Cell], out: Path) -> list[Cell]:
    """The cells that are not done: never run, refused or failed. The latter two are tried again."""
    return [cell for cell in cells if not _is_done(file_of(out, cell.name))]


def relabel(cells: Iterable[Cell], out: Path) -> None:
    """Give the records of cells that are done the cells' titles: a plan's labels may change."""
    for cell in cells:
        path = file_of(out, cell.name)
        if not _is_done(path):
            continue
        record = read_record(path)
        if (record.title, record.cell["label"]) != (cell.title, cell.label):
            asked = {**record.cell, "label": cell.label}
            write_record(out, replace(record, title=cell.title, cell=asked))


def _is_done(path: Path) -> bool:
    return path.is_file() and read_record(path).status == DONE
