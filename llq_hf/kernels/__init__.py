"""Products with packed weights, by the fastest kernel that there is for a storage, a number of
tokens and a device.

Idea: `product` computes F.linear(x, dense()). A method says how its weight is stored (a view) and
how torch would decode it (`dense`). A table says which kernels read such a view, and the first that
fits serves. Where none does, torch decodes. That is the reference which kernels are tested against.
It also serves where results must not depend on the machine's kernels (calibration), and where
gradients are wanted and the kernel has none. `transformed` does the same for the transforms of
inputs and outputs that some methods need.

Memory: no kernel keeps a copy of a weight, so a loaded model is as large as its file.

Modules: bitpack (how codes lie), views (what is stored), rows (what a row of the table says),
dispatch (the table and the choice), cpu_rows with native, build and cpp/ (the compiled CPU
kernels), bitsandbytes_rows (CUDA). README.md says how to add a kernel.
"""

from __future__ import annotations

from .dispatch import choose, product, reference, transformed
from .native import describe
from .views import (
    CachedTensors,
    LevelCodes,
    Numbers,
    Part,
    SalientCodes,
    Stored,
    TableCodes,
    Transform,
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
    "Transform",
    "UniformCodes",
    "cached_tensors",
    "choose",
    "describe",
    "once",
    "product",
    "reference",
    "transformed",
]
