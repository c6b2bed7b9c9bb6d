"""Exports a packed checkpoint to a format that other libraries read. There is a file per format."""

from __future__ import annotations

from .awq import AWQFormat
from .base import Format
from .compressed import CompressedTensors
from .convert import export, format_for
from .dense import DenseFormat, GGUFSource
from .engines import ENGINES, Engine, engine_named, readers
from .gptq import GPTQFormat

FORMATS: dict[str, type[Format]] = {
    f.name: f for f in (CompressedTensors, GPTQFormat, AWQFormat, DenseFormat, GGUFSource)
}
DEFAULT = CompressedTensors  # where neither a format nor an engine is named

__all__ = [
    "DEFAULT",
    "ENGINES",
    "FORMATS",
    "Engine",
    "Format",
    "engine_named",
    "export",
    "format_for",
    "readers",
]
