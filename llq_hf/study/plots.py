"""The plots of a report, as SVG text to embed: quality against stored bits, cost, layer errors."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..methods import METHODS
from .record import DONE, Record
from .tables import ACCURACY, DIVERGENCE, KINDS, PERPLEXITY, headlines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, HAIR = "#1b2430", "#5b6675", "#d8dde3"
# These colours differ in lightness too, for print and for the colour-blind. Methods that share a
# colour have different markers.
COLOURS = (
    "#0b5c8a",
    "#c2410c",
    "#15803d",
    "#7e22ce",
    "#b45309",
    "#0e7490",
    "#be123c",
    "#4d7c0f",
    "#3730a3",
    "#71717a",
    "#0f172a",
    "#a21caf",
    "#1d4ed8",
    "#854d0e",
    "#047857",
)
MARKERS = "osD^vP*Xhd<>p8H"
# Colour and marker of the methods, in their order.
LOOKS = [(COLOURS[i % len(COLOURS)], marker) for i, marker in enumerate(MARKERS)]
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",  # text stays text: it is set in the page's font and can be searched
    "svg.hashsalt": "llq",  # the same records give the same bytes
    "font.family": ["Helvetica Neue", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": HAIR,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    method: str
    preset: str
    bits: float  # nominal

    @property
    def label(self) -> str:
        return f"{self.method} {self.bits:g}"

    @property
    def look(self) -> tuple[str, str]:
        """Colour and marker."""
        return LOOKS[list(METHODS).index(self.method) % len(LOOKS)]


def plots(records: Sequence[Record]) -> list[Plot]:
    """All plots that the records have figures for."""
    with style():
        return [plot for model, own in by_model(records).items() for plot in _plots_of(own, model)]


@contextmanager
def style(**over: Any) -> Iterator[None]:
    """Matplotlib's settings for all that is drawn here; `over` goes over STYLE."""
    import logging

    import matplotlib

    # Not every font of the list is installed everywhere.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    settings: dict[Any, Any] = {**STYLE, **over}
    with matplotlib.rc_context(settings):
        yield


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Model -> its finished records, by the models' names."""
    models: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: str(record.cell["model"])):
        if record.status == DONE:
            models.setdefault(str(record.cell["model"]), []).append(record)
    return models


def _plots_of(records: list[Record], model: str) -> list[Plot]:
    made = [
        *(quality(records, model, kind) for kind in (PERPLEXITY, DIVERGENCE, ACCURACY)),
        effort(records, model),
        speed(records, model),
        heat_map(records, model),
    ]
    return [plot for plot in made if plot is not None]


# --- quality against bits -------------------------------------------------------------------------


def quality(records: list[Record], model: str, kind: str) -> Plot | None:
    """Perplexity, KL divergence or accuracy against stored bits, with the Pareto front.

    A second panel shows the perplexities near the best one.
    """
    path = headline_of(records, kind)
    points = points_of(records, "quantized.stored_bits", path)
    if not points:
        return None
    lower = kind != ACCURACY
    name = {DIVERGENCE: "KL divergence", ACCURACY: f"{kind} (%)"}.get(kind, kind)
    task = path.split(".")[1]
    scale = 1 if lower else 100
    points = [replace(p, y=scale * p.y) for p in points]
    dense = None if kind == DIVERGENCE else full_precision(records, path, scale)
    best = front(points, lower)
    floor = min([p.y for p in points] + ([] if dense is None else [dense]))
    near = [p for p in points if p.y <= NEAR * floor] if kind == PERPLEXITY else []
    figure, panels = _canvas(panels=2 if 1 < len(near) < len(points) else 1)
    _quality_panel(panels[0], points, best, dense)
    if lower:
        _log(panels[0], "y", [p.y for p in points])
    panels[0].set_ylabel(f"{task} {name}")
    if len(panels) == 2:
        _quality_panel(panels[1], near, [p for p in best if p in near], dense)
        panels[1].set_title(
            f"the same within {100 * NEAR - 100:.0f} % of the best",
            fontsize=10,
            color=MUTED,
            loc="left",
        )
    _legend(figure, panels[-1], points)
    _thin_labels(figure, panels)
    caption = (
        f"{name[0].upper()}{name[1:]} of {task} against the bits that the file really holds. The "
        "line is the Pareto front: no cell with fewer stored bits is "
        f"{'lower' if lower else 'higher'}. Filled: preset best; open: study."
    )
    title = f"{model}: {name} against stored bits"
    return Plot(f"{kind}-{model}", title, caption, svg_of(figure))


