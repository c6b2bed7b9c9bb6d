"""PB-LLM equals the literal solver; its list of positions, its sizes, both ends of its widths, its
refinement.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import checks
from methods.test_gptq import hessian_of, well_conditioned
from reference.pb_llm import pb_llm

from llq_hf.common.errors import LLQError
from llq_hf.method import Flow, Job, stored_bits
from llq_hf.methods import build
from llq_hf.methods.pb_llm import Positions
from llq_hf.numerics.stats import PairedHessian, Stat

VARIANTS = {
    "one group": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "groups of 48 that do not divide": {"group_size": 48},
    "by magnitude": {"group_size": 32, "salience": "magnitude"},
    "mean over the binarized": {"group_size": 32, "mean_over": "binarized"},
    "no feedback": {"group_size": 32, "feedback": False},
    "half the damping": {"group_size": 32, "damp": 0.005},
}


def statistic(x_TI: torch.Tensor) -> Stat:
    stat = PairedHessian(x_TI.shape[1], x_TI.device)
    stat.update(x_TI, 4)
    return stat


def salient(packed: dict, method, shape: tuple[int, int]) -> torch.Tensor:
    """Mask of the salient weights."""
    at_S = method._positions(*shape).unpack(packed, torch.device("cpu"))
    mask_N = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask_N[at_S] = True
    return mask_N.view(shape)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits", [1.7, 3.0])
@pytest.mark.parametrize("dead", [(), (3, 20)], ids=["all channels alive", "dead channels"])
def test_equals_the_literal_solver(options: dict, bits: float, dead: tuple[int, ...]):
    weight_OI, x_TI = checks.weight(12, 160), well_conditioned(160, dead)
    method = build("pb_llm", bits=bits, scale_bits=32, **options)
    packed = method.quantize(weight_OI, statistic(x_TI), job := checks.job())
    assert job.notes["dead_columns"] == len(dead)
    theirs, mask = pb_llm(
        weight_OI.numpy(), hessian_of(x_TI).H_II.numpy(), (8 - bits) / 7, **options
    )
    assert torch.equal(salient(packed, method, (12, 160)), torch.from_numpy(mask))
    off = (checks.restore(method, packed, weight_OI) - torch.from_numpy(theirs)).abs() > 1e-5
    assert off.double().mean() <= 0.002, "a tie or two may round differently in fp32"


@pytest.mark.parametrize("count", [0, 1, 7, 60, 150, 250, 400, 750, 930, 999, 1000])
def test_positions_come_back_at_every_density(count: int):
    positions = Positions(count, 1000)
    mask_N = torch.zeros(1000, dtype=torch.bool)
    mask_N[torch.randperm(1000, generator=torch.Generator().manual_seed(count))[:count]] = True
    packed = positions.pack(mask_N)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == dict(
        positions.layout()
    )
    assert torch.equal(positions.unpack(packed, mask_N.device), mask_N.nonzero().flatten())


@pytest.mark.parametrize(
    "where", [lambda t: t[:100], lambda t: t[-100:]], ids=["all first", "all last"]
)
def test_positions_at_the_ends(where: Callable):
    mask_N = torch.zeros(4096, dtype=torch.bool)
    where(mask_N)[:] = True
    positions = Positions(100, 4096)
    assert torch.equal(
        positions.unpack(positions.pack(mask_N), mask_N.device), mask_N.nonzero().flatten()
    )


@pytest.mark.parametrize(
    ("count", "most"),
    [(100, 0.55), (143, 0.70), (250, 1.0), (600, 1.0), (750, 1.0), (900, 0.55)],
    ids=str,
)
def test_positions_cost_little(count: int, most: float):
    total = 1024 * 1000
    layout = Positions(count * 1024, total).layout()
    assert sum(spec.nbytes for spec in layout.values()) * 8 / total <= most + 1e-3


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (5120, 13824)], ids=str
)
def test_stored_bits_on_llama_shapes(shape: tuple[int, int]):
    for bits, most in ((1.7, 2.49), (2.0, 2.95)):
        method = build("pb_llm", bits=bits)
        assert stored_bits(method.layout(*shape), *shape) <= most
        assert method.nominal_bits == bits
    assert stored_bits(build("pb_llm", bits=1.0).layout(*shape), *shape) <= 1.26
    assert stored_bits(build("pb_llm", bits=8.0).layout(*shape), *shape) <= 8.26


def test_the_ends_of_the_range():
    """At 1 bit no weight is salient, at 8 bits all are.

    The authors' rule would index past the end at 1 bit, and binarize one weight at 8.
    """
    weight_OI, x_TI = checks.weight(8, 64), well_conditioned(64)
    names = {}
    for bits in (1.0, 8.0):
        method = build("pb_llm", bits=bits, group_size=32)
        packed = checks.quantize(method, weight_OI, x_TI)
        names[bits] = set(packed)
        share = salient(packed, method, (8, 64)).float().mean()
        assert share == (bits == 8)
    assert "code" not in names[1.0]
    assert names[8.0] - names[1.0] == {"code"}  # no positions at either end
    one_bit = build("pb_llm", bits=1.0, group_size=32)
    levels = checks.restore(one_bit, checks.quantize(one_bit, weight_OI, x_TI), weight_OI)
    assert all(len(row.unique()) == 2 for half in levels.split(32, dim=1) for row in half)


def test_any_figure_between_and_the_exact_count():
    """floor(N * r) + 1 weights are binarized, also if N * r is whole but its float is not."""
    for bits, rows, low in ((1.7, 10, 577), (2.0, 7, 385), (4.5, 2, 65), (1.07, 100, 6337)):
        method = build("pb_llm", bits=bits)
        assert method._positions(rows, 64).count == rows * 64 - low, bits


def test_ties_leave_the_count_alone():
    """All weights are equal: the authors' code would binarize them all."""
    weight_OI = torch.ones(8, 64)
    method = build("pb_llm", bits=2.0, group_size=32, salience="magnitude")
    packed = checks.quantize(method, weight_OI, well_conditioned(64))
    mask_OI = salient(packed, method, (8, 64))
    for half_OI in mask_OI.split(32, dim=1):
        assert not half_OI.flatten()[: 8 * 32 * 6 // 7 + 1].any()
        assert half_OI.flatten()[8 * 32 * 6 // 7 + 1 :].all()


def test_alpha_shrinks_by_the_salient_share_unless_averaged_over_the_binarized():
    weight_OI, x_TI = checks.weight(48, 128), well_conditioned(128)
    alphas = {}
    for over in ("group", "binarized"):
        method = build("pb_llm", bits=2.0, mean_over=over)
        alphas[over] = checks.quantize(method, weight_OI, x_TI)["scale"].float().mean()
    assert alphas["group"] / alphas["binarized"] == pytest.approx(6 / 7, rel=0.02)


def test_without_a_factor_salience_is_magnitude_and_nothing_is_repaired():
    weight_OI, stat = checks.weight(8, 40), statistic(torch.ones(4, 40))
    stat.sum_II = -torch.eye(40) * 1e6 + torch.ones(40, 40)
    packed = build("pb_llm", refine=2).quantize(weight_OI, stat, job := checks.job())
    assert job.notes["fallback"] == "rtn"
    plain = build("pb_llm", salience="magnitude", feedback=False)
    checks.check_same_bits(packed, checks.quantize(plain, weight_OI, well_conditioned(40)))


@pytest.mark.parametrize("bits", [1.0, 1.7, 3.0])
def test_every_round_of_refinement_lowers_the_loss(bits: float):
    weight_OI, x_TI = checks.weight(24, 160), checks.inputs(160)
    losses = [
        checks.loss_of(build("pb_llm", bits=bits, group_size=48, refine=n), weight_OI, x_TI)
        for n in range(4)
    ]
    assert losses[1] < 0.85 * losses[0]
    assert losses[3] < losses[2] < losses[1]


def test_dense_share_is_what_the_refinement_aims_at():
    """The full-precision activations are twice the quantized ones, so outputs grow with the
    share.
    """
    weight_OI, x_TI = checks.weight(24, 64), well_conditioned(64)
    stat = statistic(x_TI)
    stat.pair(x_TI, 2 * x_TI)
    norms = []
    for share in (0.0, 0.5, 1.0):
        method = build("pb_llm", bits=5.0, refine=3, dense_share=share)
        assert method.flow is (Flow.BOTH if share else Flow.QUANTIZED)
        restored_OI = checks.restore(
            method, method.quantize(weight_OI, stat, checks.job()), weight_OI
        )
        norms.append(float((x_TI @ restored_OI.T).norm() / (x_TI @ weight_OI.T).norm()))
    assert norms[0] == pytest.approx(1, abs=0.05)
    assert norms[0] + 0.1 < norms[1] < norms[2]


def test_options_are_checked():
    for options, text in (
        ({"group_size": 0}, "group_size=0"),
        ({"salience": "size"}, "salience='size'"),
        ({"mean_over": "all"}, "mean_over='all'"),
        ({"damp": 1.5}, "damp=1.5"),
        ({"refine": -1}, "refine=-1"),
        ({"dense_share": 2.0}, "dense_share=2"),
        ({"scale_bits": 8}, "scale_bits=8"),
        ({"bits": 0.9}, "bits=0.9"),
    ):
        with pytest.raises(LLQError, match=text):
            build("pb_llm", **options)


def test_levels_that_fp16_cannot_hold_are_refused():
    with pytest.raises(LLQError, match="fp16"):
        checks.quantize(build("pb_llm"), checks.weight(8, 64) * 1e8, well_conditioned(64))


@pytest.mark.parametrize("word", [-1, 0], ids=["more", "fewer"])
def test_a_list_of_the_wrong_length_is_an_error(word: int):
    """It is checked before any product: kernels would read codes that are not there."""
    method, x_TI = build("pb_llm", bits=1.7), torch.randn(2, 256).bfloat16()
    packed = method.quantize(torch.randn(16, 256), statistic(torch.randn(300, 256)), Job("x"))
    method.linear(x_TI, packed, None, 16)
    packed["position"][2] = word
    for call in (
        lambda: method.linear(x_TI, packed, None, 16),
        lambda: method.dequantize(packed, 16, 256),
    ):
        with pytest.raises(LLQError, match="list of salient weights is damaged"):
            call()
