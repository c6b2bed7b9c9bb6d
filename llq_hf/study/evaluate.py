"""Calls lm-eval and lmms-eval for the tasks of a cell."""

from __future__ import annotations

import gc
import json
from functools import cache, lru_cache
from typing import Any

import torch

from ..hosts.harnesses import harness_of
from .flips import right_answers
from .plan import DENSE, Cell

Results = dict[str, dict[str, Any]]
Right = dict[str, str]  # task -> "1" or "0" per question


def evaluate(
    path: str, base: str, cell: Cell, device: str, batch_size: int | str, parallelize: bool = False
) -> tuple[Results, Right]:
    """Task -> metric -> figure, over all tasks of the cell; and which answers were right.

    path: a packed checkpoint, an adapter, or (method none) a dense model. base: the full-precision
    model, which tasks may compare with. parallelize: lm-eval spreads the model over all GPUs that
    it sees.
    """
    text = [task for task in cell.tasks if _harness_of(task) == "lm_eval"]
    image = [task for task in cell.tasks if task not in text]
    results: Results = {}
    right: Right = {}
    if text:
        host = {"device": device, "batch_size": batch_size, "parallelize": parallelize}
        results, right = _lm_eval(path, base, cell, text, host)
    if image:
        results |= _lmms_eval(path, cell, image, device, batch_size)
    return results, right


_harness_of = cache(harness_of)  # it reads thousands of files


@lru_cache(maxsize=4)
def _text_manager(metadata: str) -> Any:
    """lm-eval's index of tasks, one for all cells with this metadata.

    Building it reads thousands of files.
    """
    from lm_eval.models import huggingface  # noqa: F401 (registers what the hook extends)
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata))


def _lm_eval(
    path: str, base: str, cell: Cell, tasks: list[str], host: dict[str, Any]
) -> tuple[Results, Right]:
    from lm_eval import simple_evaluate

    from ..hosts.lm_eval_model import LLQLM

    kind = {"method": DENSE} if cell.method == DENSE else {"base": base}
    model = LLQLM(pretrained=path, dtype=cell.dtype, **kind, **host)
    try:
        output = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=_text_manager(json.dumps(dict(cell.metadata))),
            limit=cell.limit,
            num_fewshot=cell.num_fewshot,
            log_samples=True,
        )
    finally:
        del model
        _free()
    return figures(output["results"]), right_answers(output["samples"])


def _lmms_eval(
    path: str, cell: Cell, tasks: list[str], device: str, batch_size: int | str
) -> Results:
    from lmms_eval.evaluator import simple_evaluate

    args = f"pretrained={path}" + (f",method={DENSE}" if cell.method == DENSE else "")
    try:
        output = simple_evaluate(
            model="llq",
            model_args=args,
            tasks=tasks,
            device=device,
            batch_size=batch_size,
            limit=cell.limit,
            num_fewshot=cell.num_fewshot,
            log_samples=False,
        )
    finally:
        _free()
    return figures(output["results"])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures(results: dict[str, dict[str, Any]]) -> Results:
    """A harness's results as task -> metric -> number.

    "acc,none" becomes acc; other filters stay in the name.
    """
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        for task, metrics in results.items()
    }
