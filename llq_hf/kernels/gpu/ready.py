"""Whether the GPU kernels can run here, and why not."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...common.errors import LLQError

CHOICES = ("all", "dense", "none")
OLDEST_CARD = (8, 0)  # Ampere: tensor cores multiply bf16
OLDEST_GLUON = (3, 6)  # of Triton, whose Gluon says layouts by hand


def wanted() -> str:
    """Which kernels LLQ_GPU allows: all; dense: only those that decode; none. LLQError if it says
    something else.
    """
    choice = os.environ.get("LLQ_GPU", "all")
    if choice not in CHOICES:
        raise LLQError(f"LLQ_GPU={choice} is not one of {', '.join(CHOICES)}")
    return choice


@cache
def triton_version() -> tuple[int, int] | None:
    """Of the installed Triton; None if there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    numbers = re.findall(r"\d+", triton.__version__)
    return int(numbers[0]), int(numbers[1])


@cache
def problem() -> str | None:
    """Why no GPU kernel can run, as the end of a sentence; None if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if triton_version() is None:
        return "Triton is not installed"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < OLDEST_CARD:
        return f"a GPU of compute capability {oldest[0]}.{oldest[1]} is older than 8.0"
    return None


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def dense() -> bool:
    """Whether the kernels that decode can run in this process. Says once why not, if a GPU is
    there.
    """
    if wanted() == "none":
        return False
    found = problem()
    if found is not None and torch.cuda.is_available():
        _say_once(f"packed weights are decoded by torch, which is slow: {found}")
    return found is None


def few() -> bool:
    """Whether the kernels for few tokens can run in this process. Says once why not, if those that
    decode can.
    """
    if wanted() == "dense" or not dense():
        return False
    version = triton_version()
    if version is None or version < OLDEST_GLUON:
        _say_once(
            "packed weights are decoded before each product, which is slow for few tokens: "
            f"Triton {'.'.join(map(str, version or ()))} is older than 3.6"
        )
        return False
    return True


@cache
def several() -> bool:
    """Whether this process sees more than one GPU."""
    return torch.cuda.device_count() > 1


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, kernels are launched on the GPU of `tensor`. Triton launches on the current one,
    which is another where a model lies on several.
    """
    return torch.cuda.device(tensor.device) if several() else nullcontext()


def describe() -> str:
    """One line for people: what multiplies packed weights on this machine's GPU."""
    if wanted() == "none":
        return "torch operations (LLQ_GPU=none)"
    found = problem()
    if found is not None:
        return f"torch operations ({found})"
    name, version = torch.cuda.get_device_name(), triton_version()
    assert version is not None
    kernels = "few tokens and many" if few() else "decoding only"
    return f"{name}, Triton {version[0]}.{version[1]}: {kernels}"
