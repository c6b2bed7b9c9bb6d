"""SliM-LLM equals the literal solver; its allocation, grids and storage; the differences of the
authors' code.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import checks
from reference.slim_llm import slim_llm

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener
from llq_hf.kernels import bitpack
from llq_hf.method import Packed, State, stored_bits
from llq_hf.methods import build
from llq_hf.methods.slim_llm.allocation import Search
from llq_hf.methods.slim_llm.levels import most_salient
from llq_hf.methods.slim_llm.plus import Clipping

LLAMA_SHAPES = [
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (11008, 4096),
    (4096, 11008),
    (8192, 28672),
]


def inputs(in_features: int, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Activations [T, I] with correlations but no tiny eigenvalue.

    So fp32 and fp64 round alike.
    """
    random = torch.Generator().manual_seed(in_features)
    mix_II = (
        torch.eye(in_features)
        + 0.3 * torch.randn(in_features, in_features, generator=random) / in_features**0.5
    )
    x_TI = torch.randn(4 * in_features, in_features, generator=random) @ mix_II
    x_TI *= 0.3 + torch.rand(in_features, generator=random)
    x_TI[:, list(dead)] = 0
    return x_TI


def solve(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, **options: object
) -> tuple[Packed, torch.Tensor, dict]:
    """(packed, restored weight, notes)."""
    method = build("slim_llm", **options)
    given = checks.step(method, weight_OI, x_TI)
    with torch.no_grad():
        packed = method.quantize_block(given)["test"]
    return packed, method.dequantize(packed, *weight_OI.shape), given.jobs["test"].notes


VARIANTS = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "salient errors count fourfold": {"bits": 3, "lambda_salience": 4.0},
    "2 bits as published": {"bits": 2, "as_published": True},
    "3 bits as published": {"bits": 3, "as_published": True},
    "half the damping": {"bits": 2, "damp": 0.005},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(6, 64), (5, 70)], ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("dead", [(), (3, 20)], ids=["all channels alive", "dead channels"])
def test_equals_the_literal_solver(options: dict, shape: tuple[int, int], dead: tuple[int, ...]):
    weight_OI, x_TI = checks.weight(*shape), inputs(shape[1], dead)
    packed, restored_OI, notes = solve(weight_OI, x_TI, group_size=8, scale_bits=32, **options)
    restored, widths, divergences = slim_llm(
        weight_OI.numpy(), x_TI.numpy(), checks.SEQUENCES, group_size=8, **options
    )
    assert packed["widths"].tolist() == widths
    assert notes["pairs"] == 1 + int(np.argmin(divergences)) == widths.count(options["bits"] + 1)
    assert notes["dead_columns"] == len(dead)
    off = (restored_OI.double() - torch.from_numpy(restored)).abs() > 1e-5
    assert off.double().mean() <= 0.01, "a tie or two may round differently in fp32"


# --- allocation -----------------------------------------------------------------------------------


def test_the_mean_width_is_bits_and_salient_groups_get_more():
    """The last groups have the largest inputs: they gain the bits that the first ones lose."""
    x_TI = inputs(64) * torch.linspace(0.05, 2, 64)
    for bits in (2, 3, 5):
        packed, _, notes = solve(checks.weight(8, 64), x_TI, bits=bits, group_size=8, pairs=3)
        assert packed["widths"].tolist() == [bits - 1] * 3 + [bits] * 2 + [bits + 1] * 3
        assert notes["pairs"] == 3


def test_a_short_last_group_keeps_its_width_however_salient():
    x_TI = inputs(70).clone()
    x_TI[:, 64:] *= 100
    packed, _, _ = solve(checks.weight(8, 70), x_TI, bits=2, group_size=8, pairs=4)
    assert packed["widths"][-1] == 2
    assert sorted(packed["widths"].tolist()) == [1] * 4 + [2] + [3] * 4


def test_few_groups_all_have_the_same_width_and_the_notes_say_so():
    packed, _, notes = solve(checks.weight(8, 48), inputs(48), group_size=16)
    assert packed["widths"].tolist() == [2, 2, 2]
    assert notes["allocation"] == "uniform: 3 groups are too few to move bits"
    assert "allocation" not in solve(checks.weight(8, 64), inputs(64), group_size=16)[2]


