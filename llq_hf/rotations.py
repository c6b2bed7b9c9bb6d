"""Random orthogonal transforms that are regenerated from a seed: the file stores 4 bytes a side, not a matrix.

Legend: n size, A x B = n with A and B near sqrt(n), ... any leading shape.

Q = permute_out . (Q0 x Q1) . permute_in: a vector is permuted, seen as an [A, B] matrix, multiplied along its first
axis by an A x A and along its second by a B x B random orthogonal matrix, and permuted again (QuIP, Chee et al. 2023,
section 4). Randomness comes from numpy's RandomState, whose streams numpy has promised never to change (NEP 19): a
checkpoint must mean the same weights in ten years. Factors are kept in fp32, about 8 (A + B) sqrt(n) bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Rotation(NamedTuple):
    """An orthogonal n x n transform in factors. `first` [A, A] or [B, A, A], `second` [B, B] or [A, B, B] (blocked)."""

    permute_in: Tensor
    first: Tensor
    second: Tensor
    permute_out: Tensor
    unpermute_in: Tensor  # inverse permutations: found once, used at every call
    unpermute_out: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Q x for every vector x [..., n], in fp32."""
        grid = x.float()[..., self.permute_in].reshape(-1, self.first.shape[-1], self.second.shape[-1])
        grid = torch.einsum("bij,tjb->tib" if self.first.ndim == 3 else "ij,tjb->tib", self.first, grid)
        grid = torch.einsum("aij,taj->tai" if self.second.ndim == 3 else "ij,taj->tai", self.second, grid)
        return grid.reshape(x.shape)[..., self.permute_out]

    def invert(self, x: Tensor) -> Tensor:
        """Q^T x for every vector x [..., n], in fp32."""
        grid = x.float()[..., self.unpermute_out]
        grid = grid.reshape(-1, self.first.shape[-1], self.second.shape[-1])
        grid = torch.einsum("aji,taj->tai" if self.second.ndim == 3 else "ji,taj->tai", self.second, grid)
        grid = torch.einsum("bji,tjb->tib" if self.first.ndim == 3 else "ji,tjb->tib", self.first, grid)
        return grid.reshape(x.shape)[..., self.unpermute_in]


def factor_sizes(n: int) -> tuple[int, int]:
    """(A, B), A * B = n: products of the even- and of the odd-indexed prime factors. 14336 -> (64, 224)."""
    primes, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    return math.prod(primes[0::2]), math.prod(primes[1::2])


@lru_cache(maxsize=8192)
@torch.inference_mode(False)  # what is cached under inference mode could never be trained through again
def rotation(seed: int, n: int, blocked: bool, device: torch.device) -> Rotation:
    """The transform of `seed`. blocked: an own matrix for every slice (B of size A, A of size B) instead of one."""
    random = np.random.RandomState(seed)
    a, b = factor_sizes(n)
    permute_in, permute_out = (torch.from_numpy(random.permutation(n)) for _ in range(2))
    first = _orthogonal(random, b if blocked else 1, a)
    second = _orthogonal(random, a if blocked else 1, b)
    if not blocked:
        first, second = first[0], second[0]
    parts = (permute_in, first, second, permute_out, torch.argsort(permute_in), torch.argsort(permute_out))
    return Rotation(*(part.to(device) for part in parts))


def _orthogonal(random: np.random.RandomState, count: int, size: int) -> Tensor:
    """[count, size, size] Haar-distributed: QR of a Gaussian with the signs of R's diagonal taken out."""
    q, r = np.linalg.qr(random.standard_normal((count, size, size)))
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return torch.from_numpy((q * signs).astype(np.float32))
