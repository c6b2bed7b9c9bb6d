"""Base of the methods that store codes on a uniform grid per group."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..common.spec import Spec
from ..method import Method, Packed
from ..numerics.grids import Affine, Uniform


@dataclass(frozen=True, kw_only=True)
class OnUniformGrid(Method):
    """A method that stores the tensors of `grid`. Where it stores more, or transforms the input of
    the linear, it extends the method below that differs.
    """

    @property
    @abstractmethod
    def grid(self) -> Uniform:
        """The kind of grid, and how it is stored."""

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return self.grid.layout(out_features, in_features)

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        return self.grid.unpack(packed, in_features)

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        return self.grid.affine(packed, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return self.grid.linear(x, packed, bias)
