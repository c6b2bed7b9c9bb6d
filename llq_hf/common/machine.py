"""Facts about this machine: where caches lie, how much memory was used, which devices exist."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .errors import LLQError
from .words import one_line


def cache_root() -> Path:
    """The cache folder: $LLQ_CACHE, else ~/.cache/llq. It holds quantized models for the next
    evaluation, and kernels that the user compiled.
    """
    return Path(os.environ.get("LLQ_CACHE") or Path.home() / ".cache" / "llq").expanduser()


def peak_bytes() -> int:
    """Peak allocated GPU memory where a GPU is used, else peak resident memory of this process;
    0 where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not tell."""
    # What Linux gives by getrusage begins with the peak of the process that started this one.
    with suppress(OSError, StopIteration), Path("/proc/self/status").open() as lines:
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    try:
        import resource  # Windows has none
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_name(device: torch.device) -> str | None:
    """The model of a GPU; None for other devices."""
    usable = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if usable else None


def gpu_free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that this process can still get; None for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    # Beside what the driver has, what torch holds and does not use.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def auto_device(name: str, gpu: str = "cuda") -> str:
    """The device that a user named; "auto" is `gpu` where there is one, else the CPU."""
    if name != "auto":
        return name
    return gpu if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Raise LLQError unless a tensor can be put on the device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LLQError(
            f"device={name!r} cannot be used here ({one_line(error)}); give cpu, or auto"
        ) from error


def usable_device(device: str | None) -> str:
    """The device that a harness names; its default is cuda:0 on every machine, which without a GPU
    means the CPU.
    """
    wanted = device or "cuda"
    return "cpu" if wanted.startswith("cuda") and not torch.cuda.is_available() else wanted
