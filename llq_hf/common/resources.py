"""Find the files that lie beside the package in a checkout and inside it in a wheel: task files
and the template of model cards.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def tasks_folder(harness: str) -> Path:
    """The folder of our task YAML files for "lm_eval" or "lmms_eval"."""
    return _folder("tasks") / harness


def template_path() -> Path:
    """The template of model cards."""
    return _folder("model_cards") / "template.md"


def _folder(name: str) -> Path:
    inside = PACKAGE / f"_{name}"
    return inside if inside.is_dir() else PACKAGE.parent / name