def test_no_pairs_may_win_only_if_asked_for():
    """The groups are alike, so moving bits hurts.

    (The authors' -nonsalient_block 0 widens every group instead.)
    """
    weight_OI = checks.weight(16, 64)
    x_TI = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    assert solve(weight_OI, x_TI, group_size=16)[2]["pairs"] == 1
    assert solve(weight_OI, x_TI, group_size=16, try_uniform=True)[2]["pairs"] == 0
    assert solve(weight_OI, x_TI, group_size=16, pairs=0)[0]["widths"].tolist() == [2] * 4


@pytest.mark.parametrize("group_size", [16, 24], ids=["groups that divide", "a short last group"])
def test_divergences_are_those_of_the_outputs_with_bias(group_size: int):
    """The literal formula, for each count of pairs; the authors add the bias on one side only."""
    linear, x_TI = torch.nn.Linear(112, 12), inputs(112)
    method = build("slim_llm", bits=2, group_size=group_size)
    ranking = [2, 0, 1, 3] if group_size == 24 else [4, 2, 0, 6, 1, 3, 5]
    search = Search(method, linear, ranking, 2)
    with torch.no_grad():
        for part_TI in (x_TI[:100], x_TI[100:]):
            search.hook(linear, (part_TI[None],), linear(part_TI[None]))
        y_TO = linear(x_TI).double()
        for pairs in (1, 2):
            widths = [2] * -(-112 // group_size)
            for low, high in zip(ranking[:pairs], ranking[::-1], strict=False):
                widths[low], widths[high] = 1, 3
            parts = zip(linear.weight.split(group_size, dim=1), widths, strict=True)
            W_OI = torch.cat(
                [method.grid_fit.round_groups(part[:, None], width)[:, 0] for part, width in parts],
                dim=1,
            )
            p_TO = torch.softmax((x_TI @ W_OI.T + linear.bias).double(), 1).clamp_min(1e-6)
            r_TO = torch.softmax(y_TO, 1).clamp_min(1e-6)
            expected = (p_TO * (p_TO / r_TO).log()).sum()
            assert float(search.divergence_P[pairs]) == pytest.approx(float(expected), rel=1e-4)
    assert search.divergence_P[0] == 0  # not measured unless try_uniform
    assert search.best() == 1 + int(search.divergence_P[1:].argmin())


def test_the_search_reports_its_progress_and_removes_its_hooks():
    seen: list[list] = []

    class Listener(PassListener):
        def stage(self, text: str, total: int = 0) -> None:
            seen.append([text, total, 0])

        def advance(self, count: int = 1) -> None:
            seen[-1][2] += count

    given = checks.step(build("slim_llm", group_size=16), checks.weight(8, 64), inputs(64))
    given.listener = Listener()
    build("slim_llm", group_size=16).quantize_block(given)
    assert seen == [["bit allocation", checks.SEQUENCES, checks.SEQUENCES]]
    assert not given.block.test._forward_hooks


# --- grids ----------------------------------------------------------------------------------------


def test_salient_is_what_reaches_the_least_outlier_and_nothing_without_one():
    salience = torch.tensor([[1.0] * 6 + [9.0] + [1.0] * 4 + [8.0] + [1.0] * 8])
    assert most_salient(salience).nonzero()[:, 1].tolist() == [6, 11]
    assert not most_salient(torch.ones(2, 4)).any()
    assert not most_salient(torch.tensor([[1.0, 2.0]])).any()


def test_a_leading_narrow_group_has_a_symmetric_zero_only_as_published():
    """In a first group of positive weights and few bits, a symmetric zero clips the upper half."""
    weight_OI = checks.weight(8, 64).clone()
    weight_OI[:, :8] = weight_OI[:, :8].abs()
    x_TI = inputs(64) * torch.linspace(0.05, 2, 64)
    errors = {}
    for as_published in (False, True):
        options = {"bits": 4, "group_size": 8, "pairs": 2, "as_published": as_published}
        packed, restored_OI, _ = solve(weight_OI, x_TI, **options)
        assert packed["widths"][0] == 3
        errors[as_published] = float((restored_OI - weight_OI)[:, :8].norm())
    assert errors[True] > 3 * errors[False]


def test_one_bit_groups_have_two_levels_around_their_mean():
    weight_OI = checks.weight(8, 64) + 0.02
    x_TI = inputs(64) * torch.linspace(0.05, 2, 64)
    for scale_bits, tolerance in ((32, 1e-6), (16, 1 / 16)):
        packed, restored_OI, _ = solve(
            weight_OI, x_TI, group_size=8, pairs=3, scale_bits=scale_bits
        )
        assert packed["widths"][0] == 1
        half, mean = weight_OI[:, :8].abs().mean(1), weight_OI[:, :8].mean(1)
        high, low = restored_OI[:, :8].amax(1), restored_OI[:, :8].amin(1)
        assert torch.allclose(high - low, 2 * half, rtol=1e-3)
        assert ((high + low) / 2 - mean).abs().max() <= tolerance * 2 * half.max()


def test_zeros_between_whole_steps_are_stored_at_2_bits_only_if_searched():
    weight_OI, x_TI = checks.weight(16, 64), inputs(64)
    for search_range in (False, True):
        packed, _, _ = solve(weight_OI, x_TI, group_size=16, pairs=0, search_range=search_range)
        zeros = bitpack.unpack(packed["zero"], 4, 64)
        assert bool((zeros % 4).any()) is search_range


# --- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 8))
def test_stored_bits_on_llama_shapes(bits: int):
    for shape in LLAMA_SHAPES:
        for preset in ("study", "best"):
            method = build("slim_llm", preset, bits=bits)
            assert stored_bits(method.layout(*shape), *shape) == pytest.approx(
                bits + 20 / 128, abs=1e-4
            )
    assert bits + 20 / 128 + 1e-4 < bits + 0.16


def test_words_do_not_depend_on_the_allocation():
    for bits in (2, 5):
        sizes = {
            build("slim_llm", bits=bits, group_size=32, pairs=pairs).layout(8, 256)["weight"]
            for pairs in range(5)
        }
        assert len(sizes) == 1


def test_a_one_bit_group_takes_one_bit():
    """Codes are stored in three runs; that of the 1-bit groups has 32 columns in a word."""
    weight_OI, x_TI = checks.weight(4, 256), inputs(256) * torch.linspace(0.05, 2, 256)
    packed, restored_OI, _ = solve(weight_OI, x_TI, group_size=32, pairs=3)
    assert packed["widths"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3]
    codes = bitpack.unpack(packed["weight"][:, :3], 1, 96)
    groups = restored_OI[:, :96].view(4, 3, 32)
    assert torch.equal(codes.view(4, 3, 32).bool(), groups == groups.amax(2, keepdim=True))


def test_options_that_make_no_sense_are_refused():
    for wrong, words in (
        ({"group_size": -1}, "at least 1"),
        ({"pairs": -2}, "pairs=-2"),
        ({"lambda_salience": -1.0}, "lambda_salience"),
        ({"gptaq": 2.0}, "gptaq"),
        ({"refine": -1}, "refine"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"plus": True, "refine": 1}, "goes without"),
        ({"scale_bits": 8}, "scale_bits"),
        ({"bits": 8}, "2..7"),
    ):
        with pytest.raises(LLQError, match=words):
            build("slim_llm", **wrong)
    with pytest.raises(LLQError, match="takes 10 whole groups; 70 columns have 8"):
        build("slim_llm", group_size=8, pairs=5).layout(4, 70)


