"""Counts what would make a GPU wait for the host, or its sums differ from run to run, while all
runs on the CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "equal"}  # the host waits for their result
ATOMIC = {"index_add_", "index_add", "scatter_add_", "scatter_add", "scatter_reduce"}  # on GPUs


class HostReads(TorchDispatchMode):
    """`reads` and `atomic` by operation, and the number of `operations`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.atomic: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operations += 1
        self.reads.update([name] if name in READS else [])
        self.atomic.update([name] if name in ATOMIC else [])
        return func(*args, **(kwargs or {}))


def watched(run: Any) -> HostReads:
    """What happened while `run` was called."""
    with torch.no_grad(), HostReads() as found:
        run()
    return found
