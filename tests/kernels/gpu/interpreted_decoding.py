"""The kernels that decode, transform, round tokens and solve, in Triton's interpreter, against
torch. The interpreter cuts bf16 numbers off instead of rounding them, so they are left out.
test_interpreter.py runs this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.random_weights import error, generator, random_packed
from storages import METHODS, use_gpu_rows
from torch.nn import functional as F

from llq_hf import kernels
from llq_hf.kernels import TokenGrid
from llq_hf.kernels.gpu import turns
from llq_hf.kernels.gpu.feedback import BlockRounder, descend, round_backwards
from llq_hf.kernels.views import Division
from llq_hf.methods import build, quip, slim_llm
from llq_hf.numerics import coordinate_descent, error_feedback
from llq_hf.numerics.activations import TokenQuant
from llq_hf.numerics.cholesky import factorize
from llq_hf.numerics.grids import Uniform
from llq_hf.numerics.rotations import _kronecker, hadamard, rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "options", "few"), METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_are_decoded_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    few: list[str],
    dtype: torch.dtype,
):
    """The product with the unit matrix is the weight itself."""
    method = build(name, **options)
    turned = name == "quip" and options.get("incoherence", True)
    if not few or "tokens" in few or turned or method.layout(8, 512).keys() & {"in_scale", "order"}:
        pytest.skip("the product is not that of the decoded weight alone, or no kernel serves")
    served = use_gpu_rows(monkeypatch)
    size = {48: 240, 256: 1024}.get(options.get("group_size", 0), 512)
    packed = random_packed(method, 20, size)
    with torch.no_grad():
        found_OI = method.linear(torch.eye(size, dtype=dtype), packed, None, 20).T
    assert served == ["multiply"]
    assert torch.equal(found_OI, method.dequantize(packed, 20, size).to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [176, 100, 32])
def test_columns_after_the_last_whole_block(
    monkeypatch: pytest.MonkeyPatch, bits: int, columns: int
):
    use_gpu_rows(monkeypatch)
    for group_size in (-1, 48):
        method = build("rtn", bits=bits, group_size=group_size)
        packed = random_packed(method, 12, columns)
        with torch.no_grad():
            found_OI = method.linear(torch.eye(columns), packed, None, 12).T
        assert torch.equal(found_OI, method.dequantize(packed, 12, columns))


def test_gradients_go_through_a_decoded_weight_that_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    served = use_gpu_rows(monkeypatch)
    method = build("rtn", bits=4)
    packed = random_packed(method, 16, 256)
    x = torch.randn(3, 256, generator=generator(), requires_grad=True)
    bias = torch.zeros(16, requires_grad=True)
    y = method.linear(x, kernels.CachedTensors(packed), bias, 16)
    assert served == ["multiply"]
    assert all(saved.numel() < 16 * 256 for saved in y.grad_fn.saved_tensors)
    y.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, method.dequantize(packed, 16, 256)).square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-4)
    assert torch.allclose(bias.grad, 2 * y.detach().sum(0))


@pytest.mark.parametrize("n", [256, 576, 172, 96])
def test_transforms(n: int):
    Q, H = rotation(3, n, False, CPU), hadamard(n, CPU)
    divisor, factor = torch.rand(n, generator=generator()).half() + 0.5, torch.tensor([0.3])
    x = torch.randn(2, n, generator=generator(1))
    forth = turns.transform(x, Q.forth, divisor, factor)
    assert error(forth, 0.3 * Q.apply(x.double() / divisor.double()).double()) < 1e-6
    assert error(turns.transform(x, Q.back, None, None), Q.invert(x).double()) < 1e-6
    kronecker = _kronecker(len(H.head), H.power, CPU)
    assert error(turns.transform(x, kronecker, None, None), H.apply(x.double())) < 1e-6


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tokens_get_the_codes_that_torch_gives(bits: int):
    x = torch.randn(5, 180, generator=generator()).half()
    x[3] = 0
    divisor = torch.rand(180, generator=generator(1)).half() + 0.5
    quant, grid = TokenQuant(bits), TokenGrid(bits, 180, 1e-5)
    codes, step = turns.tokens(x, grid, divisor, values=False)
    expected, expected_step = quant.codes(x, divisor)
    assert torch.equal(codes, expected)
    assert torch.equal(step, expected_step)
    assert torch.equal(turns.tokens(x, grid, None, values=True), quant(x))
    assert torch.equal(turns.divided(x, Division(divisor)), (x / divisor.float()).half())


@pytest.mark.parametrize(
    ("options", "static"),
    [
        ({"bits": 4, "group_size": 128}, False),
        ({"bits": 3, "group_size": 64}, True),
        ({"bits": 2, "group_size": -1}, False),
        ({"bits": 4, "group_size": 96}, False),
        ({"bits": 3, "group_size": 128, "sym": True, "levels": "halves"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("drifting", [False, True])
def test_error_feedback_finds_the_codes_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    static: bool,
    drifting: bool,
):
    columns = 176
    X_TI = torch.randn(400, columns, generator=generator())
    X_TI[:, 1:] += 0.5 * X_TI[:, :-1]
    H_II = X_TI.T @ X_TI / len(X_TI)
    U_II = factorize(H_II.clone(), 0.01, {}, inverse=True, quick=True)
    uniform = Uniform(**options)
    group_I = torch.arange(columns) // uniform.size(columns)
    W_OI = torch.randn(10, columns, generator=generator(1))
    grid = uniform.grids(W_OI) if static else None
    drift_II = None
    if drifting:
        drift_II = torch.triu(torch.randn(columns, columns, generator=generator(2)) * 0.01, 1)

    def solve() -> error_feedback.Solution:
        return error_feedback.solve(
            W_OI.clone(), U_II, uniform, group_I, grid, H_II.diagonal(), 128, drift_II
        )

    by_torch = solve()
    monkeypatch.setattr(error_feedback, "block_rounder", BlockRounder)
    by_kernel = solve()
    # Where two codes are equally near, later codes and grids of the row may differ as well.
    same_O = (by_torch.codes_OI == by_kernel.codes_OI).all(1)
    assert same_O.sum() >= 9
    scales = (solution.grid_OG.scale[same_O] for solution in (by_torch, by_kernel))
    assert torch.allclose(*scales, rtol=1e-5)


@pytest.mark.parametrize("columns", [40, 176])
def test_rounding_backwards_finds_the_codes_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch, columns: int
):
    X_TI = torch.randn(400, columns, generator=generator())
    X_TI[:, 1:] += 0.5 * X_TI[:, :-1]
    H_II = X_TI.T @ X_TI / len(X_TI)
    factor_II = torch.linalg.cholesky(H_II.flip(0, 1)).flip(0, 1).T
    L_II = (factor_II / factor_II.diagonal()[:, None]).tril(-1)
    t_OI = torch.rand(10, columns, generator=generator(1)) * 7

    def rounded() -> tuple[torch.Tensor, torch.Tensor, bool]:
        first_OI = quip.ldlq(t_OI, L_II, 7)
        better_OI = first_OI.clone()
        return first_OI, better_OI, quip.greedy_pass(better_OI, t_OI, H_II, 7)

    by_torch = rounded()
    monkeypatch.setattr(quip, "backward_rounder", lambda codes_OI: round_backwards)
    by_kernel = rounded()
    for one, other in zip(by_torch[:2], by_kernel[:2], strict=True):
        assert (one != other).float().mean() < 0.02
    assert by_torch[2] == by_kernel[2]
    assert not torch.equal(by_kernel[0], by_kernel[1])


@pytest.mark.parametrize("levels", ["full", "halves"])
def test_coordinate_descent_finds_the_codes_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch, levels: str
):
    columns = 176
    X_TI = torch.randn(400, columns, generator=generator())
    X_TI[:, 1:] += 0.5 * X_TI[:, :-1]
    H_II = X_TI.T @ X_TI / len(X_TI)
    W_OI = torch.randn(10, columns, generator=generator(1))
    uniform = Uniform(3, 64, sym=levels == "halves", levels=levels)
    grid = uniform.grids(W_OI)
    group_I = torch.arange(columns) // 64
    codes_OI = uniform.spread(grid, columns).codes(W_OI, 3).to(torch.uint8)
    solution = error_feedback.Solution(codes_OI, grid, group_I)
    objective = coordinate_descent.Objective.of(H_II.clone(), 0.01, H_II, W_OI, W_OI)
    by_torch = coordinate_descent.descended(objective, solution, 3)
    monkeypatch.setattr(coordinate_descent, "descender", lambda values_IO: descend)
    by_kernel = coordinate_descent.descended(objective, solution, 3)
    assert (by_torch != by_kernel).float().mean() < 0.02
    assert (by_kernel != codes_OI).float().mean() > 0.05


def test_feedback_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(error_feedback, "block_rounder", BlockRounder)
    W_OI = torch.randn(4, 64, generator=generator())
    U_II = torch.triu(torch.ones(64, 64), 1) + 1e-38 * torch.eye(64)
    with pytest.raises(error_feedback.LLQError, match="overflows"):
        error_feedback.solve(W_OI, U_II, Uniform(4, 64), torch.zeros(64, dtype=torch.long))


@pytest.mark.parametrize("preset", ["study", "best"])
def test_groups_of_other_widths_get_the_codes_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch, preset: str
):
    columns = 128
    X_TI = torch.randn(400, columns, generator=generator())
    X_TI[:, 1:] += 0.5 * X_TI[:, :-1]
    H_II = X_TI.T @ X_TI / len(X_TI)
    U_II = factorize(H_II.clone(), 0.01, {}, inverse=True, quick=True)
    order_I, none_I = torch.arange(columns), torch.zeros(columns, dtype=torch.bool)
    factor = slim_llm.Factor(H_II, U_II, order_I, none_I, [0, 1, 2, 3], H_II.diagonal().sqrt())
    method = build("slim_llm", preset, bits=2, group_size=32)
    W_OI = torch.randn(6, columns, generator=generator(1))

    def solved() -> tuple[torch.Tensor, slim_llm.Levels]:
        return method._solve(W_OI.clone(), factor, None, [2, 1, 3, 2])

    by_torch, levels = solved()
    monkeypatch.setattr(slim_llm, "block_rounder", BlockRounder)
    by_kernel, found = solved()
    same_O = (by_torch == by_kernel).all(1)
    assert same_O.sum() >= 5
    for one, other in zip(levels, found, strict=True):
        assert torch.allclose(one[same_O], other[same_O], rtol=1e-5)