NEAR = 1.15  # times the best perplexity: what the second panel shows


def _quality_panel(axes: Axes, points: list[Point], best: list[Point], dense: float | None) -> None:
    _scatter(axes, points)
    axes.step(
        [p.x for p in best], [p.y for p in best], where="post", color=INK, linewidth=1, zorder=1
    )
    for point in best:
        text = axes.annotate(
            point.label,
            (point.x, point.y),
            (6, 6),
            textcoords="offset points",
            fontsize=8,
            zorder=4,
        )
        text.set_bbox({"color": "white", "alpha": 0.8, "pad": 1})
    if dense is not None:
        _line(axes, dense, "full precision")
    axes.set_xscale("log", base=2)
    ticks = [
        t
        for t in (1, 1.5, 2, 3, 4, 6, 8)
        if min(p.x for p in points) / 1.3 < t < max(p.x for p in points) * 1.3
    ]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("stored bits per quantized weight")


def _thin_labels(figure: Figure, panels: list[Axes]) -> None:
    """Hides the labels that would lie over one with fewer bits, or over that of a line."""
    figure.draw_without_rendering()  # only then is it known where anything lies
    for axes in panels:
        kept: list[Any] = []
        # The texts of lines, which are no annotations, are always kept.
        for text in sorted(axes.texts, key=lambda text: hasattr(text, "xyann")):
            box = text.get_window_extent()
            if any(box.overlaps(other) for other in kept):
                text.set_visible(False)
            else:
                kept.append(box)


