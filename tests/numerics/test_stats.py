"""Statistics of calibration inputs and the factorizations made of them."""

from __future__ import annotations

import pytest
import torch

from llq_hf.common.errors import LLQError
from llq_hf.numerics import stats
from llq_hf.numerics.cholesky import (
    _reverse,
    factorize,
    largest_first,
    prepare_hessian,
    revive_dead,
)
from llq_hf.numerics.stats import Hessian, PairedHessian

CPU = torch.device("cpu")


def tokens(count: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(seed))


def hessian(x_TI: torch.Tensor, sequences: int = 1) -> Hessian:
    stat = Hessian(x_TI.shape[1], CPU)
    stat.update(x_TI, sequences)
    return stat


def test_equals_the_running_mean_of_the_authors():
    """H <- H k/(k+1); X <- sqrt(2/(k+1)) X; H += X X^T, sequence by sequence."""
    x_NSI = tokens(5 * 7, 12).view(5, 7, 12)
    expected = torch.zeros(12, 12)
    for k, x_SI in enumerate(x_NSI):
        expected = expected * k / (k + 1) + 2 / (k + 1) * x_SI.T @ x_SI
    for batches in ([5], [2, 3], [1] * 5):
        stat = Hessian(12, CPU)
        for part in x_NSI.split(batches):
            stat.update(part.flatten(0, 1), len(part))
        assert torch.allclose(stat.H_II, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("panel", [1, 5, 12, 13])
def test_panels_of_columns_make_the_whole_matrix(panel: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "PANEL", panel)
    first_TI, second_TI, third_TI = tokens(30, 12), 2 * tokens(20, 12), 3 * tokens(9, 12)
    stat, later = hessian(first_TI), hessian(second_TI)
    # Read in between, it goes on from there
    assert torch.allclose(stat.sum_II, first_TI.T @ first_TI, rtol=1e-5)
    stat.merge(later)
    stat.update(third_TI, 1)
    all_TI = torch.cat([first_TI, second_TI, third_TI])
    assert torch.allclose(stat.sum_II, all_TI.T @ all_TI, rtol=1e-5, atol=1e-4)
    assert torch.equal(stat.sum_II, stat.sum_II.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_activations_are_squared_in_fp32(dtype: torch.dtype):
    x_TI = (tokens(16, 8) * 2000).to(dtype)
    stat = hessian(x_TI)
    stat.check("x")
    assert torch.allclose(stat.sum_II, x_TI.float().T @ x_TI.float(), rtol=1e-5, atol=1.0)
    assert stat.sum_II.diagonal().max() > torch.finfo(torch.float16).max


def test_every_reading_is_a_fresh_copy():
    stat = hessian(tokens(8, 4))
    stat.H_II.zero_()
    assert stat.H_II.any()


def test_unusable_statistics_are_refused_by_name():
    with pytest.raises(LLQError, match=r"layers\.3\.mlp saw no calibration data"):
        Hessian(4, CPU).check("layers.3.mlp")
    for bad in (float("inf"), float("nan")):
        x_TI = tokens(4, 4)
        x_TI[2, 1] = bad
        with pytest.raises(LLQError, match=r"layers\.3\.mlp is not finite"):
            hessian(x_TI).check("layers.3.mlp")


def test_dead_channels_get_a_diagonal_of_one():
    x_TI = tokens(8, 6)
    x_TI[:, [1, 4]] = 0
    H_II = hessian(x_TI).H_II
    before = H_II.clone()
    assert revive_dead(H_II).nonzero().flatten().tolist() == [1, 4]
    assert H_II[1, 1] == H_II[4, 4] == 1
    alive = [0, 2, 3, 5]
    assert torch.equal(H_II[alive][:, alive], before[alive][:, alive])


def test_factors_are_what_they_are_called():
    H_II = hessian(tokens(64, 10)).H_II
    damped_II = H_II + 0.01 * H_II.diagonal().mean() * torch.eye(10)
    notes: dict = {}
    lower = factorize(H_II, 0.01, notes, inverse=False)
    assert torch.allclose(lower @ lower.T, damped_II, rtol=1e-4, atol=1e-4)
    assert torch.equal(lower, lower.tril())
    upper = factorize(H_II, 0.01, notes, inverse=True)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped_II), rtol=1e-3, atol=1e-5)
    assert torch.equal(upper, upper.triu())
    assert notes == {"damp": 0.01}
    assert lower.dtype == upper.dtype == torch.float32


