"""Rotations from a seed: orthogonal, invertible, and the same for ever."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch

from llq_hf.common.errors import LLQError
from llq_hf.numerics.rotations import (
    cayley_step,
    factor_sizes,
    hadamard,
    nearest_orthogonal,
    rotation,
)

CPU = torch.device("cpu")
SIZES = [1, 2, 7, 12, 64, 96, 97, 172, 256]
blocked_or_not = pytest.mark.parametrize("blocked", [False, True], ids=["kronecker", "blocked"])


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (4096, (64, 64)),
        (14336, (64, 224)),
        (1024, (32, 32)),
        (8192, (128, 64)),
        (28672, (448, 64)),
        (896, (16, 56)),
        (768, (48, 16)),
        (172, (86, 2)),
        (97, (97, 1)),
        (1, (1, 1)),
    ],
)
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
    first, again, other = (
        rotation(seed, 64, blocked, CPU).apply(torch.eye(64)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@blocked_or_not
def test_global_generators_have_no_say(blocked: bool):
    import numpy as np

    rotation.cache_clear()
    np.random.seed(0)
    torch.manual_seed(0)
    first = rotation(5, 96, blocked, CPU)[:6]
    rotation.cache_clear()
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(
        torch.equal(a, b) for a, b in zip(first, rotation(5, 96, blocked, CPU)[:6], strict=True)
    )


PINNED = {
    (False, 96): "90003b26e232cc27",
    (True, 96): "769a26139c09dc51",
}


@pytest.mark.parametrize(("blocked", "n"), PINNED, ids=["kronecker", "blocked"])
def test_a_seed_means_the_same_rotation_for_ever(blocked: bool, n: int):
    """Checkpoints store seeds only. Permutations exactly; factors to 4 digits: LAPACK's last bits
    differ by machine.
    """
    turn = rotation(2024, n, blocked, CPU)
    digest = hashlib.sha256()
    for part in (turn.permute_in, turn.permute_out):
        digest.update(part.long().numpy().tobytes())
    for part in (turn.first, turn.second):
        digest.update((part.double() * 1e3).round().long().numpy().tobytes())
    assert digest.hexdigest()[:16] == PINNED[blocked, n]


# --- Hadamards ------------------------------------------------------------------------------------

PALEY = [
    12,
    20,
    24,
    28,
    36,
    44,
    56,
    60,
    76,
    104,
    108,
    140,
    896,
]  # of +-1 alone, beside the powers of two


@pytest.mark.parametrize("n", [*range(1, 141), 172, 352, 896, 1376])
def test_hadamards_of_any_size_are_orthogonal(n: int):
    eye = torch.eye(n, dtype=torch.float64)
    H = hadamard(n, CPU).apply(eye)
    assert torch.allclose(H @ H.T, eye, atol=1e-12)
    assert torch.allclose(hadamard(n, CPU).invert(H), eye, atol=1e-12)


def test_a_large_hadamard_is_orthogonal():
    n = 14336  # of LLaMA-3-8B: 28 x 512
    x = torch.randn(64, n, generator=torch.Generator().manual_seed(0))
    turned = hadamard(n, CPU).apply(x)
    assert torch.allclose(turned @ turned.T / n, x @ x.T / n, atol=1e-4)
    assert torch.allclose(hadamard(n, CPU).invert(turned), x, atol=1e-4)
    assert torch.allclose(hadamard(n, CPU).apply(torch.eye(n)[:5]).abs(), torch.tensor(n**-0.5))


@pytest.mark.parametrize("n", [1, 2, 64, 4096, *PALEY])
def test_most_have_entries_of_one_size(n: int):
    H = hadamard(n, CPU).apply(torch.eye(n))
    assert torch.allclose(H.abs(), torch.tensor(n**-0.5), atol=1e-6)


@pytest.mark.parametrize("n", [12, 28, 52, 96, 172])
def test_the_fast_transform_is_the_dense_product(n: int):
    walsh, power = torch.ones(1, 1, dtype=torch.float64), hadamard(n, CPU).power
    while len(walsh) < power:
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), walsh)
    H = torch.kron(hadamard(n, CPU).head.double(), walsh / power**0.5)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(hadamard(n, CPU).apply(x), x @ H, atol=1e-12)
    assert torch.allclose(hadamard(n, CPU).invert(x), x @ H.T, atol=1e-12)
    assert hadamard(n, CPU).apply(x.bfloat16()).dtype == torch.float32


PINNED_HADAMARDS = {28: "74e4c5a8ca4cc979", 96: "2b54b30699230d66", 172: "3a5883597104838f"}


@pytest.mark.parametrize("n", PINNED_HADAMARDS)
def test_a_size_means_the_same_hadamard_for_ever(n: int):
    """Checkpoints hold weights times it. To 3 digits: those of random orthogonal parts differ by
    machine.
    """
    H = hadamard(n, CPU).apply(torch.eye(n, dtype=torch.float64))
    digest = hashlib.sha256((H * 1e3).round().long().numpy().tobytes()).hexdigest()
    assert digest[:16] == PINNED_HADAMARDS[n]


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 1.5])
def test_cayley_steps_stay_orthogonal_and_go_downhill(rate: float):
    """|R A - B|^2, whose minimum on the manifold is known: the polar factor of B A^T."""
    random = torch.Generator().manual_seed(2)
    A, R = torch.randn(12, 12, generator=random), torch.eye(12)
    B = torch.linalg.qr(torch.randn(12, 12, generator=random))[0] @ A
    losses = []
    for _ in range(40):
        R.requires_grad_()
        loss = (R @ A - B).square().sum() / 100
        (gradient,) = torch.autograd.grad(loss, R)
        losses.append(loss.item())
        R = cayley_step(R.detach(), gradient, rate)
    assert torch.allclose(R @ R.T, torch.eye(12), atol=1e-4)
    assert all(after < before for before, after in pairwise(losses)) or rate > 1
    assert losses[-1] < 0.7 * losses[0]


def test_the_nearest_orthogonal_matrix_is_the_polar_factor():
    R = torch.linalg.qr(
        torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )[0]
    near = R + 1e-3 * torch.randn(
        9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    U, _, Vh = torch.linalg.svd(near)
    assert torch.allclose(nearest_orthogonal(near), U @ Vh, atol=1e-12)
    with pytest.raises(LLQError, match="learn_rate"):
        nearest_orthogonal(torch.zeros(3, 3))
