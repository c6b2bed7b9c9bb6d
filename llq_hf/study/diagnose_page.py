"""Shows the diagnoses of one or several models on one self-contained page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .diagnose import (
    BLOCK_FIGURES,
    INPUT_FIGURES,
    WEIGHT_FIGURES,
    Diagnosis,
    Part,
    concentration,
    correlations,
)
from .plots import COLOURS, INK, Plot, style

MOST = 12  # linears in the table of the most sensitive ones
NAMES = {
    "weight_kurtosis": "kurtosis of the weights",
    "weight_outlier": "largest weight / rms",
    "input_kurtosis": "kurtosis of the inputs",
    "input_outlier": "strongest input channel / median",
    "input_rank": "effective rank of the inputs, share",
    "massive": "massive activations, largest / median",
}
ON_A_LOG = {"weight_kurtosis", "weight_outlier", "input_kurtosis", "input_outlier"}


class Row(NamedTuple):
    words: list[str]
    figures: list[str]


class Table(NamedTuple):
    title: str
    note: str
    words: list[str]
    columns: list[str]
    rows: list[Row]


def page(diagnoses: Sequence[Diagnosis]) -> str:
    """The HTML of the page, which loads nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    with style():
        drawn = plots(diagnoses)
    return environment.get_template("diagnose.html").render(
        title=" and ".join(diagnosis.model for diagnosis in diagnoses),
        facts=_facts(diagnoses),
        plots=drawn,
        tables=tables(diagnoses),
    )


def _facts(diagnoses: Sequence[Diagnosis]) -> list[tuple[str, str]]:
    facts = []
    for diagnosis in diagnoses:
        bits = middle(diagnosis)
        losses = [part.kl[bits] for part in diagnosis.of_kind(block=True)]
        facts.append((f"{diagnosis.model}: blocks", str(len(losses))))
        facts.append(
            (f"{diagnosis.model}: mean KL of a block at {bits} bits", f"{_mean(losses):.4f}")
        )
    return facts


