"""Formats of other libraries: writes packed checkpoints in them, a file per format, and takes in
checkpoints that other libraries quantized.
"""

from __future__ import annotations

from .awq import AWQFormat
from .base import Format
from .compressed import CompressedTensors
from .convert import export, format_for
from .dense import DenseFormat, GGUFSource
from .engines import ENGINES, Engine, engine_named, readers
from .gguf_file import GGUFFormat
from .gptq import GPTQFormat
from .importing import take_in

FORMATS: dict[str, type[Format]] = {
    f.name: f
    for f in (CompressedTensors, GPTQFormat, AWQFormat, GGUFFormat, DenseFormat, GGUFSource)
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
    "take_in",
]
