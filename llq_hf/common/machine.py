"""This machine: where caches lie, what memory was used, which devices there are."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from .errors import LLQError
from .words import one_line


def cache_root() -> Path:
    """$LLQ_CACHE, else ~/.cache/llq: quantized models for the next evaluation, kernels compiled by
    the user.
    """
    return Path(os.environ.get("LLQ_CACHE") or Path.home() / ".cache" / "llq").expanduser()


def peak_bytes() -> int:
    """Peak resident memory of this process, or peak allocated GPU memory where a GPU is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_device(name: str) -> None:
    """LLQError unless a tensor can be put there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LLQError(
            f"device={name!r} cannot be used here ({one_line(error)}); give cpu, or auto"
        ) from error


def usable_device(device: str | None) -> str:
    """The harnesses' default is cuda:0 wherever they run; without a GPU that means the CPU."""
    wanted = device or "cuda"
    return "cpu" if wanted.startswith("cuda") and not torch.cuda.is_available() else wanted
