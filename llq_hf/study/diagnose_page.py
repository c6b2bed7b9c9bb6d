"""Shows the diagnoses of one or several models on one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .diagnose import (
    BLOCK_FIGURES,
    INPUT_FIGURES,
    WEIGHT_FIGURES,
    Diagnosis,
    concentration,
    correlations,
)
from .page import page
from .plots import COLOURS, INK, Plot, style, svg_of
from .tables import Line, ReportTable, Value

LEDE = (
    "Each part is rounded to nearest alone, and the predictions of the model are compared with "
    "those of full precision."
)
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


def diagnosis_page(diagnoses: Sequence[Diagnosis]) -> str:
    """The HTML of the page."""
    with style():
        drawn = plots(diagnoses)
    return page("Sensitivity to rounding", LEDE, _facts(diagnoses), drawn, tables(diagnoses))


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
        svg_of(figure),
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
        svg_of(figure),
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
        return Plot(name, title, "KL from full precision, nats per token.", svg_of(figure))
    title = NAMES[name][0].upper() + NAMES[name][1:]
    return Plot(name, title, f"Of each linear ({name}).", svg_of(figure))


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


# --- tables ---------------------------------------------------------------------------------------


def tables(diagnoses: Sequence[Diagnosis]) -> list[ReportTable]:
    sensitive = [_most_sensitive(number, each) for number, each in enumerate(diagnoses, start=1)]
    return [_summary(diagnoses), _what_tells(diagnoses), *sensitive]


def _line(*texts: str) -> Line:
    return Line([Value(text) for text in texts])


def _summary(diagnoses: Sequence[Diagnosis]) -> ReportTable:
    head = ["model", "bits", "mean of a block", "worst block", "sum of blocks", "sum of linears"]
    lines = []
    for diagnosis in diagnoses:
        for bits in _widths(diagnosis):
            linears = {part.name: part.kl[bits] for part in diagnosis.of_kind(block=False)}
            blocks = [part.kl[bits] for part in diagnosis.of_kind(block=True)]
            sums = [_mean(blocks), max(blocks), sum(blocks), sum(linears.values())]
            figures = [f"{value:.4g}" for value in (*sums, concentration(linears))]
            lines.append(_line(diagnosis.model, str(bits), *figures))
    note = (
        "KL in nats per token. The last column is the share of the summed losses of linears that "
        "the most sensitive tenth of them has."
    )
    return ReportTable("models", "Models", [*head, "top tenth"], lines, [note], words=2)


def _what_tells(diagnoses: Sequence[Diagnosis]) -> ReportTable:
    cases = [(each, bits) for each in diagnoses for bits in _widths(each)]
    head = ["figure", *(f"{each.model}, {bits} bits" for each, bits in cases)]
    found = [correlations(each, bits) for each, bits in cases]
    lines = [
        _line(NAMES[name], *(f"{own[name]:+.2f}" for own in found))
        for name in (*INPUT_FIGURES, *WEIGHT_FIGURES, *BLOCK_FIGURES)
    ]
    note = (
        "Spearman's rank correlation of each figure with the loss, over all linears (of massive "
        "activations: over all blocks)."
    )
    return ReportTable("tells", "What tells", head, lines, [note], words=1)


def _most_sensitive(number: int, diagnosis: Diagnosis) -> ReportTable:
    bits, widths = middle(diagnosis), _widths(diagnosis)
    names = (*INPUT_FIGURES, *WEIGHT_FIGURES)
    head = ["linear", *(f"KL, {each} bits" for each in widths), *(NAMES[name] for name in names)]
    linears = sorted(diagnosis.of_kind(block=False), key=lambda part: -part.kl[bits])[:MOST]
    lines = []
    for part in linears:
        losses = [f"{part.kl[each]:.5f}" for each in widths]
        lines.append(_line(part.name, *losses, *(f"{part.figures[name]:.3g}" for name in names)))
    title = f"{diagnosis.model}: the most sensitive linears at {bits} bits"
    return ReportTable(f"sensitive-{number}", title, head, lines, [], words=1)


def _widths(diagnosis: Diagnosis) -> list[int]:
    return sorted(diagnosis.rounding.bits, reverse=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
