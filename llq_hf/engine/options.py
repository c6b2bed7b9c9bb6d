"""Options of a run that concern the machine and not the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.packed import Speak
from .team import Team


@dataclass(frozen=True)
class RunOptions:
    """Device, dtype and memory of a run, and the processes that share it.

    dtype: of the calibration forward passes; None: the checkpoint's. offload: folder for the
    activations; None keeps them in memory. revision: of the base model on the Hub. shards: number
    of partial sums of the statistics, which decides their last bits (see `team`). speak: tries the
    files once they are written, and gives what the report says of that.
    """

    device: str = "cpu"
    dtype: str | None = None
    offload: Path | None = None
    revision: str | None = None
    shards: int = 1
    team: Team = field(default_factory=Team)
    speak: Speak | None = None
