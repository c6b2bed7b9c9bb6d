"""Which harness serves a task: lm-eval those about text that it declares, lmms-eval all others that
it declares.

Names are read from the YAML files themselves: importing either harness takes half a minute.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ..common.errors import LLQError
from ..common.resources import tasks_folder

_DECLARED = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE
)


def harness_of(tasks: str) -> str:
    """ "lm_eval" or "lmms_eval" for names joined by commas; LLQError where they belong to both."""
    names = [name for name in tasks.split(",") if name]
    seeing = _declared_by("lmms_eval") & set(names)
    seeing -= _declared_by("lm_eval", without="doc_to_image") if seeing else set()
    if not seeing:
        return "lm_eval"
    others = [name for name in names if name not in seeing]
    if others:
        raise LLQError(
            f"{', '.join(sorted(seeing))} belong to lmms-eval, {', '.join(others)} do not: ask in two commands"
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise LLQError(
            f"{tasks} needs lmms-eval, which is not installed: uv sync --extra vision, or pip install .[vision]"
        )
    return "lmms_eval"


def _declared_by(harness: str, without: str | None = None) -> set[str]:
    """Tasks, groups and tags of the harness, if it is installed, and ours for it; not of files that
    hold `without`.
    """
    spec = importlib.util.find_spec(harness)
    folders = [tasks_folder(harness)]
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "tasks")
    texts = (
        file.read_text(errors="replace") for folder in folders for file in folder.rglob("*.yaml")
    )
    return {
        name
        for text in texts
        if without is None or without not in text
        for name in _DECLARED.findall(text)
    }
