"""One self-contained HTML page of figures for its head, plots and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .plots import Plot
from .tables import LEVEL_SIGNS, ReportTable


def page(
    title: str,
    lede: str,
    facts: Sequence[tuple[str, object]],
    plots: Sequence[Plot],
    tables: Sequence[ReportTable],
) -> str:
    """The HTML, which loads nothing from elsewhere. All text is escaped, unless it is Markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        title=title, lede=lede, facts=facts, plots=plots, tables=tables, signs=LEVEL_SIGNS
    )
