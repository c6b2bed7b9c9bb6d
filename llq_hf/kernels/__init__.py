"""Products with packed weights, by the fastest kernel that there is for a storage, a number of
tokens and a device.

Idea: `product` computes F.linear(x, dense()). A method says how its weight is stored (a view) and
how torch would decode it (`dense`). A table says which kernels read such a view, and the first that
fits serves. Where none does, torch decodes. That is the reference which kernels are tested against.
It also serves where results must not depend on the machine's kernels (calibration), and where
gradients are wanted and the kernel has none. `transformed` does the same for the transforms of
inputs and outputs that some methods need, `token_codes` and `token_values` for the grids that
tokens get.

Memory: no kernel keeps a copy of a weight, so a loaded model is as large as its file. (On GPUs zero
points take a byte each, and PB-LLM's positions are kept as a list; gpu/ says how much that is.)

Modules: bitpack (how codes lie), views (what is stored), cached (what is computed once for it),
rows (what a row of the table says), dispatch (the table and the choice), products (by torch),
cpu_rows with native, build and cpp/ (the compiled CPU kernels), bitsandbytes_rows (CUDA), gpu/ (the
Triton kernels). README.md says how to add a kernel.
"""

from __future__ import annotations

from .cached import CachedTensors, cached_tensors, once
from .dispatch import (
    Choice,
    choose,
    divided,
    listening,
    product,
    product_of_codes,
    reference,
    token_codes,
    token_values,
    transformed,
)
from .gpu.feedback import OVERFLOW, BlockRounder, backward_rounder, block_rounder, descender
from .gpu.ready import describe as describe_gpu
from .native import describe
from .products import integer_product
from .views import (
    Kronecker,
    LevelCodes,
    Numbers,
    Part,
    SalientCodes,
    Stored,
    TableCodes,
    TokenGrid,
    Transform,
    UniformCodes,
)

__all__ = [
    "OVERFLOW",
    "BlockRounder",
    "CachedTensors",
    "Choice",
    "Kronecker",
    "LevelCodes",
    "Numbers",
    "Part",
    "SalientCodes",
    "Stored",
    "TableCodes",
    "TokenGrid",
    "Transform",
    "UniformCodes",
    "backward_rounder",
    "block_rounder",
    "cached_tensors",
    "choose",
    "descender",
    "describe",
    "describe_gpu",
    "divided",
    "integer_product",
    "listening",
    "once",
    "product",
    "product_of_codes",
    "reference",
    "token_codes",
    "token_values",
    "transformed",
]