def test_without_a_factor_it_rounds_to_nearest_and_says_so(monkeypatch):
    weight_OI, x_TI = checks.weight(8, 64), inputs(64)
    monkeypatch.setattr("llq_hf.numerics.cholesky.factorize", lambda *args, **options: None)
    for preset in ({}, {"search_range": True, "act_group_aware": True, "gptaq": 0.25, "refine": 2}):
        _, restored_OI, notes = solve(weight_OI, x_TI, bits=4, group_size=16, pairs=0, **preset)
        assert notes["fallback"] == "rtn"
        assert (restored_OI - weight_OI).norm() < 0.1 * weight_OI.norm()


# --- best -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_best_leaves_less_output_error(bits: int):
    x_TI = checks.inputs()
    for option in (
        {"search_range": True},
        {"act_group_aware": True, "refine": 2, "search_range": True},
    ):
        study = build("slim_llm", bits=bits, group_size=32)
        better = build("slim_llm", bits=bits, group_size=32, **option)
        assert checks.loss_of(better, checks.weight(), x_TI) < checks.loss_of(
            study, checks.weight(), x_TI
        )


def test_group_aware_order_moves_columns_inside_groups_only():
    from llq_hf.numerics.error_feedback import group_aware_order

    diagonal_I = torch.tensor([1.0, 2, 3, 9, 5, 4, 7, 8])
    assert group_aware_order(diagonal_I, 3).tolist() == [3, 4, 5, 2, 1, 0, 7, 6]


