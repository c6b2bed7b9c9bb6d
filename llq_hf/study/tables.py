"""The tables of a report. Each is made once and written in every format.

Every figure knows the record it stands in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..common.markup import file_name
from . import paper
from .paper import Column, PublishedRow, PublishedTable
from .plan import figure_for, stand_ins
from .record import DONE, Record

BETTER, WORSE, SAME = "better", "worse", "same"
LEVEL_SIGNS = {BETTER: "▲", WORSE: "▼", SAME: "≈", "": ""}


@dataclass(frozen=True)
class Value:
    """What one place of a table shows. figure: where it stands in the record of that name."""

    text: str = ""
    record: str = ""
    figure: str = ""
    scale: float = 1.0
    mark: str = ""  # against the published figure

    @property
    def signed(self) -> str:
        return f"{self.text} {LEVEL_SIGNS[self.mark]}".strip()


@dataclass(frozen=True)
class Line:
    values: list[Value]
    kind: str = ""  # "published" and "ours" stand below each other in the study's tables


@dataclass(frozen=True)
class ReportTable:
    name: str  # of the file, and of the place in the page
    title: str
    head: list[str]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    words: int = 1  # leading columns of text, the others are figures


def figure(record: Record, path: str, show: Callable[[Any], str], scale: float = 1.0) -> Value:
    """The figure at `path` of a record, shown; empty where the record has none."""
    value = record.find(path)
    if not isinstance(value, int | float):
        return Value()
    return Value(show(value * scale), record.name, path, scale)


def plain(value: float) -> str:
    return f"{value:g}"


def three_digits(value: float) -> str:
    return f"{value:.3f}"


def four_digits(value: float) -> str:
    return f"{value:.4f}"


def perplexity(value: float) -> str:
    return three_digits(value) if value < 1000 else f"{value:.1e}".replace("e+0", "e")


def percent(value: float) -> str:
    return f"{value:.1f}"


def amount(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# --- all cells ------------------------------------------------------------------------------------

PERPLEXITY = "perplexity"
DIVERGENCE = "divergence"
LOSS = "loss"
ACCURACY = "accuracy"
AGREEMENT = "agreement"
RANKS = (PERPLEXITY, DIVERGENCE, AGREEMENT, LOSS, ACCURACY)
KINDS = {  # of the metrics
    "token_perplexity": PERPLEXITY,
    "kl": DIVERGENCE,
    "kl_p99": DIVERGENCE,
    "top1_agreement": AGREEMENT,
    "loss": LOSS,
    "acc": ACCURACY,
    "accuracy": ACCURACY,
}
SHOWN: dict[str | None, tuple[Callable[[float], str], float]] = {  # how, and times what
    PERPLEXITY: (perplexity, 1.0),
    DIVERGENCE: (four_digits, 1.0),
    AGREEMENT: (percent, 100.0),
    LOSS: (three_digits, 1.0),
    ACCURACY: (percent, 100.0),
    None: (perplexity, 1.0),  # any other metric
}


def headlines(records: Iterable[Record]) -> list[tuple[str, str]]:
    """(task, metric) of what the records are judged by: perplexities first, accuracies last.

    Within each kind, the tasks that were asked for come first, in that order. Where no metric is of
    a kind that we know: all metrics.
    """
    records = list(records)
    asked = [task for record in records for task in record.cell["tasks"]]
    pairs = {
        (task, metric) for r in records for task, metrics in r.results.items() for metric in metrics
    }
    known = [pair for pair in pairs if pair[1] in KINDS]
    chosen = known or [pair for pair in pairs if "stderr" not in pair[1]]

    def rank(pair: tuple[str, str]) -> tuple[Any, ...]:
        task, metric = pair
        kind = RANKS.index(KINDS[metric]) if metric in KINDS else len(RANKS)
        place = asked.index(task) if task in asked else len(asked)
        return (kind, place, task.count("_"), pair)

    return sorted(chosen, key=rank)


def overview(records: Sequence[Record]) -> list[ReportTable]:
    """A table per model: every finished cell with its bits and figures."""
    done = [r for r in records if r.status == DONE]
    by_model = groupby(
        sorted(done, key=lambda r: r.cell["model"]), key=lambda r: str(r.cell["model"])
    )
    return [_overview(model, list(group)) for model, group in by_model]


def _overview(model: str, records: list[Record]) -> ReportTable:
    columns = headlines(records)[:10]
    bits = ["nominal bits", "stored bits", "whole model"]
    head = ["cell", *bits, *map(_headline, columns), "seconds"]
    lines = [_overview_line(record, columns) for record in sorted(records, key=_order)]
    name = f"cells-{file_name(model)}"
    return ReportTable(name, f"All cells of {model}", head, lines, [OVERVIEW_NOTE])


OVERVIEW_NOTE = "Seconds: of quantizing, calibration included."


def _headline(pair: tuple[str, str]) -> str:
    task, metric = pair
    if KINDS.get(metric) in (DIVERGENCE, AGREEMENT):  # the metric says it
        task = "_".join(word for word in task.split("_") if word != "kl")
    task = task.removeprefix("llq").removesuffix("_ppl").removesuffix("_mc")
    words = [*task.split("_"), "ppl" if KINDS.get(metric) == PERPLEXITY else metric]
    return " ".join(filter(None, words))


def _overview_line(record: Record, columns: list[tuple[str, str]]) -> Line:
    values = [
        Value(record.title),
        figure(record, "quantized.nominal_bits", plain),
        figure(record, "quantized.stored_bits", three_digits),
        figure(record, "quantized.whole_model_bits", three_digits),
    ]
    for task, metric in columns:
        values.append(figure(record, f"results.{task}.{metric}", *SHOWN[KINDS.get(metric)]))
    return Line([*values, figure(record, "cost.quantize.seconds", amount)])


def _order(record: Record) -> tuple[Any, ...]:
    """Full precision, then by method, widest first, preset study before best."""
    width = record.quantized.get("nominal_bits", 0)
    return (
        bool(record.quantized),
        record.cell["method"],
        -width,
        record.cell["preset"] != "study",
        record.name,
    )


# --- the study's tables ---------------------------------------------------------------------------


def study_tables(records: Sequence[Record], asked: Sequence[str]) -> list[ReportTable]:
    """The study's tables that were asked for, or that we have figures for.

    asked: names of presets. A bundled model stands in for a table's own model only where that table
    was asked for.
    """
    bundled = sorted({str(record.cell["model"]) for record in records} & set(stand_ins()))
    made = [
        (table, _study_table(table, records, bundled if table.preset in asked else []))
        for table in paper.tables().values()
    ]
    return [shown for table, (shown, rows) in made if table.preset in asked or rows]


def _study_table(
    table: PublishedTable, records: Sequence[Record], bundled: list[str]
) -> tuple[ReportTable, int]:
    """The table with our lines in it, and how many quantized rows have some."""
    identity = list(table.rows[0].identity)
    head = ["method", *identity, "", "stored bits", *(column.name for column in table.columns)]
    lines: list[Line] = []
    rows = 0
    for row in table.rows:
        names = [Value(row.label), *(Value(str(row.identity[key])) for key in identity)]
        published = [
            Value(_show_published(value, c))
            for value, c in zip(table.published(row), table.columns, strict=True)
        ]
        lines.append(Line([*names, Value("published"), Value(), *published], "published"))
        matching = paper.records_of(row, list(records))
        ours = [
            *_ours(table, row, matching),
            *(_stand_in(table, r) for r in matching if r.cell["model"] in bundled),
        ]
        ours = [values for values in ours if any(value.text for value in values[2:])]
        lines += [Line([*(Value() for _ in names), *values], "ours") for values in ours]
        rows += bool(ours) and any(record.quantized for record in matching)
    notes = [f"Published: {table.source}.", *table.notes, *_stand_in_note(bundled)]
    title = f"Table {table.number}. {table.title}"
    return ReportTable(
        f"table{table.number}", title, head, lines, notes, words=len(identity) + 2
    ), rows


def _stand_in_note(bundled: list[str]) -> list[str]:
    return [
        f"{model} ran in place of the study's models, on its own task "
        f"{stand_ins()[model]['task']}; each figure stands in the first column of its kind. It is "
        "a figure of another model, so no difference is marked."
        for model in bundled
    ]


def _show_published(value: float | str | None, column: Column) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if value >= 1000 and column.within is not None and column.better == "lower":
        return f"{value:.1e}".replace("e+0", "e")
    return f"{value:g}" if column.within is None or round(value, 1) != value else f"{value:.1f}"


def _ours(
    table: PublishedTable, row: PublishedRow, matching: list[Record]
) -> Iterable[list[Value]]:
    """Our lines of a row: one per preset and seed, with the records of all the table's models."""
    lines: dict[tuple[str, int], dict[str, Record]] = defaultdict(dict)
    for record in matching:
        if record.cell["model"] in table.models:
            line = lines[record.cell["preset"], record.cell["seed"]]
            line.setdefault(record.cell["model"], record)
    for (preset, seed), by_model in lines.items():
        first = next(iter(by_model.values()))
        words = [
            "ours",
            *([preset] if preset != "study" else []),
            *([f"seed {seed}"] if seed else []),
        ]
        values = [Value(", ".join(words)), figure(first, "quantized.stored_bits", three_digits)]
        for column, printed in zip(table.columns, table.published(row), strict=True):
            values.append(
                _marked_figure(by_model.get(column.model or table.models[0]), column, printed)
            )
        yield values


