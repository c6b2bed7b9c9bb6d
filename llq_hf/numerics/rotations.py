"""Orthogonal transforms that are computed, not stored: random ones from a seed, Hadamards of any
size from nothing.

Legend: n size, A x B = n with A and B near sqrt(n), K x P = n with P a power of two, ... any
leading shape.

Q = permute_out . (Q0 x Q1) . permute_in: a vector is permuted, seen as an [A, B] matrix, multiplied
along its first axis by an A x A and along its second by a B x B random orthogonal matrix, and
permuted again (QuIP, Chee et al. 2023, section 4). Randomness comes from numpy's RandomState, whose
streams numpy has promised never to change (NEP 19): a checkpoint must mean the same weights in ten
years. Factors are kept in fp32, and transposed for kernels: 8 (A^2 + B^2) bytes, beside 16 n of the
permutations.

Hadamards are H_K x H_P: a fast Walsh-Hadamard transform along P, a small K x K matrix across (see
`hadamard`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from ..kernels import Transform


class Rotation(NamedTuple):
    """An orthogonal n x n transform in factors. `first` [A, A] or [B, A, A], `second` [B, B] or [A,
    B, B] (blocked).
    """

    permute_in: Tensor
    first: Tensor
    second: Tensor
    permute_out: Tensor
    unpermute_in: Tensor  # inverse permutations: found once, used at every call
    unpermute_out: Tensor
    forth: Transform | None  # `apply` and `invert` as kernels read them; None: blocked
    back: Transform | None

    def apply(self, x: Tensor) -> Tensor:
        """Q x for every vector x [..., n], in fp32."""
        grid = (
            x.index_select(-1, self.permute_in)
            .float()
            .reshape(-1, self.first.shape[-1], self.second.shape[-1])
        )
        grid = (
            self.first @ grid
            if self.first.ndim == 2
            else torch.einsum("bij,tjb->tib", self.first, grid)
        )
        grid = (
            grid @ self.second.T
            if self.second.ndim == 2
            else torch.einsum("aij,taj->tai", self.second, grid)
        )
        return grid.reshape(x.shape).index_select(-1, self.permute_out)

    def invert(self, x: Tensor) -> Tensor:
        """Q^T x for every vector x [..., n], in fp32."""
        grid = x.index_select(-1, self.unpermute_out).float()
        grid = grid.reshape(-1, self.first.shape[-1], self.second.shape[-1])
        grid = (
            grid @ self.second
            if self.second.ndim == 2
            else torch.einsum("aji,taj->tai", self.second, grid)
        )
        grid = (
            self.first.T @ grid
            if self.first.ndim == 2
            else torch.einsum("bji,tjb->tib", self.first, grid)
        )
        return grid.reshape(x.shape).index_select(-1, self.unpermute_in)


def factor_sizes(n: int) -> tuple[int, int]:
    """(A, B), A * B = n: products of the even- and of the odd-indexed prime factors. 14336 -> (64,
    224).
    """
    primes, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    return math.prod(primes[0::2]), math.prod(primes[1::2])


@lru_cache(maxsize=8192)
@torch.inference_mode(
    False
)  # what is cached under inference mode could never be trained through again
def rotation(seed: int, n: int, blocked: bool, device: torch.device) -> Rotation:
    """The transform of `seed`. blocked: an own matrix for every slice (B of size A, A of size B)
    instead of one.
    """
    random = np.random.RandomState(seed)
    a, b = factor_sizes(n)
    permute_in, permute_out = (torch.from_numpy(random.permutation(n)) for _ in range(2))
    first = _orthogonal(random, b if blocked else 1, a)
    second = _orthogonal(random, a if blocked else 1, b)
    if not blocked:
        first, second = first[0], second[0]
    first, second = first.to(device), second.to(device)
    into, out, from_in, from_out = (
        order.to(device, torch.int32)
        for order in (
            permute_in,
            permute_out,
            torch.argsort(permute_in),
            torch.argsort(permute_out),
        )
    )
    forth = back = None
    if not blocked:
        forth = Transform(into, first, second.T.contiguous(), out)
        back = Transform(from_out, first.T.contiguous(), second, from_in)
    return Rotation(into, first, second, out, from_in, from_out, forth, back)


def _orthogonal(
    random: np.random.RandomState, count: int, size: int, dtype: type = np.float32
) -> Tensor:
    """[count, size, size] Haar-distributed: QR of a Gaussian with the signs of R's diagonal taken
    out.
    """
    q, r = np.linalg.qr(random.standard_normal((count, size, size)))
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return torch.from_numpy((q * signs).astype(dtype))


class Hadamard(NamedTuple):
    """The orthogonal n x n transform H = (head x Walsh) / sqrt(n): `head` [K, K], n = K * `power`,
    power 2**a.
    """

    head: Tensor
    power: int

    def apply(self, x: Tensor) -> Tensor:
        """x H for every vector x [..., n]; in fp64 where x is, else in fp32."""
        return self._turn(x, self.head)

    def invert(self, x: Tensor) -> Tensor:
        """x H^T for every vector x [..., n]."""
        return self._turn(x, self.head.T)

    def _turn(self, x: Tensor, head: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        grid = _walsh(x.reshape(-1, len(head), self.power)) * self.power**-0.5
        if len(head) > 1:
            grid = torch.einsum("tkp,kj->tjp", grid, head.to(x.dtype))
        turned: Tensor = grid.reshape(x.shape)
        return turned


def hadamard(n: int, device: torch.device) -> Hadamard:
    """The Hadamard transform of size n = 2**a * k, k odd: the same for ever, for checkpoints hold
    only its results.

    K is k times the least power of two for which Paley's construction gives a K x K matrix of
    signs: 4096 = 1 * 4096, 14336 = 28 * 512, 896 = 28 * 32. Where there is none up to K = 256 (172
    = 4 * 43), a fixed random orthogonal k x k matrix stands for it.
    """
    return _hadamard(n, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _hadamard(n: int, device: torch.device) -> Hadamard:
    odd = n // (n & -n)
    sizes = [
        odd << a for a in range(n.bit_length()) if n % (odd << a) == 0 and odd << a <= MOST_PALEY
    ]
    for size in sizes:
        signs = _paley(size)
        if signs is not None:
            return Hadamard(torch.from_numpy(signs / math.sqrt(size)).to(device), n // size)
    random = np.random.RandomState(odd)
    return Hadamard(_orthogonal(random, 1, odd, np.float64)[0].to(device), n // odd)


torch.compiler.assume_constant_result(hadamard)  # type: ignore[no-untyped-call]  # graphs hold it, not how it is found

MOST_PALEY = 256  # beyond, its K x K matrix would cost more than the linear gains


def _paley(size: int) -> np.ndarray | None:
    """Matrix of +-1 with orthogonal rows [size, size], fp64: from quadratic residues modulo a prime
    (Paley 1933).
    """
    if size == 1:
        return np.ones((1, 1))
    if size % 4 == 0 and _is_prime(size - 1) and (size - 1) % 4 == 3:
        jacobsthal = _jacobsthal(size - 1)
        skew = np.block(
            [[np.zeros((1, 1)), np.ones((1, size - 1))], [-np.ones((size - 1, 1)), jacobsthal]]
        )
        return np.asarray(np.eye(size) + skew)
    half = size // 2
    if size % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        jacobsthal = _jacobsthal(half - 1)
        conference = np.block(
            [[np.zeros((1, 1)), np.ones((1, half - 1))], [np.ones((half - 1, 1)), jacobsthal]]
        )
        return np.asarray(
            np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(half), [[1, -1], [-1, -1]])
        )
    return None


def _jacobsthal(q: int) -> np.ndarray:
    """chi(i - j mod q): 0 on the diagonal, 1 where i - j is a square modulo the odd prime q, else
    -1.
    """
    chi = -np.ones(q)
    chi[[i * i % q for i in range(1, q)]] = 1
    chi[0] = 0
    return np.asarray(chi[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q])


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, math.isqrt(n) + 1))


def _walsh(x: Tensor) -> Tensor:
    """Unscaled Walsh-Hadamard transform along the last axis, whose size is a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        even, odd = pairs.unbind(-2)
        x = torch.stack((even + odd, even - odd), dim=-2).reshape(x.shape)
        half *= 2
    return x


# --- learning -------------------------------------------------------------------------------------


def cayley_step(R: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A step of Cayley SGD (Li et al. 2020) on the orthogonal matrices: R [n, n] moved against the
    loss's gradient.

    A = What - What^T is the descent direction in the tangent space; the step along it is at most 1 / |A|_1, and stays
    on the manifold: Y = (I - t/2 A)^-1 (I + t/2 A) R^T.
    """
    mixed = -gradient.T @ R
    half = mixed - 0.5 * R.T @ (R @ mixed)
    A = half - half.T
    t = min(rate, 1 / (float(A.abs().sum(0).max()) + 1e-8))
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    moved: Tensor = torch.linalg.solve(eye - t / 2 * A, (eye + t / 2 * A) @ R.T).T
    return moved


def nearest_orthogonal(R: Tensor) -> Tensor:
    """The orthogonal matrix nearest to an almost orthogonal one, fp64: its polar factor, by
    Newton's iteration.
    """
    R = R.double()
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    for _ in range(6):  # the error is squared each time
        R = R @ (1.5 * eye - 0.5 * R.T @ R)
    if not (R @ R.T - eye).abs().max() < 1e-10:
        raise LLQError("learning left the orthogonal matrices; use a smaller learn_rate")
    return R
