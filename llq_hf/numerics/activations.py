"""Dynamic quantization of activations: each token gets its own grid at run time.

Legend: g values that share a scale, M = 2**(bits - 1) - 1.

sym:  s  = max|x| / M
      x^ = s * clamp(round(x / s), -M - 1, M)                     (SmoothQuant, QuaRot)
asym: s  = (max - min) / (2**b - 1)
      z  = round(-min / s)
      x^ = s * (clamp(round(x / s) + z, 0, 2**b - 1) - z)         (OmniQuant)
      SpinQuant's asymmetric range always contains zero.

Everything is computed in fp32, whatever the dtype of the model: arithmetic in bf16 is too coarse
for codes of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..kernels import TokenGrid, token_codes, token_values
from .rotations import hadamard

OFF = 16  # this many bits or more mean: do not quantize activations
_TINY_SCALE = 1e-5  # scale of an all-zero token, as in the code of all three papers


def pass_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the dtype of x, with the gradient of x (straight-through estimator)."""
    return x + (value.to(x.dtype) - x).detach()


def round_through(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of x."""
    return pass_through(x, torch.round(x)) if x.requires_grad else torch.round(x)


@dataclass(frozen=True)
class TokenQuant:
    """How values along the last axis are quantized.

    bits 16: not at all. group_size -1: one grid for the whole axis. zero_inside: an asymmetric
    range always contains zero, so that its zero point is one of the codes.
    """

    bits: int = OFF
    sym: bool = True
    group_size: int = -1
    zero_inside: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= OFF:
            raise LLQError(
                f"activation bits={self.bits} are outside 2..{OFF} ({OFF}: not quantized)"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise LLQError(
                f"activation group_size={self.group_size} must be -1 (the whole token) "
                "or at least 1"
            )

    @property
    def on(self) -> bool:
        return self.bits < OFF

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., n] quantized and dequantized, in its dtype. Gradients pass straight through the
        rounding. LLQError where n does not divide into groups.
        """
        if not self.on:
            return x
        if self._plain and not (x.requires_grad and torch.is_grad_enabled()):
            return token_values(x, self._grid(x.shape[-1]), lambda: self._rounded(x))
        return self._rounded(x)

    def _rounded(self, x: Tensor) -> Tensor:
        groups = self._grouped(x.float())
        if self.sym:
            scale = self.scale(groups)
            codes = round_through(groups / scale).clamp(-(self._top + 1), self._top)
            return (codes * scale).reshape(x.shape).to(x.dtype)
        levels = int(2**self.bits - 1)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if self.zero_inside:
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = ((high - low) / levels).clamp_min(_TINY_SCALE)
        zero = round_through(-low / scale)
        codes = (round_through(groups / scale) + zero).clamp(0, levels)
        return ((codes - zero) * scale).reshape(x.shape).to(x.dtype)

    def codes(self, x: Tensor, divisor_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """int8 codes [..., n] and fp32 scales [..., 1] of x / divisor, of whole tokens on the
        symmetric grid, for integer matrix products.
        """
        assert self._plain
        assert self.bits <= 8

        def slow() -> tuple[Tensor, Tensor]:
            z = x.float() if divisor_n is None else x / divisor_n.float()
            scale = self.scale(z)
            top = self._top
            return torch.round(z / scale).clamp_(-(top + 1), top).to(torch.int8), scale

        return token_codes(x, self._grid(x.shape[-1]), divisor_n, slow)

    @property
    def _plain(self) -> bool:
        """Whether each whole token has one symmetric grid."""
        return self.on and self.sym and self.group_size == -1

    def _grid(self, size: int) -> TokenGrid:
        return _token_grid(self.bits, size)

    def scale(self, x: Tensor) -> Tensor:
        """Scale [..., 1] of each group on the symmetric grid."""
        return (x.abs().amax(-1, keepdim=True) / self._top).clamp_min(_TINY_SCALE)

    @property
    def _top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def _grouped(self, x: Tensor) -> Tensor:
        if self.group_size in (-1, x.shape[-1]):
            return x
        if x.shape[-1] % self.group_size:
            raise LLQError(
                f"activations of {x.shape[-1]} channels do not divide into groups of "
                f"{self.group_size}"
            )
        return x.reshape(*x.shape[:-1], -1, self.group_size)


@lru_cache
def _token_grid(bits: int, size: int) -> TokenGrid:
    return TokenGrid(bits, size, _TINY_SCALE)


@dataclass(frozen=True)
class Attention:
    """How queries, keys and values are quantized after the rotary embedding; None: not at all.

    Groups run along head_dim. This simulates a low-bit cache: keys and values are rounded where
    attention reads them, cached or not, and the cache itself keeps the model's dtype. The cache
    that saves memory is layers/kv_cache.py.
    """

    query: TokenQuant | None = None
    key: TokenQuant | None = None
    value: TokenQuant | None = None
    joint_key: bool = False  # the heads of a key token share one grid, instead of one each
    # Queries and keys are rotated first. Scores stay the same, and keys lose their outliers.
    hadamard: bool = False

    @property
    def described(self) -> dict[str, Any]:
        """What results say about it."""
        quants = {"query": self.query, "key": self.key, "value": self.value}
        bits = {f"{name}_bits": q.bits for name, q in quants.items() if q is not None and q.on}
        return {"simulated": True, **bits}

    def transform(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors [B, heads, S, head_dim] as the attention function should get them."""
        if self.hadamard:
            turn = hadamard(query.shape[-1], query.device)
            query, key = turn.turned(query), turn.turned(key)
        if self.query is not None:
            query = self.query(query)
        if self.key is not None:
            key = _across_heads(self.key, key) if self.joint_key else self.key(key)
        return query, key, value if self.value is None else self.value(value)


def _across_heads(quant: TokenQuant, x_BHSD: Tensor) -> Tensor:
    x_BSHD = x_BHSD.transpose(1, 2)
    return quant(x_BSHD.flatten(2)).view(x_BSHD.shape).transpose(1, 2)
