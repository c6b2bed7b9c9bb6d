"""Dynamic quantization of activations: every token finds its own grid while the model runs.

Legend: g values that share a scale, M = 2**(bits - 1) - 1.

sym:  s = max|x| / M,                x^ = s * clamp(round(x / s), -M - 1, M)        (SmoothQuant, QuaRot)
asym: s = (max - min) / (2**b - 1),  x^ = s * (clamp(round(x / s) + z, 0, 2**b - 1) - z),  z = round(-min / s)
      (OmniQuant; with zero always inside the range: SpinQuant)

Computed in fp32 whatever the model's dtype: a bf16 code of 8 bits would not survive its own
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import LLQError
from .rotations import hadamard

OFF = 16  # bits from which on activations are left as they are
_TINY_SCALE = 1e-5  # of a token that is all zeros; the value of all three papers' codes


def pass_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the dtype of x, with the gradient of x (straight-through estimator)."""
    return x + (value.to(x.dtype) - x).detach()


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had happened."""
    return pass_through(x, torch.round(x)) if x.requires_grad else torch.round(x)


@dataclass(frozen=True)
class TokenQuant:
    """A family of grids along the last axis. bits >= 16: off. group_size -1: the whole axis shares
    a grid.

    zero_inside: an asymmetric range always holds zero, so its zero point is a code too.
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
                f"activation group_size={self.group_size} must be -1 (the whole token) or at least 1"
            )

    @property
    def on(self) -> bool:
        return self.bits < OFF

    def __call__(self, x: Tensor) -> Tensor:
        """What x [..., n] becomes, in its dtype; differentiable with rounding passed through."""
        if not self.on:
            return x
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

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(int8 codes [..., n], fp32 scale [..., 1]) of whole tokens on the symmetric grid: for
        integer matmuls.
        """
        assert self.sym
        assert self.bits <= 8
        assert self.group_size == -1
        x = x.float()
        scale = self.scale(x)
        return torch.round(x / scale).clamp_(-(self._top + 1), self._top).to(torch.int8), scale

    def scale(self, x: Tensor) -> Tensor:
        """Symmetric step of each group [..., 1]."""
        return (x.abs().amax(-1, keepdim=True) / self._top).clamp_min(_TINY_SCALE)

    @property
    def _top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def _grouped(self, x: Tensor) -> Tensor:
        if self.group_size in (-1, x.shape[-1]):
            return x
        if x.shape[-1] % self.group_size:
            raise LLQError(
                f"activations of {x.shape[-1]} channels do not divide into groups of {self.group_size}"
            )
        return x.reshape(*x.shape[:-1], -1, self.group_size)


@dataclass(frozen=True)
class Attention:
    """What happens to queries, keys and values after the rotary embedding; None: nothing. Groups go
    along head_dim.

    Keys and values are quantized where attention reads them, cached or not: the numbers are those
    of a low-bit cache, the cache itself keeps the model's dtype.
    """

    query: TokenQuant | None = None
    key: TokenQuant | None = None
    value: TokenQuant | None = None
    joint_key: bool = False  # all heads of a key token share one grid, instead of one each
    hadamard: bool = (
        False  # queries and keys are turned first: no score changes, no channel of a key stands out
    )

    def transform(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, S, head_dim] each, as they go into the attention function."""
        if self.hadamard:
            turn = hadamard(query.shape[-1], query.device)
            query, key = turn.apply(query).to(query.dtype), turn.apply(key).to(key.dtype)
        if self.query is not None:
            query = self.query(query)
        if self.key is not None:
            key = _across_heads(self.key, key) if self.joint_key else self.key(key)
        return query, key, value if self.value is None else self.value(value)


def _across_heads(quant: TokenQuant, x_BHSD: Tensor) -> Tensor:
    x_BSHD = x_BHSD.transpose(1, 2)
    return quant(x_BSHD.flatten(2)).view(x_BSHD.shape).transpose(1, 2)
