"""The weight that aims at the full-precision model's outputs: a ridge regression, a share of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llq_hf.numerics.aim import RIDGE, pulled

T, I, O = 200, 24, 7  # noqa: E741 (in_features)


def draws(seed: int, tokens: int = T, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs X [T, I], and X~ = X + what can be told from X + what cannot."""
    random = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(I, I, generator=torch.Generator().manual_seed(9)) / I**0.5
    x_TI = torch.randn(tokens, I, generator=random) * (0.2 + torch.arange(I) / I)
    other_TI = noise * torch.randn(tokens, I, generator=random)
    return x_TI, x_TI + 0.2 * x_TI @ mix_II + other_TI


def weight() -> Tensor:
    return torch.randn(O, I, generator=torch.Generator().manual_seed(1))


def statistics(x_TI: Tensor, dense_TI: Tensor) -> tuple[Tensor, Tensor]:
    return x_TI.T @ x_TI, x_TI.T @ dense_TI


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_it_is_the_ridge_regression(share: float) -> None:
    """Row by row by least squares: X w' = X~ w, and sqrt(ridge) (w' - w) = 0 for each input."""
    x_TI, dense_TI = draws(0)
    H_II, C_II = statistics(x_TI, dense_TI)
    ridge = RIDGE * float(torch.diagonal(H_II).mean())
    system = np.vstack([x_TI.double().numpy(), ridge**0.5 * np.eye(I)])
    for w_I, found_I in zip(weight(), pulled(weight(), H_II, C_II, share), strict=True):
        right = np.concatenate([dense_TI.double() @ w_I.double(), ridge**0.5 * w_I.double()])
        solved = torch.from_numpy(np.linalg.lstsq(system, right, rcond=None)[0])
        expected = w_I + share * (solved - w_I)
        assert torch.allclose(found_I.double(), expected, atol=1e-5)


def test_it_comes_nearer_on_tokens_that_it_has_not_seen() -> None:
    """With few tokens, a full regression without a ridge does worse than the weight itself."""
    few = draws(0, tokens=60, noise=0.4)
    x_TI, dense_TI = draws(1, tokens=4000, noise=0.4)

    def loss(weight_OI: Tensor) -> float:
        return float((x_TI @ weight_OI.T - dense_TI @ weight().T).square().sum())

    H_II, C_II = statistics(*few)
    full_OI = torch.linalg.solve(H_II, C_II @ weight().T).T
    assert loss(pulled(weight(), H_II, C_II, 0.5)) < loss(weight()) < loss(full_OI)


def test_the_weight_itself_where_nothing_can_be_solved() -> None:
    H_II, C_II = statistics(*draws(0))
    for broken_II in (-H_II, torch.full_like(H_II, torch.nan), torch.full_like(H_II, torch.inf)):
        assert torch.equal(pulled(weight(), broken_II, C_II, 1.0), weight())
    assert torch.equal(pulled(weight(), torch.zeros(I, I), torch.zeros(I, I), 1.0), weight())


def test_equal_inputs_need_no_other_weight() -> None:
    x_TI, _ = draws(0)
    H_II, _ = statistics(x_TI, x_TI)
    assert torch.allclose(pulled(weight(), H_II.clone(), H_II, 1.0), weight(), atol=1e-6)
