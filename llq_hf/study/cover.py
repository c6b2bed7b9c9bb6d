"""The picture for a README: what quantization costs in perplexity, against stored bits.

A panel for each model. Every method is a line through its better preset at each width, with its
name at the end of fewest bits; small dots are the points of the other presets. The figure is made
for a phone's width: WIDTH points across, and no text below 10 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..methods import METHODS
from .plots import (
    Point,
    by_model,
    full_precision,
    headline_of,
    points_of,
    style,
    svg_of,
)
from .record import Record
from .tables import PERPLEXITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 360, 380  # points; the height is that of a panel
LEAST = 0.1  # % above full precision: what is below lies within the noise, and is drawn here
MOST = 400  # %: what is above is drawn as an arrow at the upper edge
NEAR = 0.45  # share of the width in which lines start whose names stand in the column
COLUMN = 0.31  # share of the width that the column takes
ROOM = 12.5  # points between the names in the column
# DejaVu Sans comes with matplotlib, so the layout is the same everywhere; the other fonts serve
# readers that do not have it.
FONTS = ["DejaVu Sans", "Helvetica Neue", "Arial", "sans-serif"]


def cover(records: Sequence[Record]) -> str | None:
    """The picture as SVG; None where no model has a full-precision and a quantized perplexity."""
    panels = {model: _points(own) for model, own in by_model(records).items()}
    panels = {model: points for model, points in panels.items() if points}
    if not panels:
        return None
    with style(**{"font.family": FONTS, "font.size": 11}):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        size = (WIDTH / 72, HEIGHT * len(panels) / 72)
        layout = ConstrainedLayoutEngine(w_pad=0.08)
        figure = Figure(figsize=size, layout=layout, facecolor="white")
        for axes, (model, points) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            _panel(axes, model, points)
        return svg_of(figure, transparent=False)


def _points(records: list[Record]) -> list[Point]:
    """The quantized cells of a model; y is the perplexity above full precision, in %."""
    path = headline_of(records, PERPLEXITY)
    dense = full_precision(records, path)
    if dense is None:
        return []
    points = points_of(records, "quantized.stored_bits", path)
    return [replace(p, y=100 * (p.y / dense - 1)) for p in points]


def best_of(points: list[Point]) -> dict[str, list[Point]]:
    """Method -> its better preset at each width, by bits; methods in their order."""
    best: dict[tuple[str, float], Point] = {}
    for point in points:
        key = (point.method, point.bits)
        if key not in best or point.y < best[key].y:
            best[key] = point
    lines: dict[str, list[Point]] = {}
    for point in sorted(best.values(), key=lambda p: (list(METHODS).index(p.method), p.x)):
        lines.setdefault(point.method, []).append(point)
    return lines


def _panel(axes: Axes, model: str, points: list[Point]) -> None:
    lines = best_of(points)
    for point in points:
        if point not in lines[point.method]:
            _mark(axes, point, "o", size=4, alpha=0.5)
    for line in lines.values():
        colour, marker = line[0].look
        heights = [max(point.y, LEAST) for point in line]
        axes.plot([point.x for point in line], heights, color=colour, linewidth=1.5)
        for point in line:
            _mark(axes, point, marker, size=6)
    _scales(axes, points)
    axes.set_title(f"{model}: perplexity above full precision", fontsize=12, loc="left")
    axes.set_xlabel("bits per weight that the file really holds\n" + LEGEND)
    _names(axes, lines)


LEGEND = f"line: better preset; dot: other one; ▲: above {MOST:g} %"


def _mark(axes: Axes, point: Point, marker: str, size: float, alpha: float = 1) -> None:
    """The marker of a point; an arrow at the upper edge where it lies above."""
    colour, _ = point.look
    if point.y > MOST:
        marker = "^"
    axes.plot(
        point.x,
        _height(point),
        marker,
        color=colour,
        markersize=size,
        alpha=alpha,
        clip_on=False,
        zorder=3,
    )


def _height(point: Point) -> float:
    """The height at which a point is drawn."""
    return min(max(point.y, LEAST), MOST)


def _scales(axes: Axes, points: list[Point]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

    least, most = min(p.x for p in points), max(p.x for p in points)
    span = max(most - least, 0.5)
    left = least - COLUMN / (1 - COLUMN) * 1.05 * span
    axes.set_xlim(left, most + 0.05 * span)
    ticks = MaxNLocator(integer=True).tick_values(least, most)
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if round(least) <= t <= most]))
    axes.set_yscale("log")
    axes.set_ylim(LEAST * 0.8, MOST)
    percent = {LEAST: f"≤ {LEAST:g} %", 1: "1 %", 10: "10 %", 100: "100 %"}
    axes.yaxis.set_major_locator(FixedLocator(list(percent)))
    axes.set_yticklabels(list(percent.values()))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _names(axes: Axes, lines: dict[str, list[Point]]) -> None:
    """The name of each method: in a column at the left, or above a line that starts elsewhere."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only then is it known where anything lies
    left, right = axes.get_xlim()
    starts = [line[0] for line in lines.values()]
    column = [point for point in starts if point.x < left + NEAR * (right - left)]
    scale = figure.dpi / 72  # pixels in a point of print
    pixels = [axes.transData.transform((0, _height(point)))[1] for point in column]
    for point, y in zip(column, apart(pixels, ROOM * scale, axes.bbox.y1), strict=True):
        x = left + (COLUMN - 0.02) * (right - left)
        height = axes.transData.inverted().transform((0, y))[1]
        _name(axes, point, (x, height), ha="right", va="center")
        ends = ([x + 0.01 * (right - left), point.x], [height, _height(point)])
        axes.plot(*ends, color=point.look[0], linewidth=0.6)
    texts = list(axes.texts)
    markers = [
        axes.transData.transform((dot.x, _height(dot))) for line in lines.values() for dot in line
    ]
    for point in starts:
        if point not in column:
            texts.append(_free_name(axes, point, texts, markers))


