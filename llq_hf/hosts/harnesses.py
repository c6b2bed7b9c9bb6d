"""Find the harness that a task belongs to: lm-eval or lmms-eval.

A task about text that both declare is lm-eval's. Names are read from the YAML files themselves,
since importing either harness takes half a minute.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..common.errors import LLQError
from ..common.resources import tasks_folder

_DECLARED = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE
)


def harness_of(tasks: str) -> str:
    """ "lm_eval" or "lmms_eval", for task names joined by commas.

    Raises LLQError where they belong to different harnesses, or lmms-eval is not installed.
    """
    names = [name for name in tasks.split(",") if name]
    visual = _declared_by("lmms_eval") & set(names)
    if visual:
        visual -= _declared_by("lm_eval", without="doc_to_image")
    if not visual:
        return "lm_eval"
    others = [name for name in names if name not in visual]
    if others:
        raise LLQError(
            f"{', '.join(sorted(visual))} belong to lmms-eval, {', '.join(others)} do not: ask in"
            " two commands"
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise LLQError(
            f"{tasks} needs lmms-eval, which is not installed: uv sync --extra vision, or pip"
            " install .[vision]"
        )
    return "lmms_eval"


def check_tasks(tasks: Iterable[str]) -> None:
    """LLQError, with the nearest names, for the first task that neither harness has; and where
    lmms-eval is needed and not installed.
    """
    for task in dict.fromkeys(tasks):
        known = _declared_by("lm_eval") | _declared_by("lmms_eval")
        if task not in known and task not in _index_of_lm_eval():
            near = difflib.get_close_matches(task, known | _index_of_lm_eval(), n=3, cutoff=0.6)
            meant = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
            raise LLQError(
                f"neither lm-eval nor lmms-eval has a task {task!r}{meant}; `lm_eval ls tasks`"
                " lists them"
            )
        harness_of(task)


@cache
def _index_of_lm_eval() -> frozenset[str]:
    """All of lm-eval's names, also those that no single line of a YAML file declares. It takes ten
    seconds.
    """
    from lm_eval.models import huggingface  # noqa: F401 (registers what the hook extends)
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


@cache
def _declared_by(harness: str, without: str | None = None) -> set[str]:
    """Tasks, groups and tags that we have for the harness, and its own if it is installed.

    without: files that contain this text are left out.
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
