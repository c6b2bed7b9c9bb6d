"""The plots of a report, as SVG text to embed: quality against stored bits, cost, errors layer by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .grids import ACCURACY, PERPLEXITY, headlines
from .record import DONE, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, HAIR = "#1b2430", "#5b6675", "#d8dde3"
# Colours that differ in lightness too, for print and for the colour-blind; markers tell apart what colours do not.
COLOURS = ("#0b5c8a", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be123c", "#4d7c0f", "#3730a3", "#71717a")
MARKERS = "osD^vP*Xhd<>p"
STYLE: dict[Any, Any] = {
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
    label: str


def plots(records: Sequence[Record]) -> list[Plot]:
    """All plots that the records have figures for."""
    import logging

    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not every font of the list is everywhere
    done = [record for record in records if record.status == DONE]
    models = sorted({str(record.cell["model"]) for record in done})
    with matplotlib.rc_context(STYLE):
        found = [plot for model in models for plot in _of_model([r for r in done if r.cell["model"] == model], model)]
    return found


def _of_model(records: list[Record], model: str) -> list[Plot]:
    made = [
        *(quality(records, model, metric) for metric in (PERPLEXITY, ACCURACY)),
        effort(records, model),
        speed(records, model),
        heat_map(records, model),
    ]
    return [plot for plot in made if plot is not None]


# --- quality against bits -------------------------------------------------------------------------------------------


def quality(records: list[Record], model: str, metric: str) -> Plot | None:
    """Perplexity or accuracy against stored bits, with the Pareto front."""
    task = next((task for task, name in headlines(records) if name == metric), None)
    points = _points(records, "quantized.stored_bits", f"results.{task}.{metric}")
    if not points:
        return None
    lower, name = metric == PERPLEXITY, "perplexity" if metric == PERPLEXITY else "accuracy (%)"
    if not lower:
        points = [Point(p.x, 100 * p.y, p.method, p.preset, p.label) for p in points]
    figure, axes = _canvas()
    _scatter(axes, points)
    best = front(points, lower)
    axes.step([p.x for p in best], [p.y for p in best], where="post", color=INK, linewidth=1, zorder=1)
    for point in best:
        axes.annotate(
            point.label, (point.x, point.y), xytext=(4, -11 if lower else 6), textcoords="offset points", fontsize=8
        )
    _full_precision(axes, records, f"results.{task}.{metric}", 1 if lower else 100)
    if lower:
        _log(axes, "y", [p.y for p in points])
    axes.set_xlabel("stored bits per quantized weight")
    axes.set_ylabel(f"{task} {name}")
    caption = (
        f"{name.capitalize()} of {task} against the bits that the file really holds. The line is the Pareto front: no "
        f"cell with fewer stored bits is {'lower' if lower else 'higher'}. Filled: preset best; open: study."
    )
    return Plot(f"{metric}-{model}", f"{model}: {name} against stored bits", caption, _svg(figure))


def front(points: list[Point], lower: bool) -> list[Point]:
    """The points that no point with as few bits beats, by bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y if lower else -p.y)):
        if not best or (point.y < best[-1].y if lower else point.y > best[-1].y):
            best.append(point)
    return best


# --- cost -----------------------------------------------------------------------------------------------------------


def effort(records: list[Record], model: str) -> Plot | None:
    """Perplexity against the seconds that quantization took."""
    task = next((task for task, name in headlines(records) if name == PERPLEXITY), None)
    points = _points(records, "cost.quantize.seconds", f"results.{task}.{PERPLEXITY}")
    if not points:
        return None
    figure, axes = _canvas()
    _scatter(axes, points)
    _full_precision(axes, records, f"results.{task}.{PERPLEXITY}", 1)
    _log(axes, "x", [p.x for p in points])
    _log(axes, "y", [p.y for p in points])
    axes.set_xlabel("seconds to quantize, calibration included")
    axes.set_ylabel(f"{task} perplexity")
    return Plot(f"effort-{model}", f"{model}: perplexity against time", "Upper left: quick and bad.", _svg(figure))


def speed(records: list[Record], model: str) -> Plot | None:
    """Decode speed against memory, both over the full-precision model."""
    points = _points(records, "cost.ratios.loaded_bytes", "cost.ratios.speed.1.decode_seconds")
    if not points:
        return None
    figure, axes = _canvas()
    _scatter(axes, points)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1, 1, "full precision", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    _log(axes, "y", [*(p.y for p in points), 1])
    axes.set_xlabel("loaded memory, over full precision")
    axes.set_ylabel("seconds per token at batch 1, over full precision")
    caption = "Decoding, packed model beside the full-precision one in the same run. Below the line is quicker."
    return Plot(f"speed-{model}", f"{model}: decode time against memory", caption, _svg(figure))


# --- errors ---------------------------------------------------------------------------------------------------------


def heat_map(records: list[Record], model: str) -> Plot | None:
    """Relative squared error of the weight of every linear, cell by cell."""
    import numpy as np

    rows = {r.title: r.quantized["linears"] for r in sorted(records, key=_by_error) if r.quantized.get("linears")}
    if not rows:
        return None
    names = [linear["name"] for linear in next(iter(rows.values()))]
    errors = [[linear.get("weight_error", math.nan) for linear in linears] for linears in rows.values()]
    shown = np.log10(np.clip(np.array([e for e in errors if len(e) == len(names)]), 1e-12, None))
    figure, axes = _canvas(height=1.4 + 0.2 * len(shown))
    axes.grid(False)
    image = axes.imshow(shown, aspect="auto", cmap="YlOrRd", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    _name_linears(axes, names)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("log10 of the relative squared error", fontsize=8)
    caption = "Error of every linear's weight, |W - Ŵ|² / |W|², least at the top; from the checkpoints' own reports."
    return Plot(f"errors-{model}", f"{model}: error, linear by linear", caption, _svg(figure))


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


# --- shared ---------------------------------------------------------------------------------------------------------


def _points(records: list[Record], x: str, y: str) -> list[Point]:
    """Of the quantized cells that have both figures."""
    found = []
    for record in records:
        a, b = record.find(x), record.find(y)
        if record.quantized and isinstance(a, int | float) and isinstance(b, int | float) and math.isfinite(b):
            width = f"{record.quantized['nominal_bits']:g}"
            label = f"{record.cell['method']} {width}"
            found.append(Point(a, b, record.cell["method"], record.cell["preset"], label))
    return found


def _scatter(axes: Axes, points: list[Point]) -> None:
    for i, method in enumerate(sorted({p.method for p in points})):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        own = [p for p in points if p.method == method]
        faces = [colour if p.preset == "best" else "white" for p in own]
        for point, face in zip(own, faces, strict=True):
            axes.plot(point.x, point.y, marker, color=colour, markerfacecolor=face, markersize=7, zorder=3)
        axes.plot([], [], marker, color=colour, label=method)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, handletextpad=0.2)


def _full_precision(axes: Axes, records: list[Record], path: str, scale: float) -> None:
    value = next((r.find(path) for r in records if not r.quantized and r.find(path) is not None), None)
    if value is not None:
        axes.axhline(value * scale, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            1, value * scale, "full precision", transform=axes.get_yaxis_transform(), ha="right", va="top", fontsize=8
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


def _canvas(height: float = 4.2) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
