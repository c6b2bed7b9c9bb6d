"""The study's tables (arXiv 2404.14047v3): published figures, and the cells that reproduce them.

There is one YAML file a table. A row's `cell` is a method with its options, as in a plan. The
report finds our figures for a row by building that method and comparing its whole config with that
of a record, so it does not matter which plan made the record. Figures are as printed, misprints
too; `notes` names the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ...common.errors import LLQError
from ...common.files import read_json, write_json
from ...common.words import nearest
from ...methods import METHODS, build
from ..plan import finetune_for, own_options
from ..record import DONE, Record

PREFIX = "paper-table"  # of the presets' names
ASKED = "presets.json"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table.

    within: differences up to this share of the published figure are not marked.
    """

    name: str
    figure: str  # where it stands in a record: results.llq_csqa.acc
    better: str  # lower or higher
    published: bool = True  # False: ours alone
    scale: float = 1.0  # ours times this is in the table's unit
    within: float | None = None  # None: nothing is marked
    model: str | None = None  # None: the table's only model


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    label: str
    identity: Mapping[str, Any]  # bits of weights (W), of activations (A), group size, as printed
    published: list[float | str | None]  # in the order of the columns that are published
    cell: Mapping[str, Any] | None  # None: a method that this project does not have

    def made_by(self, record: Record) -> bool:
        """Whether the record is of this row's method with this row's options.

        All other options must be those of the record's preset.
        """
        if self.cell is None or record.cell["method"] != self.cell["method"]:
            return False
        if self.cell["method"] not in METHODS:  # full precision
            return True
        asked = build(
            self.cell["method"], record.cell["preset"], **own_options(self.cell)
        ).to_dict()
        finetune = finetune_for(record.cell["model"], self.cell.get("finetune", {}))
        same = json.loads(json.dumps([asked, finetune])) == [
            record.cell["config"],
            record.cell["finetune"],
        ]
        return bool(same)


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    number: int
    title: str
    source: str
    models: list[str]
    tasks: list[str]
    columns: list[Column]
    rows: list[PublishedRow]
    notes: list[str] = field(default_factory=list)

    @property
    def preset(self) -> str:
        return f"{PREFIX}{self.number}"

    def plan(self) -> dict[str, Any]:
        """The plan whose cells are this table's rows."""
        methods = [dict(row.cell) for row in self.rows if row.cell is not None]
        return {
            "title": f"Table {self.number}: {self.title}",
            "models": self.models,
            "tasks": self.tasks,
            "methods": methods,
        }

    def published(self, row: PublishedRow) -> list[float | str | None]:
        """The row's printed figures, one per column; None where there is none."""
        figures = iter(row.published)
        return [next(figures) if column.published else None for column in self.columns]


@cache
def tables() -> dict[int, PublishedTable]:
    """All tables by number."""
    files = {
        int(path.stem.removeprefix("table")): path
        for path in Path(__file__).parent.glob("table*.yaml")
    }
    return {number: _load(number, files[number]) for number in sorted(files)}


def plan_of(preset: str) -> dict[str, Any]:
    """The plan of "paper-table1"; LLQError with the nearest name where there is none."""
    known = {table.preset: table for table in tables().values()}
    if preset not in known:
        raise LLQError(
            f"there is no preset {preset!r}{nearest(preset, known)}; there are: {', '.join(known)}"
        )
    return known[preset].plan()


def _load(number: int, path: Path) -> PublishedTable:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    columns = [Column(**column) for column in content.pop("columns")]
    return PublishedTable(
        number=number, columns=columns, rows=[_row(row) for row in content.pop("rows")], **content
    )


def _row(content: dict[str, Any]) -> PublishedRow:
    known = {key: content.pop(key) for key in ("label", "published", "cell")}
    return PublishedRow(**known, identity=content)


def records_of(row: PublishedRow, records: list[Record]) -> list[Record]:
    """The finished records of a row, study preset first."""
    made = [record for record in records if record.status == DONE and row.made_by(record)]
    return sorted(made, key=lambda r: (r.cell["preset"] != "study", r.cell["seed"], r.name))


def remember(out: Path, presets: list[str]) -> None:
    """Note in a study's folder which tables it was asked for, beside those noted before."""
    out.mkdir(parents=True, exist_ok=True)
    noted = asked_for(out)
    write_json(out / ASKED, {"presets": noted + [name for name in presets if name not in noted]})


def asked_for(out: Path) -> list[str]:
    path = out / ASKED
    return list(read_json(path)["presets"]) if path.is_file() else []
