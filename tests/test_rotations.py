"""Rotations from a seed: orthogonal, invertible, and the same for ever."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from llq_hf.rotations import factor_sizes, rotation

CPU = torch.device("cpu")
SIZES = [1, 2, 7, 12, 64, 96, 97, 172, 256]
blocked_or_not = pytest.mark.parametrize("blocked", [False, True], ids=["kronecker", "blocked"])


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(4096, (64, 64)), (14336, (64, 224)), (1024, (32, 32)), (8192, (128, 64)), (28672, (448, 64)), (896, (16, 56)),
     (768, (48, 16)), (172, (86, 2)), (97, (97, 1)), (1, (1, 1))],
)  # fmt: skip
def test_factors_are_products_of_every_other_prime(n: int, sizes: tuple[int, int]):
    a, b = factor_sizes(n)
    assert a * b == n
    assert (a, b) == sizes


@pytest.mark.parametrize("n", SIZES)
@blocked_or_not
def test_orthogonal_and_inverse(n: int, blocked: bool):
    turn = rotation(11, n, blocked, CPU)
    Q = turn.apply(torch.eye(n)).T  # column j is Q e_j
    assert torch.allclose(Q @ Q.T, torch.eye(n), atol=1e-5)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn.apply(x), x @ Q.T, atol=1e-5)
    assert torch.allclose(turn.invert(turn.apply(x)), x, atol=1e-5)
    assert torch.allclose(turn.apply(turn.invert(x)), x, atol=1e-5)
    assert turn.apply(x).shape == x.shape


@blocked_or_not
def test_spreads_a_single_coordinate(blocked: bool):
    """What rotations are for: no entry of a rotated unit vector is large."""
    n = 1024
    Q = rotation(3, n, blocked, CPU).apply(torch.eye(n))
    assert float(Q.abs().max()) < 20 / math.sqrt(n)


@blocked_or_not
def test_seeds_and_sizes_give_different_ones(blocked: bool):
    first, again, other = (rotation(seed, 64, blocked, CPU).apply(torch.eye(64)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@blocked_or_not
def test_global_generators_have_no_say(blocked: bool):
    import numpy as np

    rotation.cache_clear()
    np.random.seed(0)
    torch.manual_seed(0)
    first = rotation(5, 96, blocked, CPU)
    rotation.cache_clear()
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, rotation(5, 96, blocked, CPU), strict=True))


PINNED = {
    (False, 96): "90003b26e232cc27",
    (True, 96): "769a26139c09dc51",
}


@pytest.mark.parametrize(("blocked", "n"), PINNED, ids=["kronecker", "blocked"])
def test_a_seed_means_the_same_rotation_for_ever(blocked: bool, n: int):
    """Checkpoints store seeds only. Permutations exactly; factors to 4 digits: LAPACK's last bits differ by machine."""
    turn = rotation(2024, n, blocked, CPU)
    digest = hashlib.sha256()
    for part in (turn.permute_in, turn.permute_out):
        digest.update(part.long().numpy().tobytes())
    for part in (turn.first, turn.second):
        digest.update((part.double() * 1e3).round().long().numpy().tobytes())
    assert digest.hexdigest()[:16] == PINNED[blocked, n]
