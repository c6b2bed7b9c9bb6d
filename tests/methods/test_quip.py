"""QuIP equals the literal algorithm with the same rotations; its seeds, its bits, its search."""

from __future__ import annotations

import pytest
import torch
from contract import checks
from numerics.host_reads import watched
from reference.quip import greedy as greedy_literal
from reference.quip import ldlq as ldlq_literal
from reference.quip import quip, quip_rows

from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels.bitpack import unpack
from llq_hf.method import Flow, stored_bits
from llq_hf.methods import build
from llq_hf.methods.quip import greedy_pass, ldlq
from llq_hf.numerics.aim import aimed
from llq_hf.numerics.rotations import rotation
from llq_hf.numerics.stats import Hessian, PairedHessian

VARIANTS = {
    "study": {},
    "blocked": {"blocked": True},
    "no rescaling": {"rescale": False},
    "two greedy passes": {"greedy_passes": 2},
    "a wider range": {"range_sigma": 2.8},
    "more damping": {"damp": 0.05},
}


def inputs(in_features: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(in_features)
    mix_II = (
        torch.eye(in_features)
        + 0.3 * torch.randn(in_features, in_features, generator=random) / in_features**0.5
    )
    return torch.randn(4 * in_features, in_features, generator=random) @ mix_II


def statistic(x_TI: torch.Tensor) -> Hessian:
    stat = Hessian(x_TI.shape[1], x_TI.device)
    stat.update(x_TI, 4)
    return stat


def dense(seed: int, n: int, blocked: bool) -> torch.Tensor:
    """The rotation as a matrix Q, with Q x = apply(x)."""
    return rotation(seed, n, blocked, torch.device("cpu")).apply(torch.eye(n)).T


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(16, 32), (12, 150)], ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_literal_algorithm(options: dict, shape: tuple[int, int], bits: int):
    weight_OI, stat = checks.weight(*shape), statistic(inputs(shape[1]))
    method = build("quip", bits=bits, **options)
    packed = method.quantize(weight_OI, stat, checks.job())
    seed_in, seed_out = packed["seeds"].tolist()
    V, U = dense(seed_in, shape[1], method.blocked), dense(seed_out, shape[0], method.blocked)
    restored, codes = quip(
        weight_OI.numpy(),
        stat.H_II.numpy(),
        bits,
        U.double().numpy(),
        V.double().numpy(),
        rescale=method.rescale,
        passes=method.greedy_passes,
        sigmas=method.range_sigma,
        damp=method.damp,
    )
    mine = unpack(packed["weight"], bits, shape[1]).double().numpy()
    assert (mine != codes).mean() <= 0.002, "a tie or two may round differently in fp32"
    restored_OI = checks.restore(method, packed, weight_OI).double()
    assert (restored_OI - torch.from_numpy(restored)).norm() <= 0.02 * torch.from_numpy(
        restored
    ).norm()


