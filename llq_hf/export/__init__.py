"""From a packed checkpoint of ours to one of the formats that other libraries read. A file per
format.
"""

from __future__ import annotations

from .awq import AWQFormat
from .base import Format
from .compressed import CompressedTensors
from .convert import export
from .dense import Dense, GGUFSource
from .gptq import GPTQFormat

FORMATS: dict[str, type[Format]] = {
    f.name: f for f in (CompressedTensors, GPTQFormat, AWQFormat, Dense, GGUFSource)
}

__all__ = ["FORMATS", "Format", "export"]