def _marked_figure(record: Record | None, column: Column, printed: float | str | None) -> Value:
    if record is None:
        return Value()
    show = amount if column.within is None else percent if column.better == "higher" else perplexity
    value = figure(record, column.figure, show, column.scale)
    if column.within is None or not value.text or not isinstance(printed, int | float):
        return value
    difference = record.find(column.figure) * column.scale / printed - 1
    better = (difference < 0) == (column.better == "lower")
    mark = SAME if abs(difference) <= column.within else BETTER if better else WORSE
    return Value(value.text, value.record, value.figure, value.scale, mark)


def _stand_in(table: PublishedTable, record: Record) -> list[Value]:
    preset = record.cell["preset"]
    name = f"{record.cell['model']}{'' if preset == 'study' else f', {preset}'}"
    values = [Value(name), figure(record, "quantized.stored_bits", three_digits)]
    shown = set()
    for column in table.columns:
        path = figure_for(record.cell["model"], column.figure)
        share = column.better == "higher" and column.within is not None
        show = amount if column.within is None else percent if share else perplexity
        known = path is None or path in shown
        values.append(
            Value() if known else figure(record, str(path), show, 100.0 if share else column.scale)
        )
        shown.add(path)
    return values


# --- cost -----------------------------------------------------------------------------------------