def test_refining_leaves_means_where_they_are():
    """With fp32 means, the groups of 1 bit keep their means and the loss falls nevertheless."""
    weight_OI, x_TI = checks.weight(8, 64), inputs(64) * torch.linspace(0.05, 2, 64)
    losses = []
    for rounds in (0, 1, 3):
        options = {"group_size": 8, "pairs": 3, "scale_bits": 32, "refine": rounds}
        _, restored_OI, _ = solve(weight_OI, x_TI, **options)
        losses.append(checks.proxy_loss(weight_OI - restored_OI, x_TI))
    assert losses[2] <= losses[1] < losses[0]


# --- SliM-LLM+ ------------------------------------------------------------------------------------


def train_block(epochs: int, state: State | None = None, **options: object):
    """(packed, notes, step) of a trained block."""
    method = build(
        "slim_llm", group_size=16, plus=True, epochs=epochs, learning_rate=0.05, **options
    )
    given = checks.step(method, checks.weight(8, 64), inputs(64))
    given.state = state or State()
    with torch.no_grad():
        packed = method.quantize_block(given)["test"]
    return packed, given.jobs["test"].notes, given


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": 3}, {"bits": 3, "aug_loss": True}], ids=str
)
def test_training_lowers_the_loss_and_leaves_the_block_alone(options: dict):
    _, notes, given = train_block(6, **options)
    assert notes["loss"][-1] < 0.97 * notes["loss"][0]
    assert torch.equal(given.block.test.weight, checks.weight(8, 64))
    assert given.block.test.weight.grad is None


class SavedState(State):
    """State in memory, which raises KeyboardInterrupt after `stop_after` saves."""

    def __init__(self, stop_after: int = 99) -> None:
        self.tensors, self.left = None, stop_after

    def load(self):
        return self.tensors

    def save(self, tensors) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.tensors, self.left = {name: t.clone() for name, t in tensors.items()}, self.left - 1


def test_a_training_resumes_bit_for_bit():
    whole, expected, _ = train_block(4)
    state = SavedState(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        train_block(4, state)
    assert len(state.tensors["losses"]) == 2
    state.left = 99
    resumed, notes, _ = train_block(4, state)
    checks.check_same_bits(whole, resumed)
    assert notes == expected  # they go into the report, which must not depend on interruptions


def test_what_is_trained_is_what_is_stored():
    """The stored weight is that of the last forward pass, but for the rounding of scales to fp16.

    With fp32 scales there is none.
    """
    method = build("slim_llm", group_size=16, plus=True, scale_bits=32)
    linear = torch.nn.Linear(70, 8, bias=False)
    clipping = Clipping(method, linear, [1, 3, 2, 2, 2])
    with torch.no_grad():
        expected_OI = clipping.round()
        restored_OI = method.dequantize(clipping.pack(), 8, 70)
    assert torch.allclose(restored_OI, expected_OI, atol=1e-6)
    one = restored_OI[:, :16]  # mean +- mean|w| at the start, the mean added back
    first_OI = linear.weight.detach()[:, :16]
    assert torch.allclose((one.amax(1) + one.amin(1)) / 2, first_OI.mean(1), atol=1e-6)
    assert torch.allclose(one.amax(1) - one.amin(1), 2 * first_OI.abs().mean(1), atol=1e-6)


def test_a_diverging_training_says_what_to_do():
    method = build("slim_llm", group_size=16, plus=True, epochs=1)
    given = checks.step(method, checks.weight(8, 64), inputs(64))
    given.data.targets = lambda rows: torch.full((1, 64, 8), float("inf"))
    with pytest.raises(LLQError, match="learning_rate"):
        method.quantize_block(given)