def test_h_is_left_alone():
    H_II = hessian(tokens(64, 10)).H_II
    before = H_II.clone()
    for inverse, quick in ((True, False), (True, True), (False, False)):
        factorize(H_II, 0.01, {}, inverse=inverse, quick=quick)
        assert torch.equal(H_II, before)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
def test_reversing_in_place(size: int):
    M_II = torch.arange(float(size * size)).view(size, size)
    expected = M_II.flip(0, 1)
    _reverse(M_II, rows=2)
    assert torch.equal(M_II, expected)


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "plain"])
def test_the_ladder_ends_in_a_floor_and_then_in_none(inverse: bool):
    notes: dict = {}
    H_II = torch.diag(torch.tensor([10.0, 10.0, -12.0]))  # mean 8/3: needs a floor above 12
    assert factorize(H_II, 0.01, notes, inverse=inverse) is not None
    assert notes["damp"] == 1.0
    assert notes["floor"] == 10.0
    assert factorize(-torch.eye(3), 0.01, {}, inverse=inverse) is None
    assert factorize(torch.full((3, 3), float("nan")), 0.01, {}, inverse=inverse) is None


def test_no_damping_at_all_is_possible():
    notes: dict = {}
    H_II = hessian(tokens(64, 10)).H_II
    lower = factorize(H_II, 0.0, notes, inverse=False)
    assert torch.allclose(lower @ lower.T, H_II, rtol=1e-4, atol=1e-4)
    assert notes["damp"] == 0.0


@pytest.mark.parametrize("size", [5, 300, 700])
def test_the_quick_factor_is_the_factor(size: int):
    x_TI = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size))
    H_II = x_TI.T @ x_TI / size
    slow_II = factorize(H_II, 0.01, {}, inverse=True)
    quick_II = factorize(H_II, 0.01, {}, inverse=True, quick=True)
    assert torch.allclose(quick_II, slow_II, atol=1e-5)
    assert not quick_II.tril(-1).any()
    damped_II = H_II + 0.01 * torch.diagonal(H_II).mean() * torch.eye(size)
    assert torch.allclose(quick_II.T @ quick_II @ damped_II, torch.eye(size), atol=1e-3)


def test_a_pair_costs_nothing_until_there_is_a_second_stream():
    stat, x_TI = PairedHessian(4, torch.device("cpu")), torch.randn(9, 4)
    stat.update(x_TI, 1)
    assert stat.cross_II is None
    assert torch.equal(stat.C_II, stat.H_II)
    stat.pair(x_TI, 2 * x_TI)
    assert torch.allclose(stat.C_II, 2 * stat.H_II)


# --- prepared for a solver ------------------------------------------------------------------------


def test_a_prepared_hessian_is_the_three_steps_one_by_one():
    x_TI = tokens(40, 16)
    x_TI[:, 3] = 0
    H_II = hessian(x_TI).H_II
    by_hand_II, notes, own_notes = H_II.clone(), {}, {}
    dead_I = revive_dead(by_hand_II)
    order_I = torch.argsort(torch.diagonal(by_hand_II), descending=True, stable=True)
    by_hand_II = by_hand_II[order_I][:, order_I]
    U_II = factorize(by_hand_II, 0.01, notes, inverse=True)
    prepared = prepare_hessian(H_II, 0.01, own_notes, largest_first, fallback="rtn")
    assert torch.equal(prepared.H_II, by_hand_II)
    assert torch.equal(prepared.factor_II, U_II)
    assert torch.equal(prepared.order_I, order_I)
    assert torch.equal(prepared.dead_I, dead_I)
    assert own_notes == {"dead_columns": 1, **notes}


def test_a_prepared_hessian_keeps_its_order_and_says_when_it_has_no_factor():
    notes = {}
    prepared = prepare_hessian(-torch.eye(4), 0.01, notes, fallback="nearest level")
    assert prepared.factor_II is None
    assert prepared.order_I.tolist() == [0, 1, 2, 3]
    assert notes == {"dead_columns": 0, "fallback": "nearest level"}


def test_a_ridge_comes_after_dead_channels_are_revived():
    H_II = torch.diag(torch.tensor([2.0, 0.0]))
    prepared = prepare_hessian(H_II, 0.0, {}, ridge=0.5, fallback="rtn")
    assert torch.diagonal(prepared.H_II).tolist() == [2.5, 1.5]
    assert prepared.dead_I.tolist() == [False, True]


def test_the_diagonal_alone_is_the_hessians():
    stat = hessian(tokens(40, 5), 3)
    assert torch.equal(stat.diagonal_I, torch.diagonal(stat.H_II))
