"""Writes the report of a folder of records: tables and plots, in the formats that are asked for.

format | file        | what
html   | report.html | tables and plots on one page; figures name their records on hover
md     | report.md   | the tables, with the record of each line
csv    | report.csv  | a line for each figure, with its record file, and its place and scale there
latex  | report.tex  | the tables for booktabs and longtable; records as comments
svg    | report.svg  | quality against stored bits, for a README: legible at a phone's width
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..common.errors import LLQError
from ..common.files import replaced
from ..common.markup import latex as tex
from ..common.markup import markdown as escaped
from ..common.markup import on_one_line
from ..common.words import nearest
from .cover import cover
from .flips import flips
from .page import page
from .paper import asked_for
from .plots import plots
from .record import DONE, FAILED, REFUSED, Record, read_records
from .tables import (
    BETTER,
    LEVEL_SIGNS,
    SAME,
    WORSE,
    Line,
    ReportTable,
    cost,
    overview,
    phases,
    provenance,
    study_tables,
    unfinished,
)

LEDE = (
    "Every figure of ours stands in a record file: hover over it to see which, or find the file in "
    'the <a href="#records">list of records</a>.'
)
MARKS = (
    f"{LEVEL_SIGNS[SAME]} within the margin of the published figure, {LEVEL_SIGNS[BETTER]} better, "
    f"{LEVEL_SIGNS[WORSE]} worse (2 % of a perplexity, 1 % of an accuracy)."
)


def write_report(out: Path, into: Path, formats: Sequence[str], name: str = "report") -> list[Path]:
    """Write the report of the study in `out` to the folder `into`; returns the files' paths.

    name: of the files, without their suffix. LLQError for a format that there is not, and where
    there are no records.
    """
    for each in formats:
        if each not in WRITERS:
            raise LLQError(
                f"there is no format {each!r}{nearest(each, WRITERS)}; "
                f"there are: {', '.join(WRITERS)}"
            )
    records = read_records(out)
    tables = all_tables(records, asked_for(out))
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for each in formats:
        suffix, write = WRITERS[each]
        path = into / f"{name}.{suffix}"
        with replaced(path) as draft:
            draft.write_text(write(out, records, tables), encoding="utf-8")
        written.append(path)
    return written


def all_tables(records: Sequence[Record], asked: Sequence[str]) -> list[ReportTable]:
    """The report's tables, those that have lines. asked: presets of the study's tables."""
    tables = [
        *overview(records),
        *study_tables(records, asked),
        flips(records),
        cost(records),
        phases(records),
        unfinished(records),
        provenance(records),
    ]
    return [table for table in tables if table.lines]


# --- one page -------------------------------------------------------------------------------------


def html(out: Path, records: Sequence[Record], tables: Sequence[ReportTable]) -> str:
    from markupsafe import Markup

    return page(_title(out), Markup(LEDE), _facts(records), plots(records), _with_notes(tables))


def _title(out: Path) -> str:
    return f"Quantization study: {out.resolve().name}"


def _facts(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Names and figures for the head of the page."""
    counts = Counter(record.status for record in records)
    models = {record.cell["model"] for record in records}
    methods = {record.quantized["method"] for record in records if record.quantized}
    names = [
        (f"cells {status}", counts[status]) for status in (DONE, REFUSED, FAILED) if counts[status]
    ]
    return [*names, ("models", len(models)), ("methods", len(methods))]


def _with_notes(tables: Sequence[ReportTable]) -> list[ReportTable]:
    """The tables, with a note on the marks for those that have some."""

    def marked(table: ReportTable) -> bool:
        return any(value.mark for line in table.lines for value in line.values)

    return [
        replace(table, notes=[MARKS, *table.notes]) if marked(table) else table for table in tables
    ]


# --- text -----------------------------------------------------------------------------------------


def markdown(out: Path, records: Sequence[Record], tables: Sequence[ReportTable]) -> str:
    parts = [f"# {escaped(_title(out))}\n"]
    for table in _with_notes(tables):
        rule = ["---" if i < table.words else "---:" for i in range(len(table.head))]
        rows = [
            [*(value.signed for value in line.values), _record_of(line)] for line in table.lines
        ]
        lines = [
            "| " + " | ".join(row) + " |"
            for row in (
                [*map(escaped, table.head), "record"],
                [*rule, "---"],
                *(map(escaped, row) for row in rows),
            )
        ]
        notes = map(escaped, table.notes)
        parts.append("\n".join([f"## {escaped(table.title)}\n", *lines, "", *notes, ""]))
    return "\n".join(parts)


def _record_of(line: Line) -> str:
    records = dict.fromkeys(value.record for value in line.values if value.record)
    return on_one_line(", ".join(records))


def comma_separated(out: Path, records: Sequence[Record], tables: Sequence[ReportTable]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["table", "line", "label", "column", "text", "mark", "record", "figure", "scale"]
    )
    for table in tables:
        for number, line in enumerate(table.lines, start=1):
            words, figures = line.values[: table.words], line.values[table.words :]
            label = " ".join(filter(None, (value.text for value in words)))
            for name, value in zip(table.head[table.words :], figures, strict=True):
                if value.text:
                    file = f"records/{value.record}.json" if value.record else ""
                    traced = [file, value.figure, value.scale if file else ""]
                    writer.writerow(
                        [table.name, number, label, name, value.text, value.mark, *traced]
                    )
    return text.getvalue()


def latex(out: Path, records: Sequence[Record], tables: Sequence[ReportTable]) -> str:
    """Tables to \\input; they need booktabs, longtable, amssymb."""
    return "\n".join(_latex_table(table) for table in _with_notes(tables))


def _latex_table(table: ReportTable) -> str:
    columns = "l" * table.words + "r" * (len(table.head) - table.words)
    head = " & ".join(rf"\textbf{{{tex(name)}}}" for name in table.head)
    lines = [
        " & ".join(tex(value.signed) for value in line.values) + rf" \\ % {_record_of(line)}"
        for line in table.lines
    ]
    notes = [tex(note) + r"\par" for note in table.notes]
    return "\n".join(
        [
            f"% {on_one_line(table.title)}",
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{tex(table.title)}}}\label{{tab:{table.name}}} \\",
            rf"\toprule {head} \\ \midrule \endhead",
            *lines,
            r"\bottomrule",
            r"\end{longtable}",
            *notes,
            "",
        ]
    )


def svg(out: Path, records: Sequence[Record], tables: Sequence[ReportTable]) -> str:
    picture = cover(records)
    if picture is None:
        raise LLQError(f"{out} has no record with stored bits and a perplexity to draw")
    return picture


Writer = Callable[[Path, Sequence[Record], Sequence[ReportTable]], str]
WRITERS: dict[str, tuple[str, Writer]] = {  # format -> suffix of the file, what it holds
    "html": ("html", html),
    "md": ("md", markdown),
    "csv": ("csv", comma_separated),
    "latex": ("tex", latex),
    "svg": ("svg", svg),
}
