"""Products with packed weights, by the fastest way there is for a storage, a number of tokens and a
device.

`product` is F.linear(x, dense()): a method says how its weight is stored and how torch would decode
it; the table says which kernel reads such storage. Where none does, and wherever results must not
depend on the machine's kernels (calibration) or need gradients, torch decodes: that is the
reference, and what kernels are tested against.

    few tokens (decoding)     codes are multiplied as they are, straight from the rows of the file
    many tokens (prefill)     tiles of rows are decoded into a buffer that stays in the cache; F.linear does the rest

`turned` is the same for a method's transforms of inputs and outputs.

No kernel keeps a copy of a weight, so a loaded model is as large as its file. For CUDA there are
none of ours yet: rows for it go into the same table.
"""

from __future__ import annotations

from .dispatch import choose, product, reference, turned
from .native import describe
from .views import (
    CachedTensors,
    LevelCodes,
    Numbers,
    Part,
    SalientCodes,
    Stored,
    TableCodes,
    Turn,
    UniformCodes,
    cached_tensors,
    once,
)

__all__ = [
    "CachedTensors",
    "LevelCodes",
    "Numbers",
    "Part",
    "SalientCodes",
    "Stored",
    "TableCodes",
    "Turn",
    "UniformCodes",
    "cached_tensors",
    "choose",
    "describe",
    "once",
    "product",
    "reference",
    "turned",
]
