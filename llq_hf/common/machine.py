"""Where this package keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$LLQ_CACHE, else ~/.cache/llq: quantized models for the next evaluation, kernels compiled by the user."""
    return Path(os.environ.get("LLQ_CACHE") or Path.home() / ".cache" / "llq").expanduser()
