"""Exports a packed checkpoint to a format that other libraries read. There is a file per format."""

from __future__ import annotations

from .awq import AWQFormat
from .base import Format
from .compressed import CompressedTensors
from .convert import export
from .dense import DenseFormat, GGUFSource
from .gptq import GPTQFormat

FORMATS: dict[str, type[Format]] = {
    f.name: f for f in (CompressedTensors, GPTQFormat, AWQFormat, DenseFormat, GGUFSource)
}

__all__ = ["FORMATS", "Format", "export"]