@pytest.mark.parametrize("shape", [(16, 32), (12, 150)], ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_grid_per_row_equals_the_literal_algorithm(shape: tuple[int, int], bits: int):
    weight_OI, stat = checks.weight(*shape), statistic(inputs(shape[1]))
    method = build("quip", bits=bits, incoherence=False, rescale=False)
    packed = method.quantize(weight_OI, stat, checks.job())
    restored, codes = quip_rows(weight_OI.numpy(), stat.H_II.numpy(), bits)
    mine = unpack(packed["weight"], bits, shape[1]).double().numpy()
    assert (mine != codes).mean() <= 0.002, "a tie or two may round differently in fp32"
    off = (
        checks.restore(method, packed, weight_OI).double() - torch.from_numpy(restored)
    ).abs() > 1e-5
    assert off.double().mean() <= 0.002


@pytest.mark.parametrize("columns", [20, 128, 150])
def test_ldlq_and_greedy_equal_their_loops(columns: int):
    stat, random = statistic(inputs(columns)), torch.Generator().manual_seed(1)
    H_II = stat.H_II.double()
    t_OI = torch.rand(6, columns, generator=random, dtype=torch.float64) * 7
    factor = torch.linalg.cholesky(H_II)
    codes = ldlq(t_OI, (factor / factor.diagonal()).tril(-1), 7)
    assert torch.equal(codes, torch.from_numpy(ldlq_literal(t_OI.numpy(), H_II.numpy(), 3)))
    better = codes.clone()
    greedy_pass(better, t_OI, H_II, 7)
    assert torch.equal(
        better, torch.from_numpy(greedy_literal(codes.numpy(), t_OI.numpy(), H_II.numpy(), 3, 1))
    )
    error, error_better = codes - t_OI, better - t_OI
    assert (error_better @ H_II * error_better).sum() <= (error @ H_II * error).sum()


def test_a_greedy_pass_says_whether_a_code_changed_and_reads_it_once():
    stat, random = statistic(inputs(40)), torch.Generator().manual_seed(1)
    t_OI = torch.rand(6, 40, generator=random) * 7
    codes_OI, said = t_OI.round(), []
    for _ in range(12):
        before_OI = codes_OI.clone()
        found = watched(lambda: said.append(greedy_pass(codes_OI, t_OI, stat.H_II, 7)))
        assert sum(found.reads.values()) == 1
        assert said[-1] == (not torch.equal(before_OI, codes_OI))
    assert said[0]
    assert not said[-1]


def test_halves_round_up():
    """floor(t + 0.5), unlike torch.round."""
    assert ldlq(torch.tensor([[0.5, 1.5, 2.5]]), torch.zeros(3, 3), 3).tolist() == [[1.0, 2.0, 3.0]]


def test_seeds_differ_per_layer_linear_and_side_and_are_stored(tiny_llama, calibration_ids):
    from transformers import AutoModelForCausalLM

    seeds = {}
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize_model(model, build("quip", bits=2, seed=seed), calibration_ids)
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                seeds[seed, name, "in"], seeds[seed, name, "out"] = module.seeds.tolist()
    assert len(seeds) == 2 * 14 * 2
    assert len(set(seeds.values())) == len(seeds)


def test_a_stored_seed_is_what_counts():
    """A checkpoint is decoded with the seeds in the file, not with the one of the config."""
    weight_OI = checks.weight()
    packed = checks.quantize(build("quip", bits=4, seed=0), weight_OI)
    assert torch.equal(
        checks.restore(build("quip", bits=4, seed=0), packed, weight_OI),
        checks.restore(build("quip", bits=4, seed=9), packed, weight_OI),
    )


def test_two_bits_take_two_bits():
    for shape in ((4096, 4096), (14336, 4096), (4096, 14336)):
        assert stored_bits(build("quip", bits=2).layout(*shape), *shape) <= 2.01


@pytest.mark.parametrize("bits", [2, 8])
def test_searching_the_range_beats_2_4_sigma(bits: int):
    """At sizes that rotations make Gaussian: 64 and 256 have square factors."""
    weight_OI, x_TI = checks.weight(64, 256), inputs(256)
    searched = checks.loss_of(build("quip", bits=bits, search_range=True), weight_OI, x_TI)
    assert searched < checks.loss_of(build("quip", bits=bits), weight_OI, x_TI)


def test_the_notes_say_which_range_won():
    job = checks.job()
    build("quip", bits=2, search_range=True).quantize(
        checks.weight(), statistic(checks.inputs()), job
    )
    assert 1.4 <= job.notes["range_sigma"] <= 2.4


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_large_inputs_do_not_overflow_fp16(bits: int):
    """With inputs as large as LLaMA-3's massive activations, fp16 outputs stay finite."""
    method, weight_OI = build("quip", bits=bits), checks.weight()
    packed = checks.quantize(method, weight_OI)
    x = (checks.inputs()[:8] * 500).half()
    assert torch.isfinite(x).all()
    y = method.linear(x, packed, None, len(weight_OI))
    expected = x.double() @ checks.restore(method, packed, weight_OI).double().T
    assert torch.isfinite(y).all()
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("incoherence", [True, False])
def test_to_aim_is_to_solve_for_another_weight(incoherence: bool):
    weight_OI, x_TI = checks.weight(12, 96), inputs(96)
    stat = PairedHessian(96, x_TI.device)
    stat.update(x_TI, 4)
    stat.pair(
        x_TI, x_TI + 0.3 * torch.randn(x_TI.shape, generator=torch.Generator().manual_seed(1))
    )
    other_OI = aimed(weight_OI, stat, 0.5)
    assert (other_OI - weight_OI).norm() > 0.01 * weight_OI.norm()
    options = {"bits": 2, "incoherence": incoherence}
    aiming, plain = build("quip", aim=0.5, **options), build("quip", **options)
    checks.check_same_bits(
        aiming.quantize(weight_OI, stat, checks.job()), plain.quantize(other_OI, stat, checks.job())
    )
    assert (aiming.flow, plain.flow) == (Flow.BOTH, Flow.QUANTIZED)
    assert build("quip", preset="best").sequential
    assert not plain.sequential
