"""A row of the kernel table: one kernel, and the calls that it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .views import View

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
MANY = range(1, 1 << 62)  # any number of tokens

# Of a product: kernel(x, stored, bias) -> y [..., O], which is F.linear with the weight [O, I].
# Of a product with int8 activations: kernel(codes, stored, bias, step, dtype); `product_of_codes`.
# Of a transform: kernel(x, transform, divisor, factor) -> y, shaped like x; see `transformed`.
# Of a division: kernel(x, division) -> y, shaped like x.
# Of tokens: kernel(x, grid, divisor, values); see `token_codes` and `token_values`.
Kernel = Callable[..., Tensor]


class Row(NamedTuple):
    """A kernel, and the calls that it serves.

    view: the class of views.py that describes the storage, a transform or a grid.
    device: where the activations lie, a `torch.device.type`: "cpu", "cuda".
    tokens: numbers of activation vectors that the kernel takes in one call.
    dtypes: of the activations; int8 means codes of activations.
    available: whether the kernel can run in this process: its library, compiler or device is there.
    fits: whether the kernel can read this view: its widths, its groups, where its tensors lie.
    differentiable: whether autograd goes through the kernel to x.
    needs: what `fits` asks for, in words that complete "it needs"; for people.

    `available`, and where it says yes `fits`, are asked once for each weight and kind of call. So
    they may take their time: import a library, compile, read a tensor. `fits` sees the tensors, and
    can ask for the abilities of the very GPU that they lie on.
    """

    view: type[View]
    device: str
    tokens: range
    dtypes: tuple[torch.dtype, ...]
    available: Callable[[], bool]
    fits: Callable[[Any], bool]
    kernel: Kernel
    differentiable: bool = False
    needs: str = "another storage"

    @property
    def name(self) -> str:
        """What people call the kernel."""
        return self.kernel.__name__.replace("_", " ")
