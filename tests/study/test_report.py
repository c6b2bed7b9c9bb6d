"""Reports: every figure is that of the record it names, the study's tables find their cells, pages
are well formed.
"""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from study import fakes

from llq_hf import LLQError
from llq_hf.study.cover import apart, best_of
from llq_hf.study.launch import log_of
from llq_hf.study.paper import plan_of, remember, tables
from llq_hf.study.plan import Cell, expand
from llq_hf.study.plots import Point, front, plots
from llq_hf.study.record import REFUSED, Record, file_of, read_record, write_record
from llq_hf.study.report import write_report
from llq_hf.study.tables import _headline, study_tables

LLAMA = "meta-llama/Meta-Llama-3-8B"
COST = {
    "quantize": {
        "seconds": 12.5,
        "added_bytes": 2**28,
        "phases": {"linears": 10.0, "statistics": 2.5},
    },
    "disk_bytes": 2**22,
    "own": {
        "loaded_bytes": 2**22,
        "speed": {"1": {"prefill_tokens_per_second": 100.0, "decode_seconds": 0.1}},
    },
    "ratios": {
        "loaded_bytes": 0.3,
        "speed": {"1": {"prefill_seconds": 1.5, "decode_seconds": 1.25}},
    },
}


def costed(cell: Cell) -> Record:
    record = fakes.invented(cell)
    return replace(
        record,
        cost=COST if record.quantized else {},
        run={"seconds": 3.0, "threads": 1, "device": "cpu"},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a demo sweep asked for as table 1, of two rows of table 3 on the real model, and a
    refused cell.
    """
    out = tmp_path_factory.mktemp("study") / "runs"
    methods = [{"method": "rtn", "bits": [4, 3, 2]}, {"method": "quip", "bits": 2}]
    demo = {"models": ["demo"], "tasks": ["x"], "methods": methods, "presets": ["study", "best"]}
    real = {
        "models": [LLAMA],
        "tasks": ["llq_csqa", "llq_piqa"],
        "methods": [{"method": "gptq", "bits": [4, 2]}],
    }
    for cell in expand([demo, real]):
        write_record(out, costed(cell))
    refused = Cell(model="demo", method="rtn", tasks=("llq_demo",), options={"bits": 9})
    write_record(
        out, Record.of(refused, REFUSED, reason="rtn: bits=9 is outside <its> range & more")
    )
    remember(out, ["paper-table1"])
    write_report(out, out, ["html", "md", "csv", "latex"])
    return out


def shown(text: str) -> float:
    return float(text.split()[0])


def agrees(text: str, value: float) -> bool:
    """Whether the text is the value, rounded to the digits it shows."""
    mantissa = re.sub(r"e.*", "", text).lstrip("-")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (-digits + int((re.search(r"e(-?\d+)", text) or [0, "0"])[1]))
    return abs(shown(text) - value) <= 0.5000001 * unit or text == f"{value:.3g}"


def test_every_figure_of_the_csv_stands_in_its_record(runs: Path) -> None:
    lines = list(csv.DictReader((runs / "report.csv").open()))
    traced = [line for line in lines if line["record"] and line["figure"] != "reason"]
    assert len(traced) > 100
    for line in traced:
        value = read_record(runs / line["record"]).find(line["figure"])
        assert agrees(line["text"], value * float(line["scale"])), line
    untraced = {line["table"] for line in lines if not line["record"]}
    assert untraced == {
        "records",
        "table1",
        "table3",
        "table6",
    }  # the study's figures; machines and versions


class Page(HTMLParser):
    """Tags that are open, cells with their attributes and texts."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[dict[str, str | None], str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found["href"])] if tag == "a" else []
        if tag == "td":
            self.cells.append((found, ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data.strip())


@pytest.fixture(scope="module")
def page(runs: Path) -> Page:
    page = Page()
    page.feed((runs / "report.html").read_text())
    return page


def test_the_page_is_whole_and_alone(page: Page, runs: Path) -> None:
    assert page.open == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    text = (runs / "report.html").read_text()
    outside = re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']+)""", text)
    assert outside == []
    assert text.count("<svg") == 2 * 5  # of both models
    assert "outside &lt;its&gt; range &amp; more" in text


def test_every_figure_of_the_page_stands_in_its_record(page: Page, runs: Path) -> None:
    traced = [
        (attrs, text)
        for attrs, text in page.cells
        if "data-record" in attrs and attrs["data-figure"] != "reason"
    ]
    assert len(traced) > 100
    for attrs, text in traced:
        value = read_record(file_of(runs, str(attrs["data-record"]))).find(
            str(attrs["data-figure"])
        )
        assert agrees(text, value * float(str(attrs["data-scale"]))), attrs


def test_every_record_is_in_every_format(runs: Path) -> None:
    for name in ("html", "md", "csv", "tex"):
        text = (runs / f"report.{name}").read_text().replace(r"\_", "_")
        for path in (runs / "records").glob("*.json"):
            assert path.stem in text, name


def test_cells_of_a_preset_find_their_rows() -> None:
    """Every cell that the plan of a table makes is shown in that table, in one row."""
    for table in tables().values():
        cells = expand([plan_of(table.preset)])
        records = [fakes.invented(cell) for cell in cells]
        made = [r for r in records if r.quantized or r.cell["method"] == "none"]
        rows = [(r.name, row) for r in made for row in table.rows if row.made_by(r)]
        in_rows = {name for name, _ in rows}
        listed = {
            r.name
            for r in made
            if r.cell["method"] != "none"
            or any(row.cell == {"method": "none"} for row in table.rows)
        }
        assert in_rows == listed, table.number
        assert len(rows) == len(in_rows)


def test_differences_are_marked() -> None:
    """Of table 3's GPTQ at 4 bits (published 78.4 on PIQA): better, the same within 1 %, worse."""
    cell = Cell(model=LLAMA, method="gptq", tasks=("llq_csqa",), options={"bits": 4})
    marks = {}
    for acc in (0.95, 0.785, 0.5):
        record = replace(fakes.invented(cell), results={"llq_piqa": {"acc": acc}})
        (grid,) = (grid for grid in study_tables([record], []) if grid.name == "table3")
        (line,) = (line for line in grid.lines if line.kind == "ours")
        marks[acc] = next(
            value.mark for value in line.values if value.figure == "results.llq_piqa.acc"
        )
    assert marks == {0.95: "better", 0.785: "same", 0.5: "worse"}


def test_a_bundled_model_is_never_compared_with_published_figures(runs: Path) -> None:
    records = [read_record(path) for path in (runs / "records").glob("demo-*.json")]
    grids = study_tables(records, ["paper-table1"])
    assert [grid.name for grid in grids] == ["table1"]
    assert not any(value.mark for grid in grids for line in grid.lines for value in line.values)
    assert study_tables(records, []) == []


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point(x, y, "m", "study", "") for x, y in ((2, 9), (3, 5), (3, 4), (4, 6), (5, 3), (2, 8))
    ]
    assert [(p.x, p.y) for p in front(points, lower=True)] == [(2, 8), (3, 4), (5, 3)]
    assert [(p.x, p.y) for p in front(points, lower=False)] == [(2, 9)]


def test_the_picture_for_a_readme(runs: Path, tmp_path: Path) -> None:
    """Of every model with a full-precision cell, the same bytes each time, small and white."""
    paths = [write_report(runs, tmp_path / folder, ["svg"], "cover")[0] for folder in "ab"]
    first, second = (path.read_bytes() for path in paths)
    assert (paths[0].name, first) == ("cover.svg", second)
    assert len(first) < 100_000
    text = first.decode()
    assert "fill: #ffffff" in text
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", text)
    assert {"RTN", "QuIP", "demo: perplexity above full precision"} <= set(shown)
    sizes = [float(size) for size in re.findall(r"(?:font|font-size): ([\d.]+)px", text)]
    assert min(sizes) >= 10


def test_no_picture_without_a_perplexity(tmp_path: Path) -> None:
    cell = Cell(model="m", method="rtn", tasks=("t",))
    write_record(tmp_path, replace(fakes.invented(cell), results={"t": {"acc": 0.5}}))
    with pytest.raises(LLQError, match="no record with stored bits and a perplexity"):
        write_report(tmp_path, tmp_path, ["svg"])
    assert not list(tmp_path.glob("report*"))


def test_the_line_of_a_method_is_its_better_preset() -> None:
    points = [
        Point(2.1, 9, "gptq", "study", 2),
        Point(2.1, 5, "gptq", "best", 2),
        Point(4.1, 1, "gptq", "study", 4),
        Point(4.1, 2, "gptq", "best", 4),
        Point(2, 3, "rtn", "study", 2),
    ]
    lines = best_of(points)
    assert list(lines) == ["rtn", "gptq"]
    assert [point.y for point in lines["gptq"]] == [5, 1]


def test_names_are_moved_apart() -> None:
    assert apart([0.0, 30.0, 5.0], 10, 100) == [-2.5, 30.0, 7.5]
    assert apart([96.0, 100.0, 20.0], 10, 100) == [90.0, 100.0, 20.0]
    heights = apart([50.0, 51.0, 52.0, 61.0, 10.0], 10, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(sorted(heights)))
    assert heights[0] < heights[1] < heights[2] < heights[3]


EVIL = "<script>alert(1)</script>|a$b$`c`[d](e)\\input{f}\n| g"


def test_names_of_others_stay_text(tmp_path: Path) -> None:
    """Models, labels, tasks and reasons that come from a plan, in every format."""
    out = tmp_path / "runs"
    plan = {
        "models": [EVIL],
        "tasks": [EVIL.replace(".", "")],
        "methods": [{"method": "rtn", "bits": [4, 3], "label": EVIL.replace("{f}", "{{f}}")}],
    }
    for cell in expand([plan]):
        write_record(out, costed(cell))
    refused = Cell(model=EVIL, method=EVIL, tasks=(EVIL,), options={"bits": EVIL})
    write_record(out, Record.of(refused, REFUSED, reason=EVIL))
    html, md, _, tex, _ = (
        path.read_text() for path in write_report(out, out, ["html", "md", "csv", "latex", "svg"])
    )
    assert "<script>alert" not in html + md
    assert r"\input{f}" not in re.sub("(?m)^%.*|% .*$", "", tex)
    rows = [line for line in md.splitlines() if line.startswith("| ")]
    tables = [block for block in md.split("\n\n") if block.startswith("| ")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert len(rows) == sum(len(table.splitlines()) for table in tables)
    assert not re.search(r"(?<!\\)[$`]|(?<!\\)\[d", md)
    assert r"\textless{}script\textgreater{}" in tex


@pytest.mark.parametrize("value", ["../../x", "/etc/x", "a/b", "..", "x" * 400, "", "a\nb\0"])
def test_names_never_become_paths(tmp_path: Path, value: str) -> None:
    """Neither those of a plan, nor the name in the file of a record."""
    out = tmp_path / "a" / "b" / "runs"
    for cell in (
        Cell(model="demo", method="rtn", tasks=("x",), options={"bits": value}),
        Cell(model=value, method=value, tasks=(value,), label=value),
    ):
        record = Record.of(cell, REFUSED)
        for path in (write_record(out, record), log_of(out, cell)):
            assert path.parent.parent == out
            assert cell.fingerprint in path.name
        renamed = replace(record, name=value[:40])
        assert write_record(out, renamed).parent == out / "records"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if out not in path.parents] == []


def test_an_empty_folder_and_an_unknown_format_are_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(LLQError, match="holds no records"):
        write_report(tmp_path, tmp_path, ["md"])
    with pytest.raises(LLQError, match="'html'"):
        write_report(runs, tmp_path, ["htm"])
    assert list(tmp_path.iterdir()) == []


def test_columns_of_divergence_name_it_once() -> None:
    pairs = {
        ("llq_kl", "kl"): "kl",
        ("llq_kl_ptb", "kl_p99"): "ptb kl_p99",
        ("llq_kl_c4_new", "top1_agreement"): "c4 new top1_agreement",
        ("divergence", "kl"): "divergence kl",
        ("llq_wikitext2", "token_perplexity"): "wikitext2 ppl",
        ("llq_demo_mc", "acc"): "demo acc",
    }
    assert {pair: _headline(pair) for pair in pairs} == pairs


def test_a_divergence_is_drawn_against_bits() -> None:
    """With perplexities beside it, and where it is all there is; 0 has no line."""
    cells = [Cell(model="demo", method="none", tasks=("llq_kl",))]
    cells += [
        Cell(model="demo", method="rtn", tasks=("llq_kl",), options={"bits": bits})
        for bits in (4, 3, 2)
    ]
    records = []
    for number, cell in enumerate(cells):
        kl = {"kl": 0.0 if cell.method == "none" else 0.01 * 10**number}
        records.append(replace(fakes.invented(cell), results={"llq_kl": kl}))
    (drawn,) = (plot for plot in plots(records) if plot.name == "divergence-demo")
    assert drawn.title == "demo: KL divergence against stored bits"
    assert drawn.caption.startswith("KL divergence of llq_kl against the bits")
    assert "full precision" not in drawn.svg
    assert "perplexity-demo" not in [plot.name for plot in plots(records)]
