"""Finds a packed checkpoint in the cache, or makes it."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoints.hashes import damage_once
from ..checkpoints.packed import finished_fingerprint
from ..common.errors import LLQError
from ..common.machine import cache_root
from ..common.progress import Progress
from ..common.terminal import RichProgress
from ..data.calibration import Calibration
from ..method import Method
from .execute import execute
from .options import RunOptions
from .prepare import prepare


def cached(
    model: str,
    method: Method,
    calibration: Calibration,
    run: RunOptions,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of the packed checkpoint, which is made if the cache does not hold it.

    Its name is the run's fingerprint, a hash of everything that decides its bytes. What is damaged
    in it is made again. root: folder of the cache; None: the default one. progress: None draws bars
    on the terminal in the first of several processes. LLQError as of `prepare` and `execute`.
    """
    if progress is None:
        progress = RichProgress() if os.environ.get("RANK", "0") == "0" else Progress()
    try:
        plan = prepare(model, method, calibration, run, None, progress)
        out = (root or cache_root()) / plan.fingerprint
        if not _is_whole(out, plan.fingerprint):
            execute(plan, out, progress)
        return out
    finally:
        progress.close()


def _is_whole(out: Path, run: str) -> bool:
    try:
        return finished_fingerprint(out) == run and not damage_once(out)
    except LLQError:  # config.json, or the hashes
        return False
