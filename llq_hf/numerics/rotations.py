"""Orthogonal transforms that are computed, not stored: random ones from a seed, and Hadamards.

Legend: n size, A x B = n with A and B near sqrt(n), K x P = n with P a power of two, ... any
leading shape.

Random (QuIP, Chee et al. 2023, section 4)
    Q = permute_out . (Q0 x Q1) . permute_in. A vector is permuted and viewed as a matrix [A, B].
    Its first axis is multiplied by a random orthogonal A x A matrix, its second by a B x B one, and
    the result is permuted again. The factors are kept in fp32, also transposed for kernels: 8 (A^2
    + B^2) bytes, beside 16 n of the permutations. Random numbers come from numpy's RandomState,
    whose streams never change (NEP 19), so that a checkpoint keeps its meaning.

Hadamard (see `hadamard`)
    H_K x H_P: a fast Walsh-Hadamard transform along P, and a small K x K matrix across.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from ..kernels import Kronecker, Transform, transformed


class Rotation(NamedTuple):
    """An orthogonal n x n transform in factors.

    first [A, A], second [B, B]; or blocked: first [B, A, A], second [A, B, B].
    """

    permute_in: Tensor
    first: Tensor
    second: Tensor
    permute_out: Tensor
    unpermute_in: Tensor  # the inverse permutations
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
    """(A, B) with A * B = n: products of every other prime factor. 14336 -> (64, 224)."""
    primes = []
    rest = n
    p = 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    return math.prod(primes[0::2]), math.prod(primes[1::2])


@lru_cache(maxsize=8192)
@torch.inference_mode(False)  # tensors cached under inference mode could not be trained through
def rotation(seed: int, n: int, blocked: bool, device: torch.device) -> Rotation:
    """The transform of `seed`. blocked: each slice has a matrix of its own (B of size A, A of size
    B) instead of all sharing one.
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
    """Haar-distributed matrices [count, size, size]: Q of the QR of a Gaussian matrix, times the
    signs of R's diagonal.
    """
    q, r = np.linalg.qr(random.standard_normal((count, size, size)))
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return torch.from_numpy((q * signs).astype(dtype))


class Hadamard(NamedTuple):
    """The orthogonal n x n transform H = head x Walsh / sqrt(power), with n = K * power.

    head: an orthogonal [K, K] matrix. power: 2**a, the size of the Walsh-Hadamard transform.
    """

    head: Tensor
    power: int

    def apply(self, x: Tensor) -> Tensor:
        """x H for every vector x [..., n]; in fp64 if x is fp64, else in fp32."""
        return self._turn(x, self.head)

    def turned(self, x: Tensor) -> Tensor:
        """x H for every vector x [..., n], computed in fp32, in the dtype of x; by one kernel where
        there is one.
        """
        by = None
        if x.device.type == "cuda" and not torch.compiler.is_compiling():
            by = _kronecker(len(self.head), self.power, x.device)
        return transformed(x, by, lambda: self.apply(x).to(x.dtype))

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
    """The Hadamard transform of size n = 2**a * k, k odd.

    It must never change, because checkpoints depend on it and do not store it. K is k times the
    least power of two for which Paley's construction gives a K x K matrix of signs: 4096 = 1 *
    4096, 14336 = 28 * 512, 896 = 28 * 32. Where none exists up to K = 256 (172 = 4 * 43), a fixed
    random orthogonal k x k matrix takes its place.
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


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _kronecker(size: int, power: int, device: torch.device) -> Kronecker:
    """The transform with a head of `size` as kernels read it: the Walsh-Hadamard transform is one
    of 2**a times one of 2**b. The first joins the head, so that both factors are about as large.
    """
    left = 1
    while 4 * left * left * size * size <= 2 * size * power and left < power:
        left *= 2
    head = hadamard(size * power, device).head.T.contiguous().cpu()
    first = torch.kron(head, _walsh(torch.eye(left, dtype=head.dtype)) * left**-0.5)
    second = _walsh(torch.eye(power // left, dtype=head.dtype)) * (power // left) ** -0.5
    return Kronecker(*(part.float().contiguous().to(device) for part in (first, second)))


# Compiled graphs contain the matrix, not the search for it.
torch.compiler.assume_constant_result(hadamard)  # type: ignore[no-untyped-call]

MOST_PALEY = 256  # with a larger K, the K x K matrix would cost more than the rotation gains


def _paley(size: int) -> np.ndarray | None:
    """fp64 matrix of +-1 with orthogonal rows [size, size], made from quadratic residues modulo a
    prime (Paley 1933). None: the construction has none of this size.
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
    size = x.shape[-1]
    half = 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        even, odd = pairs.unbind(-2)
        x = torch.stack((even + odd, even - odd), dim=-2).reshape(x.shape)
        half *= 2
    return x


# --- learning -------------------------------------------------------------------------------------


def cayley_step(R: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Move the orthogonal matrix R [n, n] against the gradient; the result is orthogonal, too.

    This is one step of Cayley SGD (Li et al. 2020). A = What - What^T is the descent direction in
    the tangent space. The step t is `rate`, or 1 / |A|_1 where that is less: Y = (I - t/2 A)^-1
    (I + t/2 A) R^T.
    """
    mixed = -gradient.T @ R
    half = mixed - 0.5 * R.T @ (R @ mixed)
    A = half - half.T
    t = min(rate, 1 / (float(A.abs().sum(0).max()) + 1e-8))
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    moved: Tensor = torch.linalg.solve(eye - t / 2 * A, (eye + t / 2 * A) @ R.T).T
    return moved


def nearest_orthogonal(R: Tensor) -> Tensor:
    """The orthogonal matrix nearest to an almost orthogonal one, in fp64.

    It is the polar factor, found by Newton's iteration. LLQError where it does not converge.
    """
    R = R.double()
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    for _ in range(6):  # the error is squared each time
        R = R @ (1.5 * eye - 0.5 * R.T @ R)
    if not (R @ R.T - eye).abs().max() < 1e-10:
        raise LLQError("learning left the orthogonal matrices; use a smaller learn_rate")
    return R