# Where a name may stand that is not in the column: (added to x, times y), alignments.
PLACES = (
    ((0, 1.18), "center", "bottom"),
    ((0, 0.85), "center", "top"),
    ((-0.08, 1), "right", "center"),
    ((0.08, 1), "left", "center"),
    ((0.05, 1.18), "right", "bottom"),
    ((0.05, 1.8), "right", "bottom"),
    ((0.05, 2.7), "right", "bottom"),
    ((0.05, 4), "right", "bottom"),
)


def _free_name(axes: Axes, point: Point, texts: list[Any], markers: list[Any]) -> Any:
    """The name of a point in the first of PLACES that is free, else in the last."""

    def name_at(number: int) -> Any:
        (x, y), ha, va = PLACES[number]
        name = _name(axes, point, (point.x + x, _height(point) * y), ha=ha, va=va)
        name.set_bbox({"color": "white", "alpha": 0.7, "pad": 0.5})
        return name

    for number in range(len(PLACES)):
        name = name_at(number)
        box = name.get_window_extent()
        inside = all(axes.bbox.contains(*corner) for corner in box.corners())
        covered = any(box.overlaps(other.get_window_extent()) for other in texts)
        if inside and not covered and not any(box.contains(*marker) for marker in markers):
            return name
        name.remove()
    return name_at(len(PLACES) - 1)


def _name(axes: Axes, point: Point, place: tuple[float, float], **how: Any) -> Any:
    name = METHODS[point.method].title.partition(" (")[0]  # without its authors: "GPTQ"
    return axes.text(*place, name, color=point.look[0], fontsize=10.5, zorder=2.5, **how)


def apart(heights: list[float], room: float, most: float) -> list[float]:
    """The heights moved so that there is `room` between any two, and none is above `most`.

    Their order stays. Those that are too close to each other lie around their middle.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, int]] = []  # (middle, count) of neighbours that touch
    for i in order:
        middle, count = heights[i], 1
        while groups and middle - groups[-1][0] < (count + groups[-1][1]) / 2 * room:
            below, more = groups.pop()
            middle, count = (middle * count + below * more) / (count + more), count + more
        groups.append((middle, count))
    moved = [m + (k - (count - 1) / 2) * room for m, count in groups for k in range(count)]
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], most)
        most = moved[k] - room
    return [y for _, y in sorted(zip(order, moved, strict=True))]
