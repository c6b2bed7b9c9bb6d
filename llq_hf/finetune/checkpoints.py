"""Trainer's checkpoints, of which a killed run goes on from the last whole one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..common.files import remove, sync_all, sync_folder, write_text

WHOLE = "llq_whole"  # written into a checkpoint when all of its files are on the disk


def last_checkpoint(work: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    whole = [path.parent for path in work.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def drop_others(work: Path, keep: Path | None) -> None:
    """Delete all checkpoints but one."""
    for checkpoint in work.glob("checkpoint-*"):
        if checkpoint != keep:
            remove(checkpoint / WHOLE)
            shutil.rmtree(checkpoint, ignore_errors=True)


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks Trainer's checkpoints when all of their files are on the disk, and deletes older ones
    only then, their marks first. Trainer itself would delete one while another is half written.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # a run that resumed there would train one step more

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        work = Path(args.output_dir)
        checkpoint = work / f"checkpoint-{state.global_step}"
        sync_all(checkpoint)
        write_text(checkpoint / WHOLE, "")
        sync_folder(work)
        drop_others(work, keep=checkpoint)
