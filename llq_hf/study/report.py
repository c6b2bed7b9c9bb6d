"""Writes the report of a folder of records: one HTML page that holds all it shows, Markdown, CSV,
LaTeX.

report.html   tables, plots; every figure names its record on hover
report.md     the tables, with the record of each line
report.csv    every figure in a line of its own: table, line, column, text, record file, place in it, scale
report.tex    the tables for booktabs and longtable, with the record of each line as a comment
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.errors import LLQError
from ..common.words import nearest
from .paper import asked_for
from .plots import Plot, plots
from .record import DONE, FAILED, REFUSED, Record, read_records
from .tables import (
    BETTER,
    LEVEL_SIGNS,
    SAME,
    WORSE,
    Grid,
    Line,
    cost,
    overview,
    phases,
    provenance,
    study_tables,
)
from .tables import unfinished as unfinished_grid

MARKS = (
    f"{LEVEL_SIGNS[SAME]} within the margin of the published figure, {LEVEL_SIGNS[BETTER]} better, "
    f"{LEVEL_SIGNS[WORSE]} worse (2 % of a perplexity, 1 % of an accuracy)."
)


def write_report(out: Path, into: Path, formats: Sequence[str]) -> list[Path]:
    """Report files of the study in `out`, written into a folder; their paths."""
    for name in formats:
        if name not in WRITERS:
            raise LLQError(
                f"there is no format {name!r}{nearest(name, WRITERS)}; there are: {', '.join(WRITERS)}"
            )
    records = read_records(out)
    grids = all_grids(records, asked_for(out))
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name in formats:
        suffix, write = WRITERS[name]
        path = into / f"report.{suffix}"
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(write(out, records, grids), encoding="utf-8")
        os.replace(draft, path)
        written.append(path)
    return written


def all_grids(records: Sequence[Record], asked: Sequence[str]) -> list[Grid]:
    """The report's tables, those that have lines."""
    tables = [*overview(records), *study_tables(records, asked), cost(records), phases(records)]
    return [grid for grid in [*tables, unfinished_grid(records), provenance(records)] if grid.lines]


# --- one page -------------------------------------------------------------------------------------


def html(out: Path, records: Sequence[Record], grids: Sequence[Grid]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, undefined=StrictUndefined).get_template(
        "report.html"
    )
    drawn: list[Plot] = plots(records)
    return template.render(
        title=_title(out),
        facts=_facts(records),
        plots=drawn,
        grids=_noted(grids),
        signs=LEVEL_SIGNS,
    )


def _title(out: Path) -> str:
    return f"Quantization study: {out.resolve().name}"


def _facts(records: Sequence[Record]) -> list[tuple[str, int]]:
    """What stands at the head of the page."""
    counts = Counter(record.status for record in records)
    models = {record.cell["model"] for record in records}
    methods = {record.quantized["method"] for record in records if record.quantized}
    names = [
        (f"cells {status}", counts[status]) for status in (DONE, REFUSED, FAILED) if counts[status]
    ]
    return [*names, ("models", len(models)), ("methods", len(methods))]


def _noted(grids: Sequence[Grid]) -> list[Grid]:
    """The grids, those with marks explaining them."""
    marked = [any(value.mark for line in grid.lines for value in line.values) for grid in grids]
    return [
        Grid(g.name, g.title, g.head, g.lines, [MARKS, *g.notes] if has else g.notes, g.words)
        for g, has in zip(grids, marked, strict=True)
    ]


# --- text -----------------------------------------------------------------------------------------


def markdown(out: Path, records: Sequence[Record], grids: Sequence[Grid]) -> str:
    parts = [f"# {_title(out)}\n"]
    for grid in _noted(grids):
        rule = ["---" if i < grid.words else "---:" for i in range(len(grid.head))]
        rows = [[*(value.signed for value in line.values), _record_of(line)] for line in grid.lines]
        table = [[*grid.head, "record"], [*rule, "---"], *rows]
        lines = [
            "| " + " | ".join(text.replace("|", r"\|") for text in row) + " |" for row in table
        ]
        parts.append("\n".join([f"## {grid.title}\n", *lines, "", *grid.notes, ""]))
    return "\n".join(parts)


def _record_of(line: Line) -> str:
    return ", ".join(dict.fromkeys(value.record for value in line.values if value.record))


def comma_separated(out: Path, records: Sequence[Record], grids: Sequence[Grid]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["table", "line", "label", "column", "text", "mark", "record", "figure", "scale"]
    )
    for grid in grids:
        for number, line in enumerate(grid.lines, start=1):
            label = " ".join(filter(None, (value.text for value in line.values[: grid.words])))
            for name, value in zip(grid.head[grid.words :], line.values[grid.words :], strict=True):
                if value.text:
                    file = f"records/{value.record}.json" if value.record else ""
                    traced = [file, value.figure, value.scale if file else ""]
                    writer.writerow(
                        [grid.name, number, label, name, value.text, value.mark, *traced]
                    )
    return text.getvalue()


LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
    | {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "≈": r"$\approx$"}
)


def latex(out: Path, records: Sequence[Record], grids: Sequence[Grid]) -> str:
    """Tables to \\input; they need booktabs, longtable, amssymb."""
    return "\n".join(_latex_table(grid) for grid in _noted(grids))


def _latex_table(grid: Grid) -> str:
    columns = "l" * grid.words + "r" * (len(grid.head) - grid.words)
    head = " & ".join(rf"\textbf{{{name.translate(LATEX)}}}" for name in grid.head)
    lines = [
        " & ".join(value.signed.translate(LATEX) for value in line.values)
        + rf" \\ % {_record_of(line)}"
        for line in grid.lines
    ]
    notes = [note.translate(LATEX) + r"\par" for note in grid.notes]
    return "\n".join(
        [
            f"% {grid.title}",
            rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{grid.title.translate(LATEX)}}}\label{{tab:{grid.name}}} \\",
            rf"\toprule {head} \\ \midrule \endhead",
            *lines,
            r"\bottomrule",
            r"\end{longtable}",
            *notes,
            "",
        ]
    )


Writer = Callable[[Path, Sequence[Record], Sequence[Grid]], str]
WRITERS: dict[str, tuple[str, Writer]] = {
    "html": ("html", html),
    "md": ("md", markdown),
    "csv": ("csv", comma_separated),
    "latex": ("tex", latex),
}
