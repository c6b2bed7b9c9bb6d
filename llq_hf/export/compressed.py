"""compressed-tensors' format "pack-quantized", which vLLM, SGLang and transformers read.

It holds codes of 1 to 8 bits on symmetric and asymmetric grids. The library itself unpacks every
width; which of them engines run is told in `engines`.

Legend: O out_features, I in_features, G groups, b bits.

    name                shape                 dtype
    weight_packed       [O, ceil(I * b / 32)] int32   codes, a stream of bits
    weight_scale        [O, G]                dtype
    weight_zero_point   [ceil(O * b / 32), G] int32   a stream down the rows; absent if symmetric
    weight_shape        [2]                   int64
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..numerics.grids import Affine
from .base import AffineFormat, Grid, bitstream


@dataclass(frozen=True)
class CompressedTensors(AffineFormat):
    name: ClassVar[str] = "compressed-tensors"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))

    def check(self, affine: Affine) -> None:
        super().check(affine)
        if not affine.in_order:
            raise LLQError(
                "its groups are of scattered columns (act_order), and this format has no index "
                "for them"
            )

    def pack(self, affine: Affine) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": bitstream(affine.codes_OI, affine.bits),
            "weight_scale": affine.scale_OG.to(self.dtype),
            "weight_shape": torch.tensor(affine.codes_OI.shape, dtype=torch.int64),
        }
        if not affine.sym:
            zero_GO = affine.zero_OG.T.contiguous().to(torch.uint8)
            tensors["weight_zero_point"] = bitstream(zero_GO, affine.bits).T.contiguous()
        return tensors

    def section(self, grid: Grid | None, dense: Sequence[str]) -> dict[str, Any]:
        assert grid is not None
        rows = grid.group_size == -1
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.sym,
            "strategy": "channel" if rows else "group",
            "group_size": None if rows else grid.group_size,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": [name for each in dense for name in (each, f"re:{re.escape(each)}\\.")],
        }
