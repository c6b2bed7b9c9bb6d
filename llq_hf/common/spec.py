"""Shape and dtype of a tensor that does not exist yet."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Spec(NamedTuple):
    """One stored tensor, before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
