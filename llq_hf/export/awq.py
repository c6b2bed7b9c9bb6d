"""AutoAWQ's format ("gemm"), which AutoAWQ, GPTQModel, vLLM and SGLang read.

It holds 4-bit codes whose groups are of consecutive columns.

Legend: O out_features, I in_features, G groups.

name     shape        dtype
qweight  [I, O / 8]   int32   eight output features a word, in the order 0 2 4 6 1 3 5 7
qzeros   [G, O / 8]   int32   likewise
scales   [G, O]       fp16 (dtype)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..numerics.grids import Affine
from .base import AffineFormat, Grid, bitstream, whole

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class AWQFormat(AffineFormat):
    name: ClassVar[str] = "awq"
    widths: ClassVar[tuple[int, ...]] = (4,)

    def check(self, affine: Affine) -> None:
        super().check(affine)
        if not affine.in_order:
            raise LLQError(
                "its groups are of scattered columns (act_order), and this format has no index "
                "for them"
            )
        for what, features in zip(("output", "input"), affine.codes_OI.shape, strict=True):
            whole(what, features)

    def pack(self, affine: Affine) -> dict[str, Tensor]:
        return {
            "qweight": _interleave(affine.codes_OI.T),
            "qzeros": _interleave(affine.zero_OG.T.to(torch.uint8)),
            "scales": affine.scale_OG.T.contiguous().to(self.dtype),
        }

    def section(self, grid: Grid | None, dense: Sequence[str]) -> dict[str, Any]:
        assert grid is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(dense),
        }


def _interleave(codes_RO: Tensor) -> Tensor:
    """4-bit codes [R, O] -> int32 [R, O / 8]; the codes of a word are in ORDER."""
    rows, features = codes_RO.shape
    words_RW8 = codes_RO.reshape(rows, features // 8, 8)[..., ORDER]
    return bitstream(words_RW8.reshape(rows, features), 4)
