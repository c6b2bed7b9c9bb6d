"""Spec: the shape and dtype of a stored tensor, known before the tensor exists."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Spec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