def middle(diagnosis: Diagnosis) -> int:
    """The width that pictures of one width show."""
    widths = sorted(diagnosis.rounding.bits)
    return widths[(len(widths) - 1) // 2]


# --- plots ----------------------------------------------------------------------------------------


def plots(diagnoses: Sequence[Diagnosis]) -> list[Plot]:
    drawn = [_block_losses(diagnoses), _massive(diagnoses)]
    drawn.append(_maps(diagnoses, "kl"))
    drawn += [_maps(diagnoses, name) for name in (*INPUT_FIGURES, *WEIGHT_FIGURES)]
    return drawn


def _block_losses(diagnoses: Sequence[Diagnosis]) -> Plot:
    """KL against the block, a line for each width."""
    figure, axes = _axes(len(diagnoses), height=3.2, sharey=True)
    for axis, diagnosis in zip(axes, diagnoses, strict=True):
        blocks = diagnosis.of_kind(block=True)
        for colour, bits in zip(
            COLOURS, sorted(diagnosis.rounding.bits, reverse=True), strict=False
        ):
            losses = [max(part.kl[bits], 1e-9) for part in blocks]
            axis.plot(
                range(len(blocks)), losses, color=colour, marker="o", ms=3, label=f"{bits} bits"
            )
        _log(axis)
        _of_blocks(axis)
        axis.set_title(diagnosis.model, color=INK, fontsize=11)
    axes[0].set_ylabel("KL, nats per token")
    axes[-1].legend()
    return Plot(
        "blocks",
        "Loss when one block alone is rounded",
        "All linears of the block are rounded to nearest; everything else is full precision.",
        _svg(figure),
    )


def _massive(diagnoses: Sequence[Diagnosis]) -> Plot:
    figure, (axis,) = _axes(1, height=2.8)
    for colour, diagnosis in zip(COLOURS, diagnoses, strict=False):
        sizes = [part.figures["massive"] for part in diagnosis.of_kind(block=True)]
        axis.plot(range(len(sizes)), sizes, color=colour, marker="o", ms=3, label=diagnosis.model)
    _log(axis)
    _of_blocks(axis)
    axis.set_ylabel("largest / median |x|")
    axis.legend()
    return Plot(
        "massive",
        "Massive activations",
        "The largest value in the hidden states after each block, over their median magnitude.",
        _svg(figure),
    )


def _maps(diagnoses: Sequence[Diagnosis], name: str) -> Plot:
    """A square for each linear: kinds from top to bottom, blocks from left to right."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    grids = [_grid(diagnosis, name) for diagnosis in diagnoses]
    known = [v for _, rows in grids for row in rows for v in row if not math.isnan(v)]
    low, high = min(known), max(known)
    on_a_log = name == "kl" or name in ON_A_LOG
    norm: Any = LogNorm(max(low, 1e-9), max(high, 2e-9)) if on_a_log else Normalize(low, high)
    figure, axes = _axes(len(diagnoses), height=2.6)
    shade = matplotlib.colormaps["YlOrBr"]
    for axis, diagnosis, (kinds, rows) in zip(axes, diagnoses, grids, strict=True):
        image = axis.imshow(rows, aspect="auto", cmap=shade, norm=norm, interpolation="nearest")
        axis.set_yticks(range(len(kinds)), kinds)
        _of_blocks(axis)
        axis.grid(visible=False)
        axis.set_title(diagnosis.model, color=INK, fontsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
    if on_a_log:
        _plain(bar.ax.yaxis)
    if name == "kl":
        bits = middle(diagnoses[0])
        title = f"Loss when one linear alone is rounded to {bits} bits"
        return Plot(name, title, "KL from full precision, nats per token.", _svg(figure))
    title = NAMES[name][0].upper() + NAMES[name][1:]
    return Plot(name, title, f"Of each linear ({name}).", _svg(figure))


def _grid(diagnosis: Diagnosis, name: str) -> tuple[list[str], list[list[float]]]:
    """The kinds of linears, and a row of values for each; NaN where a block has no such linear."""
    linears = diagnosis.of_kind(block=False)
    kinds = list(dict.fromkeys(part.kind for part in linears))
    blocks = 1 + max(part.block for part in linears)
    rows = [[math.nan] * blocks for _ in kinds]
    for part in linears:
        bits = middle(diagnosis)
        value = max(part.kl[bits], 1e-9) if name == "kl" else part.figures[name]
        rows[kinds.index(part.kind)][part.block] = value
    return [kind.rpartition(".")[2] for kind in kinds], rows


def _axes(count: int, height: float, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, sharey=sharey)[0]


def _of_blocks(axis: Any) -> None:
    """Blocks from left to right."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _log(axis: Any) -> None:
    axis.set_yscale("log")
    _plain(axis.yaxis)


def _plain(axis: Any) -> None:
    """Numbers as text, which names with dollars forbid matplotlib to set as formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


# --- tables ---------------------------------------------------------------------------------------


def tables(diagnoses: Sequence[Diagnosis]) -> list[Table]:
    return [_summary(diagnoses), _what_tells(diagnoses), *map(_most_sensitive, diagnoses)]


def _summary(diagnoses: Sequence[Diagnosis]) -> Table:
    rows = []
    for diagnosis in diagnoses:
        for bits in sorted(diagnosis.rounding.bits, reverse=True):
            linears = {part.name: part.kl[bits] for part in diagnosis.of_kind(block=False)}
            blocks = [part.kl[bits] for part in diagnosis.of_kind(block=True)]
            figures = [
                _mean(blocks),
                max(blocks),
                sum(blocks),
                sum(linears.values()),
                concentration(linears),
            ]
            rows.append(Row([diagnosis.model, str(bits)], [f"{value:.4g}" for value in figures]))
    return Table(
        "Models",
        "KL in nats per token. The last column is the share of the summed losses of linears that "
        "the most sensitive tenth of them has.",
        ["model", "bits"],
        ["mean of a block", "worst block", "sum of blocks", "sum of linears", "top tenth"],
        rows,
    )


def _what_tells(diagnoses: Sequence[Diagnosis]) -> Table:
    columns = [
        f"{diagnosis.model}, {bits} bits" for diagnosis in diagnoses for bits in _widths(diagnosis)
    ]
    found = [correlations(each, bits) for each in diagnoses for bits in _widths(each)]
    rows = [
        Row([NAMES[name]], [f"{own[name]:+.2f}" for own in found])
        for name in (*INPUT_FIGURES, *WEIGHT_FIGURES, *BLOCK_FIGURES)
    ]
    return Table(
        "What tells",
        "Spearman's rank correlation of each figure with the loss, over all linears (of massive "
        "activations: over all blocks).",
        ["figure"],
        columns,
        rows,
    )


def _most_sensitive(diagnosis: Diagnosis) -> Table:
    bits = middle(diagnosis)
    linears = sorted(diagnosis.of_kind(block=False), key=lambda part: -part.kl[bits])[:MOST]
    names = (*INPUT_FIGURES, *WEIGHT_FIGURES)
    rows = [
        Row([part.name], [*_losses_of(part, diagnosis), *_figures_of(part, names)])
        for part in linears
    ]
    return Table(
        f"{diagnosis.model}: the most sensitive linears at {bits} bits",
        "",
        ["linear"],
        [*(f"KL, {each} bits" for each in _widths(diagnosis)), *(NAMES[name] for name in names)],
        rows,
    )


def _losses_of(part: Part, diagnosis: Diagnosis) -> list[str]:
    return [f"{part.kl[bits]:.5f}" for bits in _widths(diagnosis)]


def _figures_of(part: Part, names: Sequence[str]) -> list[str]:
    return [f"{part.figures[name]:.3g}" for name in names]


def _widths(diagnosis: Diagnosis) -> list[int]:
    return sorted(diagnosis.rounding.bits, reverse=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
