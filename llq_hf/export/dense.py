"""Dense weights, dequantized, for loaders that know no quantization.

Every method fits that quantizes weights only. `gguf-f16` is the same in fp16, for llama.cpp's
`convert_hf_to_gguf.py OUT --outtype f16`, which knows architectures and tokenizers that our own
`gguf_file` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..method import Method, Packed
from .base import Exported, Format


@dataclass(frozen=True)
class DenseFormat(Format):
    name: ClassVar[str] = "dense"
    holds_codes: ClassVar[bool] = False

    def linear(self, method: Method, packed: Packed, shape: tuple[int, int]) -> Exported:
        if not method.weight_only:
            raise LLQError(
                f"{method.name} quantizes activations while the model runs; dense weights would not"
            )
        return Exported(None, method.dequantize(packed, *shape))

    def tensors(self, linear: Exported) -> dict[str, Tensor]:
        assert linear.weight_OI is not None
        return {"weight": linear.weight_OI.to(self.dtype)}


@dataclass(frozen=True)
class GGUFSource(DenseFormat):
    name: ClassVar[str] = "gguf-f16"
    preferred: ClassVar[torch.dtype | None] = torch.float16
