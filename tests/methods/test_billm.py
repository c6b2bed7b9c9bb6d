"""BiLLM equals the literal solver; last blocks of any width, its storage, its refinements."""

from __future__ import annotations

import pytest
import torch
from contract import checks
from methods.test_gptq import hessian_of, well_conditioned
from methods.test_pb_llm import statistic
from numerics.host_reads import watched
from reference.billm import billm

from llq_hf.common.errors import LLQError
from llq_hf.kernels.bitpack import unpack
from llq_hf.method import Flow, stored_bits
from llq_hf.methods import billm as billm_module
from llq_hf.methods import build
from llq_hf.methods.billm import quantiles

VARIANTS = {
    "as published": {},
    "by magnitude": {"salience": "magnitude"},
    "search on weights": {"search_on": "weight"},
    "no feedback": {"feedback": False},
    "half the damping": {"damp": 0.005},
}


def salient_columns(packed: dict, in_features: int) -> torch.Tensor:
    return unpack(packed["salient"], 1, in_features).bool()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("shape", "block"), [((6, 40), 20), ((5, 71), 60)], ids=["halves", "a last block of 11"]
)
@pytest.mark.parametrize("dead", [(), (3, 20)], ids=["all channels alive", "dead channels"])
def test_equals_the_literal_solver(
    options: dict, shape: tuple[int, int], block: int, dead: tuple[int, ...]
):
    weight_OI, x_TI = checks.weight(*shape), well_conditioned(shape[1], dead)
    method = build("billm", block_size=block, scale_bits=32, **options)
    packed = method.quantize(weight_OI, statistic(x_TI), job := checks.job())
    theirs, salient = billm(weight_OI.numpy(), hessian_of(x_TI).H_II.numpy(), block, **options)
    assert job.notes["dead_columns"] == len(dead)
    assert job.notes["signs"] == round(1 + salient.mean(), 4)
    assert torch.equal(salient_columns(packed, shape[1]), torch.from_numpy(salient))
    # a sign of a dead column, all zeros, is a matter of the last bit of the mean
    alive_I = torch.tensor([j for j in range(shape[1]) if j not in dead])
    off = (checks.restore(method, packed, weight_OI) - torch.from_numpy(theirs)).abs()[
        :, alive_I
    ] > 1e-5
    assert off.double().mean() <= 0.005


@pytest.mark.parametrize("search_on", ["salience", "weight"])
def test_the_splits_are_the_same_however_many_are_compared_at_once(
    search_on: str, monkeypatch: pytest.MonkeyPatch
):
    weight_OI, x_TI = checks.weight(6, 130), well_conditioned(130)
    method = build("billm", search_on=search_on)
    found = []
    for count in (1, 7, 1000):
        monkeypatch.setattr(billm_module, "candidates_at_once", lambda target_OB, n=count: n)
        found.append(method.quantize(weight_OI, statistic(x_TI), checks.job()))
    for packed in found[1:]:
        checks.check_same_bits(found[0], packed)


def test_the_splits_of_a_block_are_found_without_a_read(monkeypatch: pytest.MonkeyPatch):
    """At every read a GPU has to wait. And it gets no launch for each candidate."""
    monkeypatch.setattr(billm_module, "candidates_at_once", lambda target_OB: 1000)
    target_OB = checks.weight(6, 128)
    salient = watched(lambda: billm_module.salient_columns(target_OB, target_OB.square()))
    none_B = torch.zeros(128, dtype=torch.bool)
    mid = watched(lambda: billm_module.mid_weights(target_OB, target_OB.square(), none_B))
    assert not salient.reads
    assert not mid.reads
    assert salient.operations + mid.operations < 250


@pytest.mark.parametrize("last", [1, 2, 49, 50, 51])
def test_a_last_block_of_any_width(last: int):
    """The authors' code asks for the 50 largest columns of each block, and crashes if there are
    less.
    """
    weight_OI = checks.weight(6, 64 + last)
    for preset in ("study", "best"):
        method = build("billm", preset, block_size=64)
        packed = checks.quantize(method, weight_OI)
        salient = int(salient_columns(packed, 64 + last)[64:].sum())
        assert salient <= min(49, last - 1)
        assert salient >= (last > 1)
        assert checks.relative_errors(weight_OI, checks.restore(method, packed, weight_OI))[0] < 1


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)], ids=str
)
def test_stored_bits_on_llama_shapes(shape: tuple[int, int]):
    for preset in ("study", "best"):
        method = build("billm", preset)
        assert stored_bits(method.layout(*shape), *shape) <= 2.88
        assert method.nominal_bits == 1.1


def test_a_row_of_a_block_has_eight_levels_at_most_and_means_are_merged():
    weight_OI = checks.weight(16, 128)
    for preset in ("study", "best"):
        method = build("billm", preset)
        packed = checks.quantize(method, weight_OI)
        assert packed["scale"].shape == (16, 1, 4)
        assert packed["mean"].shape == (16, 1, 3)
        restored_OI = checks.restore(method, packed, weight_OI)
        salient_I = salient_columns(packed, 128)
        assert 0 < salient_I.sum() < 50
        for part_OI in (restored_OI[:, salient_I], restored_OI[:, ~salient_I]):
            assert all(2 <= len(row.unique()) <= 4 for row in part_OI)