def front(points: list[Point], lower: bool) -> list[Point]:
    """The points that no other point with as few bits or fewer beats, in the order of bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y if lower else -p.y)):
        if not best or (point.y < best[-1].y if lower else point.y > best[-1].y):
            best.append(point)
    return best


# --- cost -----------------------------------------------------------------------------------------


def effort(records: list[Record], model: str) -> Plot | None:
    """Perplexity against the seconds that quantization took."""
    path = headline_of(records, PERPLEXITY)
    points = points_of(records, "cost.quantize.seconds", path)
    if not points:
        return None
    figure, (axes,) = _canvas()
    _scatter(axes, points)
    dense = full_precision(records, path)
    if dense is not None:
        _line(axes, dense, "full precision")
    _log(axes, "x", [p.x for p in points])
    _log(axes, "y", [p.y for p in points])
    axes.set_xlabel("seconds to quantize, calibration included")
    axes.set_ylabel(f"{path.split('.')[1]} perplexity")
    _legend(figure, axes, points)
    caption = (
        "Perplexity against the time that quantization took on the machine of the record; "
        "all widths of all methods."
    )
    return Plot(f"effort-{model}", f"{model}: perplexity against time", caption, svg_of(figure))


def speed(records: list[Record], model: str) -> Plot | None:
    """Decode time against memory, both over the full-precision model."""
    points = points_of(records, "cost.ratios.loaded_bytes", "cost.ratios.speed.1.decode_seconds")
    if not points:
        return None
    figure, (axes,) = _canvas()
    _scatter(axes, points)
    _line(axes, 1, "full precision")
    _log(axes, "y", [*(p.y for p in points), 1])
    axes.set_xlabel("loaded memory, over full precision")
    axes.set_ylabel("seconds per token, batch 1,\nover full precision")
    _legend(figure, axes, points)
    caption = (
        "Decoding with the packed model beside the full-precision one in the same run. "
        "Below the line is quicker."
    )
    return Plot(f"speed-{model}", f"{model}: decode time against memory", caption, svg_of(figure))


# --- errors ---------------------------------------------------------------------------------------


def heat_map(records: list[Record], model: str) -> Plot | None:
    """Relative squared error of the weight of every linear, cell by cell."""
    import numpy as np

    rows = {
        r.title: r.quantized["linears"]
        for r in sorted(records, key=_by_error)
        if r.quantized.get("linears")
    }
    if not rows:
        return None
    names = [linear["name"] for linear in next(iter(rows.values()))]
    errors = [
        [linear.get("weight_error", math.nan) for linear in linears] for linears in rows.values()
    ]
    shown = np.log10(np.clip(np.array([e for e in errors if len(e) == len(names)]), 1e-12, None))
    figure, (axes,) = _canvas(height=max(1.4 + 0.17 * len(shown), 2.4))
    axes.grid(False)
    image = axes.imshow(shown, aspect="auto", cmap="YlOrRd", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
    _name_linears(axes, names)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("log10 of the relative squared error", fontsize=8)
    caption = (
        "Error of every linear's weight, |W - Ŵ|² / |W|², least at the top; "
        "from the checkpoints' own reports."
    )
    return Plot(f"errors-{model}", f"{model}: error, linear by linear", caption, svg_of(figure))


def _by_error(record: Record) -> float:
    errors = [linear.get("weight_error", 0.0) for linear in record.quantized.get("linears", [])]
    return float(sum(errors)) / max(len(errors), 1)


def _name_linears(axes: Axes, names: list[str]) -> None:
    """Every linear where there is room for it, else every block."""
    blocks = [next((word for word in name.split(".") if word.isdigit()), "") for name in names]
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(blocks)) if a != b)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    if len(names) <= 60:
        short = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
    else:
        every = max(len(starts) // 40, 1)
        axes.set_xticks(starts[::every], [blocks[start] for start in starts[::every]], fontsize=7)
    axes.set_xlabel(f"linears of {len(starts)} decoder blocks, in order")


# --- shared ---------------------------------------------------------------------------------------


def headline_of(records: Sequence[Record], kind: str) -> str:
    """Path in a record to the figure of this kind that the records are judged by."""
    paths = [
        f"results.{task}.{metric}"
        for task, metric in headlines(records)
        if KINDS.get(metric) == kind
    ]
    return paths[0] if paths else "results"


def points_of(records: Sequence[Record], x: str, y: str) -> list[Point]:
    """A point for each quantized cell that has both figures; x and y are paths in a record."""
    points = []
    for record in records:
        pair = (record.find(x), record.find(y))
        if record.quantized and all(isinstance(value, int | float) for value in pair):
            cell, bits = record.cell, record.quantized["nominal_bits"]
            points.append(Point(*pair, cell["method"], cell["preset"], bits))
    return [point for point in points if math.isfinite(point.y)]


def _scatter(axes: Axes, points: list[Point]) -> None:
    for point in points:
        colour, marker = point.look
        face = colour if point.preset == "best" else "white"
        axes.plot(
            point.x, point.y, marker, color=colour, markerfacecolor=face, markersize=6.5, zorder=3
        )


def _legend(figure: Figure, axes: Axes, points: list[Point]) -> None:
    """Every method that the plot shows, in the order of the methods."""
    looks = {point.method: point.look for point in points}
    for method in sorted(looks, key=list(METHODS).index):
        colour, marker = looks[method]
        axes.plot([], [], marker, color=colour, label=method)
    figure.legend(loc="outside right upper", fontsize=9, handletextpad=0.2)


def full_precision(records: Sequence[Record], path: str, scale: float = 1) -> float | None:
    """The figure of the full-precision cell, if there is one."""
    figures = [record.find(path) for record in records if not record.quantized]
    return next((figure * scale for figure in figures if figure is not None), None)


def _line(axes: Axes, value: float, text: str) -> None:
    axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.text(
        1, value, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
    )


def _log(axes: Axes, name: str, values: list[float]) -> None:
    """Logarithmic, with plain numbers, where the values span more than a factor of three."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if max(values) <= 3 * min(values):
        return
    axes.set(**{f"{name}scale": "log"})
    axis: Any = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _canvas(height: float = 4.2, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def svg_of(figure: Figure, transparent: bool = True) -> str:
    """The figure as an SVG element. The same figure gives the same text."""
    text = io.StringIO()
    nothing = {"Date": None, "Creator": None}
    figure.savefig(text, format="svg", transparent=transparent, metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]