def cost(records: Sequence[Record]) -> ReportTable:
    """Time, memory, size and speed of every finished cell."""
    done = sorted(
        (r for r in records if r.status == DONE), key=lambda r: (r.cell["model"], *_order(r))
    )
    columns = _cost_columns(done)
    lines = [
        Line(
            [
                Value(record.cell["model"]),
                Value(record.title),
                *(figure(record, path, amount, scale) for _, path, scale in columns),
            ]
        )
        for record in done
    ]
    head = ["model", "cell", *(name for name, _, _ in columns)]
    return ReportTable("cost", "Cost", head, lines, COST_NOTES, words=2)


def _cost_columns(records: Sequence[Record]) -> list[tuple[str, str, float]]:
    """(head, place in a record, scale) of what was measured."""
    columns = [
        ("quantized in (s)", "cost.quantize.seconds", 1.0),
        ("processor (s)", "cost.quantize.processor_seconds", 1.0),
        ("memory (MiB)", "cost.quantize.added_bytes", 2**-20),
    ]
    if any(r.find("cost.finetune") for r in records):
        columns += [
            ("fine-tuned in (s)", "cost.finetune.seconds", 1.0),
            ("of that processor (s)", "cost.finetune.processor_seconds", 1.0),
        ]
    columns += [
        ("on disk (MiB)", "cost.disk_bytes", 2**-20),
        ("loaded (MiB)", "cost.own.loaded_bytes", 2**-20),
    ]
    for batch in sorted({b for r in records for b in (r.find("cost.own.speed") or {})}, key=int):
        for phase in ("prefill", "decode"):
            speed = f"cost.own.speed.{batch}.{phase}_tokens_per_second"
            columns.append((f"{phase} tok/s, batch {batch}", speed, 1.0))
            columns.append(("x the time", f"cost.ratios.speed.{batch}.{phase}_seconds", 1.0))
    return columns


COST_NOTES = [
    "Quantized in: seconds of the run that made the checkpoint, calibration included. Processor: "
    "seconds of all its threads together. Memory: what that run added at its peak to what the "
    "process held before it, resident on a CPU, allocated on a GPU.",
    "x the time: over the full-precision model, which was timed in turn with this one in the same "
    "run; above 1 is slower. Medians of the rounds that the record lists.",
]


def phases(records: Sequence[Record]) -> ReportTable:
    """Where the seconds of quantization went."""
    made = sorted(
        (r for r in records if r.find("cost.quantize.phases")),
        key=lambda r: (r.cell["model"], *_order(r)),
    )
    totals: dict[str, float] = defaultdict(float)
    for record in made:
        for phase, seconds in record.find("cost.quantize.phases").items():
            totals[phase] += seconds
    names = sorted(totals, key=lambda phase: -totals[phase])[:8]
    lines = [
        Line(
            [Value(r.title), *(figure(r, f"cost.quantize.phases.{name}", amount) for name in names)]
        )
        for r in made
    ]
    return ReportTable("phases", "Quantization by phase (seconds)", ["cell", *names], lines)


# --- what did not run, and where everything stands ------------------------------------------------


def unfinished(records: Sequence[Record]) -> ReportTable:
    """Refused and failed cells, each with its reason."""
    lines = [
        Line(
            [
                Value(r.cell["model"]),
                Value(r.title),
                Value(r.status),
                Value(r.reason or "", r.name, "reason"),
            ]
        )
        for r in records
        if r.status != DONE
    ]
    return ReportTable(
        "unfinished", "Refused and failed", ["model", "cell", "status", "reason"], lines, words=4
    )


def provenance(records: Sequence[Record]) -> ReportTable:
    """Every record: its file, the machine and the versions."""
    head = ["record", "status", "began", "seconds", "device", "threads", "versions"]
    lines = [
        Line(
            [
                Value(f"records/{r.name}.json"),
                Value(r.status),
                Value(str(r.run.get("began", ""))),
                figure(r, "run.seconds", amount),
                Value(f"{r.run.get('device', '')} ({r.run.get('processor', '')})" if r.run else ""),
                figure(r, "run.threads", plain),
                Value(", ".join(f"{k} {v}" for k, v in r.run.get("versions", {}).items())),
            ]
        )
        for r in records
    ]
    return ReportTable("records", "Records", head, lines, words=1)
