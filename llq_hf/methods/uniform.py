"""Base of the methods that store codes on a uniform grid per group."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..method import ForeignCodes, Method, Packed
from ..numerics.grids import Affine, Grid, Uniform


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

    @classmethod
    def adopting(cls, codes: ForeignCodes) -> Self:
        if not codes.in_order:
            raise LLQError(f"{cls.name} stores groups of consecutive columns only")
        return cls.build(**cls._adopted(codes))

    @staticmethod
    def _adopted(codes: ForeignCodes) -> dict[str, Any]:
        """The options that every method with a uniform grid has."""
        return {
            "bits": codes.bits,
            "group_size": codes.group_size,
            "sym": codes.sym,
            "scale_bits": codes.scale_bits,
        }

    def adopt(self, affine: Affine) -> Packed:
        columns = affine.codes_OI.shape[1]
        places_I = torch.arange(columns) // self.grid.size(columns)
        if not torch.equal(affine.groups_I, places_I):
            raise LLQError(
                f"its columns are not in groups of {self.grid.size(columns)}, one after the other"
            )
        return self.grid.pack(affine.codes_OI, Grid(affine.scale_OG, affine.zero_OG))
