"""Coordinate descent and scale refit: equal to the slow formulas, monotone, harmless on degenerate
groups.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numerics.host_reads import HostReads, watched
from reference import refine as slow

from llq_hf.numerics import coordinate_descent
from llq_hf.numerics.coordinate_descent import Objective, Solution
from llq_hf.numerics.grids import Uniform

OUT, IN = 6, 150


HALVES = {"sym": True, "levels": "halves"}


def problem(
    bits: int, group_size: int, seed: int = 0, **levels: Any
) -> tuple[Objective, Solution, Uniform]:
    random = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(400, IN, generator=random) @ torch.randn(IN, IN, generator=random)
    weight_OI = torch.randn(OUT, IN, generator=random)
    H_II = x_TI.T @ x_TI / 400 + 0.1 * torch.eye(IN)
    dense_TI = x_TI + torch.randn(x_TI.shape, generator=random)
    objective = Objective(H_II, weight_OI @ (dense_TI.T @ x_TI) / 400 + 0.1 * weight_OI)
    uniform = Uniform(bits, group_size, scale_bits=32, **levels)
    grid_OG = uniform.grids(weight_OI)
    start = Solution(torch.empty(0), grid_OG, torch.arange(IN) // group_size)
    return objective, start._replace(codes_OI=start.columns().codes(weight_OI, bits)), uniform


@pytest.mark.parametrize("levels", [{}, HALVES], ids=["asymmetric", "halves"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [64, 40, IN])
def test_descent_equals_the_slow_one(bits: int, group_size: int, levels: dict[str, Any]):
    objective, solution, _ = problem(bits, group_size, **levels)
    fast = coordinate_descent.descended(objective, solution, bits)
    off = 0
    for row in range(OUT):
        codes = slow.descend(
            objective.H_II.double().numpy(),
            objective.B_OI[row].double().numpy(),
            solution.codes_OI[row].tolist(),
            solution.grid_OG.scale[row].tolist(),
            solution.grid_OG.zero[row].tolist(),
            solution.group_I.tolist(),
            bits,
        )
        off += sum(a != b for a, b in zip(codes, fast[row].tolist(), strict=True))
    assert off <= 2, "a tie may round differently in fp32"
    assert (fast != solution.codes_OI).sum() > 50, "the pass moved something"


@pytest.mark.parametrize("levels", [{}, HALVES], ids=["asymmetric", "halves"])
@pytest.mark.parametrize("group_size", [64, 40, IN])
def test_refit_equals_the_slow_one_where_it_stays_in_reach(group_size: int, levels: dict[str, Any]):
    objective, solution, uniform = problem(4, group_size, **levels)
    fast = coordinate_descent.refitted(objective, solution, uniform).scale
    compared = 0
    for row in range(OUT):
        scales = slow.refit(
            objective.H_II.double().numpy(),
            objective.B_OI[row].double().numpy(),
            solution.codes_OI[row].tolist(),
            solution.grid_OG.scale[row].tolist(),
            solution.grid_OG.zero[row].tolist(),
            solution.group_I.tolist(),
        )
        old = solution.grid_OG.scale[row].numpy()
        if ((scales > old / 4) & (scales < old * 4)).all():
            assert np.allclose(fast[row], scales, rtol=2e-3)
            compared += 1
    assert compared >= OUT - 1


@pytest.mark.parametrize("levels", [{}, HALVES], ids=["asymmetric", "halves"])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_no_row_ever_gets_worse(bits: int, scale_bits: int, levels: dict[str, Any]):
    for seed in range(5):
        objective, solution, _ = problem(bits, 40, seed, **levels)
        uniform = Uniform(bits, 40, scale_bits=scale_bits, **levels)
        solution = solution._replace(
            grid_OG=solution.grid_OG._replace(scale=uniform.stored(solution.grid_OG.scale))
        )
        losses = [objective.loss(solution.values())]
        for _ in range(3):
            solution = solution._replace(
                codes_OI=coordinate_descent.descended(objective, solution, bits)
            )
            losses.append(objective.loss(solution.values()))
            solution = solution._replace(
                grid_OG=coordinate_descent.refitted(objective, solution, uniform)
            )
            losses.append(objective.loss(solution.values()))
        for before, after in pairwise(losses):
            assert (after <= before + 1e-4 * before.abs()).all()
        assert (losses[-1] < losses[0]).all()
        assert torch.equal(solution.grid_OG.scale, uniform.stored(solution.grid_OG.scale)), (
            "as the file will hold it"
        )


def test_a_group_of_zeros_keeps_its_scale():
    objective, solution, uniform = problem(3, 50)
    codes_OI = solution.codes_OI.clone()
    codes_OI[2, 50:100] = solution.grid_OG.zero[2, 1]
    solution = solution._replace(codes_OI=codes_OI)
    fitted = coordinate_descent.refitted(objective, solution, uniform)
    assert torch.isfinite(fitted.scale).all()
    assert fitted.scale[2, 1] == pytest.approx(float(solution.grid_OG.scale[2, 1]), rel=1e-3)


def test_many_rows_are_solved_in_parts(monkeypatch):
    objective, solution, uniform = problem(3, 50)
    whole = coordinate_descent.refitted(objective, solution, uniform)
    monkeypatch.setattr(coordinate_descent, "ROWS", 4)
    assert torch.allclose(
        coordinate_descent.refitted(objective, solution, uniform).scale, whole.scale, rtol=1e-5
    )


@pytest.mark.parametrize("order", ["in order", "mixed"])
def test_sums_over_groups_are_those_of_a_loop_to_the_last_bit(order: str):
    """The loop is what index_add_ does on CPUs; on GPUs it would add in another order each run."""
    random = torch.Generator().manual_seed(3)
    x_RI = torch.randn(4, 50, generator=random)
    group_I = torch.randint(6, (50,), generator=random)
    group_I[group_I == 4] = 5  # a group without columns
    if order == "in order":
        group_I = group_I.sort().values
    expected_RG = torch.zeros(4, 6)
    for column, group in enumerate(group_I.tolist()):
        expected_RG[:, group] += x_RI[:, column]
    groups = coordinate_descent.Groups.of(group_I, 6)
    assert torch.equal(groups.sums(x_RI), expected_RG)
    assert [m.tolist() for m in groups.members] == [
        (group_I == k).nonzero().flatten().tolist() for k in range(6)
    ]


def test_a_refit_reads_as_little_for_many_groups_as_for_two():
    def found(group_size: int) -> HostReads:
        objective, solution, uniform = problem(3, group_size)
        return watched(lambda: coordinate_descent.refitted(objective, solution, uniform))

    assert found(5).reads == found(75).reads
    assert not found(5).atomic
    assert watched(
        lambda: torch.zeros(2).index_add_(0, torch.zeros(2).long(), torch.ones(2))
    ).atomic