def test_fp16_storage_stays_close_to_fp32():
    weight_OI, x_TI = checks.weight(), checks.inputs()
    half, full = (
        checks.restore(m, checks.quantize(m, weight_OI, x_TI), weight_OI)
        for m in (build("billm", feedback=False, scale_bits=bits) for bits in (16, 32))
    )
    assert (half - full).norm() < 0.02 * full.norm()
    assert not torch.equal(half, full)


def test_quantiles_are_torchs():
    x_N = torch.randn(1001, generator=torch.Generator().manual_seed(1)).abs()
    shares = [0.1, 0.333, 0.5, 0.9]
    assert torch.equal(quantiles(x_N, shares), torch.quantile(x_N, torch.tensor(shares)))
    assert torch.equal(quantiles(x_N[:1], shares), x_N[:1].expand(4))


def test_without_a_factor_salience_is_the_square_and_nothing_is_repaired():
    weight_OI, stat = checks.weight(8, 40), statistic(torch.ones(4, 40))
    stat.sum_II = -torch.eye(40) * 1e6 + torch.ones(40, 40)
    packed = build("billm", "best").quantize(weight_OI, stat, job := checks.job())
    assert job.notes["fallback"] == "rtn"
    stat.sum_II = torch.eye(40)
    plain = build("billm", search_on="weight", arb_rounds=15, feedback=False)
    checks.check_same_bits(packed, plain.quantize(weight_OI, stat, checks.job()))


def test_refits_never_cost_weight_error_without_feedback():
    """Each step of ARB is the best given the others, so more rounds give less |dW|."""
    weight_OI = checks.weight()
    errors = []
    for rounds in (0, 1, 5, 15):
        method = build(
            "billm", feedback=False, search_on="weight", arb_rounds=rounds, scale_bits=32
        )
        restored_OI = checks.restore(method, checks.quantize(method, weight_OI), weight_OI)
        errors.append(checks.relative_errors(weight_OI, restored_OI)[0])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


def test_every_round_of_refinement_lowers_the_loss_and_best_halves_it():
    weight_OI, x_TI = checks.weight(24, 160), checks.inputs(160)
    options = {"search_on": "weight", "arb_rounds": 5, "block_size": 60}
    losses = [
        checks.loss_of(build("billm", refine=n, **options), weight_OI, x_TI) for n in range(4)
    ]
    assert losses[3] < losses[2] < losses[1] < 0.85 * losses[0]
    study, best = (
        checks.loss_of(build("billm", preset), weight_OI, x_TI) for preset in ("study", "best")
    )
    assert best < 0.5 * study


@pytest.mark.parametrize(("large", "found"), [(45, 45), (55, 49)])
def test_up_to_49_columns_are_salient(large: int, found: int):
    """Large columns among small ones are found, up to the limit of the authors' search."""
    weight_OI = checks.weight(32, 128) * torch.where(torch.arange(128) < large, 1.0, 0.01)
    packed = checks.quantize(build("billm", feedback=False, salience="magnitude"), weight_OI)
    assert salient_columns(packed, 128).sum() == found


def test_dense_share_is_what_the_refinement_aims_at():
    """The full-precision activations are twice the quantized ones, so outputs grow with the
    share.
    """
    weight_OI, x_TI = checks.weight(24, 64), well_conditioned(64)
    stat = statistic(x_TI)
    stat.pair(x_TI, 2 * x_TI)
    norms = []
    for share in (0.0, 0.5, 1.0):
        method = build("billm", "best", dense_share=share)
        restored_OI = checks.restore(
            method, method.quantize(weight_OI, stat, checks.job()), weight_OI
        )
        norms.append(float((x_TI @ restored_OI.T).norm() / (x_TI @ weight_OI.T).norm()))
    assert norms[0] == pytest.approx(1, abs=0.1)
    assert norms[0] + 0.1 < norms[1] < norms[2]


def test_the_full_precision_model_runs_only_if_it_is_used():
    assert build("billm").flow is Flow.QUANTIZED
    assert build("billm", refine=1, dense_share=0.0).flow is Flow.QUANTIZED
    assert build("billm", refine=1).flow is Flow.BOTH


def test_options_are_checked():
    for options, text in (
        ({"block_size": 0}, "block_size=0"),
        ({"salience": "size"}, "salience='size'"),
        ({"search_on": "all"}, "search_on='all'"),
        ({"arb_rounds": -1}, "arb_rounds=-1"),
        ({"refine": 101}, "refine=101"),
        ({"dense_share": -0.5}, "dense_share=-0.5"),
        ({"scale_bits": 8}, "scale_bits=8"),
        ({"damp": -1.0}, "damp=-1"),
        ({"bits": 1.2}, "only width 1.1"),
    ):
        with pytest.raises(LLQError, match=text):
            build("billm", **options)


def test_levels_that_fp16_cannot_hold_are_refused():
    with pytest.raises(LLQError, match="fp16"):
        checks.quantize(build("billm"), checks.weight(8, 64) * 1e7, well_conditioned(64))
