"""GPTQ's format, which GPTQModel reads, and other engines in part (see `engines`); it takes
act_order too.

Legend: O out_features, I in_features, G groups, b bits.

    name     shape             dtype
    qweight  [I * b / 32, O]   int32   codes, a stream of bits down each column
    qzeros   [G, O * b / 32]   int32   zero points, likewise along the row
    scales   [G, O]            fp16 (dtype)
    g_idx    [I]               int32   group of each input column

Version 2 of the format (`checkpoint_format` "gptq_v2") holds zero points as they are. Version 1
holds them less one, so it cannot hold a zero point of 0. It is used for symmetric grids, where
every zero point is the middle code, because every kernel reads version 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..numerics.grids import Affine
from .base import AffineFormat, Grid, bitstream, whole


@dataclass(frozen=True)
class GPTQFormat(AffineFormat):
    name: ClassVar[str] = "gptq"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def check(self, affine: Affine) -> None:
        super().check(affine)
        for what, features in zip(("output", "input"), affine.codes_OI.shape, strict=True):
            whole(what, features)

    def pack(self, affine: Affine) -> dict[str, Tensor]:
        zero_GO = affine.zero_OG.T.contiguous() - (1 if affine.sym else 0)
        return {
            "qweight": bitstream(affine.codes_OI, affine.bits).T.contiguous(),
            "qzeros": bitstream(zero_GO.to(torch.uint8), affine.bits),
            "scales": affine.scale_OG.T.contiguous().to(self.dtype),
            "g_idx": affine.groups_I.to(torch.int32),
        }

    def section(self, grid: Grid | None, dense: Sequence[str]) -> dict[str, Any]:
        assert grid is not None
        version = "gptq" if grid.sym else "gptq_v2"
        # `dynamic` says what is left out; the head is left out by `lm_head`.
        others = [name for name in dense if name.rpartition(".")[2] != "lm_head"]
        dynamic: dict[str, dict[str, Any]] = {f"-:{re.escape(name)}(\\.|$)": {} for name in others}
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "desc_act": not grid.in_order,
            "sym": grid.sym,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }
