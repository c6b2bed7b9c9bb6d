"""OmniQuant: equal to its literal training, function-preserving transformations, dynamic
activations, resume.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import checks
from reference.omniquant import omniquant
from torch import Tensor, nn

from llq_hf.checkpoints.journal import FileState
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener, Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.blocks import LiveBlocks
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.step import quantize_step
from llq_hf.engine.walk import walk
from llq_hf.kernels.bitpack import unpack
from llq_hf.layers.attention import install
from llq_hf.method import State, Step, stored_bits
from llq_hf.methods import build

VARIANTS = {
    "one group a row": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "groups of 12 that do not divide": {"group_size": 12},
    "symmetric": {"group_size": 16, "sym": True},
    "aug loss": {"group_size": -1, "aug_loss": True},
    "twice the learning rate": {"group_size": -1, "lwc_lr": 0.02},
    "decay": {"group_size": 16, "decay": True, "lwc_lr": 0.05},
    "no training": {"group_size": 16, "epochs": 0},
    "searched ranges": {"group_size": 12, "search_range": True},
    "searched ranges and no training": {"group_size": 16, "search_range": True, "epochs": 0},
    "learned rounding": {"group_size": -1, "rounding_lr": 0.05},
    "learned rounding of symmetric groups": {"group_size": 12, "sym": True, "rounding_lr": 0.05},
}


class Blind(checks.Data):
    """Calibration data whose targets are not what the block makes of its inputs: two streams that
    have parted.
    """

    def targets(self, rows: slice) -> Tensor:
        return super().targets(rows) + 0.3 * torch.sin(
            50 * self.x_NSI[rows][..., : len(self.weight_OI)]
        )


def one_linear(method: Any, weight_OI: Tensor, x_NSI: Tensor) -> Step:
    step = checks.step(method, weight_OI, x_NSI.flatten(0, 1))
    return replace(step, data=Blind(x_NSI, weight_OI))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_equals_the_literal_training(options: dict, bits: int):
    """Three sequences, five epochs; a code or two may round differently in fp32."""
    weight_OI, x_NSI = checks.weight(6, 32), checks.inputs(32)[:24].view(3, 8, 32) / 10
    method = build("omniquant", bits=bits, **{"epochs": 5, **options})
    step = one_linear(method, weight_OI, x_NSI)
    packed = method.quantize_block(step)["test"]
    codes, scales, losses = omniquant(
        weight_OI.numpy(),
        x_NSI.numpy(),
        step.data.targets(slice(None)).numpy(),
        bits=bits,
        group_size=method.group_size,
        sym=method.sym,
        epochs=method.epochs,
        lr=method.lwc_lr,
        aug_loss=method.aug_loss,
        search_range=method.search_range,
        rounding_lr=method.rounding_lr,
        decay=method.decay,
    )
    notes = step.jobs["test"].notes
    if losses:
        assert notes["first_loss"] == pytest.approx(losses[0], rel=1e-4)
        assert notes["last_loss"] == pytest.approx(losses[-1], rel=1e-3)
    assert np.allclose(packed["scale"].float(), scales, rtol=2e-3)
    assert (unpack(packed["weight"], bits, 32).numpy() != codes).mean() <= 0.01


def test_zero_points_are_codes_where_all_weights_have_one_sign():
    """The authors' grid leaves the code range there, which no packed format can hold."""
    weight_OI = checks.weight(6, 64).abs() + 0.5
    method = build("omniquant", bits=4, group_size=32)
    packed = checks.quantize(method, weight_OI)
    assert not unpack(packed["zero"], 4, 12).any()
    assert checks.relative_errors(weight_OI, checks.restore(method, packed, weight_OI))[0] < 0.05


def test_clipping_is_learned():
    """Weights with an outlier in a channel that never fires: training clips it, a grid without
    training cannot.
    """
    weight_OI, x_TI = checks.weight(8, 64).clone(), checks.inputs(64).clone()
    weight_OI[:, 5], x_TI[:, 5] = 1.0, 0
    trained, still = (
        build("omniquant", bits=3, group_size=-1, epochs=epochs, lwc_lr=0.05) for epochs in (40, 0)
    )
    assert checks.loss_of(trained, weight_OI, x_TI) < 0.5 * checks.loss_of(still, weight_OI, x_TI)


def test_a_loss_that_is_not_finite_is_an_error():
    x_TI = checks.inputs(64).clone()
    x_TI[3, 3] = float("inf")
    with pytest.raises(LLQError, match=r"training loss of model.layers.0 is not finite in epoch 1"):
        checks.quantize(build("omniquant", bits=3, epochs=2), checks.weight(8, 64), x_TI)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"lwc_lr": -0.1}, "lwc_lr=-0.1"),
        ({"let_lr": -0.1}, "let_lr=-0.1"),
        ({"rounding_lr": -0.1}, "rounding_lr=-0.1"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"a_bits": 1}, "bits=1"),
        ({"a_bits": 17}, "bits=17"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_options_are_checked(options: dict, words: str):
    with pytest.raises(LLQError, match=f"omniquant: .*{words}"):
        build("omniquant", **options)


# --- weights and activations ----------------------------------------------------------------------

W6A6 = {"bits": 6, "a_bits": 6, "group_size": -1}


def test_what_is_stored_where():
    """LET stores one fp16 per input channel, except for o and down. Without quantized activations
    only the grid is stored.
    """
    method = build("omniquant", **W6A6)
    grid = 6 + 22 / 4096
    for name, bits in (
        ("q_proj", grid + 16 / 4096),
        ("up_proj", grid + 16 / 4096),
        ("o_proj", grid),
        ("down_proj", grid),
    ):
        layout = method.for_linear(f"model.layers.0.x.{name}").layout(4096, 4096)
        assert stored_bits(layout, 4096, 4096) == pytest.approx(bits), name
    for plain in (build("omniquant", bits=4), build("omniquant", let=False, **W6A6)):
        assert "in_scale" not in plain.for_linear("q_proj").layout(64, 64)
    assert build("omniquant").attention is None
    assert build("omniquant", **W6A6).attention.key.bits == 6


def by_hand(x: Tensor, bits: int) -> Tensor:
    """Grid 1.4 along the last axis, token by token."""
    rows = []
    for token in x.flatten(0, -2).double():
        scale = max((token.max() - token.min()).item() / (2**bits - 1), 1e-5)
        zero = round(-token.min().item() / scale)
        rows.append(((token / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale))
    return torch.stack(rows).view(x.shape)


@torch.no_grad()
def test_linear_divides_then_quantizes_its_input():
    method, weight_OI, x_TI = build("omniquant", epochs=2, **W6A6), checks.weight(), checks.inputs()
    packed = checks.quantize(method, weight_OI)
    s_I = packed["in_scale"].double()
    assert not torch.allclose(s_I, s_I[:1]), "there is something to divide by"
    assert checks.relative_errors(weight_OI, checks.restore(method, packed, weight_OI))[0] < 0.05
    stored_OI = checks.restore(method, packed, weight_OI).double() * s_I
    bias = torch.arange(checks.OUT) / 1000
    y = method.linear(x_TI[:9], packed, bias, checks.OUT)
    expected = by_hand(x_TI[:9] / s_I, 6) @ stored_OI.T + bias
    assert (
        y.double() - expected
    ).norm() <= 2e-3 * expected.norm()  # a code on the edge may fall either way
    coarse = x_TI[:9].double() @ checks.restore(method, packed, weight_OI).double().T + bias
    assert (coarse - expected).norm() > 5e-3 * expected.norm(), "activations are quantized"


def block_step(
    folder: Path,
    ids_NS: Tensor,
    method: Any,
    change: Callable[[nn.Module], None] = lambda model: None,
) -> Step:
    """The step of the first block of a model, after `change`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    return next(next(walk(LiveBlocks(model), ids_NS, method)).steps())


@torch.no_grad()
def outputs(step: Step, block: nn.Module) -> Tensor:
    hidden_BSD, kwargs = step.data.inputs(slice(0, 8))
    return block(hidden_BSD, **kwargs) - hidden_BSD


@pytest.mark.parametrize(
    ("base", "epochs"), [("tiny_llama", 0), ("tiny_llama", 3), ("tiny_llama_bf16", 3)]
)
def test_the_transformation_preserves_the_block(
    request: pytest.FixtureRequest, calibration_ids: Tensor, base: str, epochs: int
):
    """At 8 bits and 14-bit activations nearly nothing is rounded: with grouped queries and RoPE the
    block is as it was, although s of every pair has moved far from 1.
    """
    method = build(
        "omniquant", bits=8, a_bits=14, group_size=-1, epochs=epochs, let_lr=0.2, lwc_lr=0.2
    )
    step = block_step(request.getfixturevalue(base), calibration_ids, method)
    dense = outputs(step, step.block)
    weights = {n: m.weight.float() for n, m in step.linears.items()}
    records = quantize_step(step, method)
    assert "let_left_out" not in records[0]
    after = outputs(step, step.block)
    assert (after - dense).norm() <= 0.03 * dense.norm()
    v = step.block.self_attn.v_proj.dequantized()
    assert (v - weights["self_attn.v_proj"]).norm() > 0.3 * v.norm(), "v carries its s"
    k = step.block.self_attn.k_proj.dequantized()
    moved = (k - weights["self_attn.k_proj"]).norm() / k.norm()
    assert moved > 0.3 if epochs else moved < 0.03


def test_pairs_that_would_change_the_function_are_left_out(
    tiny_llama_biased: Path, calibration_ids: Tensor
):
    """Biases of q, k and v are not scaled with their rows."""
    method = build("omniquant", bits=8, a_bits=14, group_size=-1, epochs=0)
    step = block_step(tiny_llama_biased, calibration_ids, method)
    dense = outputs(step, step.block)
    records = quantize_step(step, method)
    pairs = ["self_attn.q_proj and self_attn.k_proj", "self_attn.v_proj and self_attn.o_proj"]
    assert all(record["let_left_out"] == pairs for record in records)
    assert (outputs(step, step.block) - dense).norm() <= 0.03 * dense.norm()


def test_a_norm_between_queries_and_rope_is_seen(calibration_ids: Tensor):
    """Qwen3 normalizes every head of q and k: a scale there would vanish."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
    )
    records = quantize_model(
        Qwen3ForCausalLM(config).eval(), build("omniquant", epochs=1, **W6A6), calibration_ids[:2]
    )
    assert records[0]["let_left_out"] == ["self_attn.q_proj and self_attn.k_proj"]


def test_training_beats_its_start_and_let_beats_none(tiny_llama: Path, calibration_ids: Tensor):
    """By the distance of a W4A4 block's output from the full-precision one."""

    def massive(model: nn.Module) -> None:
        """Channels as models have them: 20 times the others, read by smaller weights."""
        block = model.model.layers[0]
        block.input_layernorm.weight.data[7] *= 20
        block.post_attention_layernorm.weight.data[9] *= 20
        for letter in "qkv":
            getattr(block.self_attn, f"{letter}_proj").weight.data[:, 7] /= 10
        block.mlp.gate_proj.weight.data[:, 9] /= 10
        block.mlp.up_proj.weight.data[:, 9] /= 10

    def distance(**options: Any) -> float:
        method = build("omniquant", **{"bits": 4, "a_bits": 4, "group_size": -1, **options})
        step = block_step(tiny_llama, calibration_ids, method, massive)
        dense = outputs(step, step.block)
        quantize_step(step, method)
        install(step.block, method.attention)
        return float((outputs(step, step.block) - dense).norm() / dense.norm())

    start = distance(epochs=0)
    trained = distance(epochs=10)
    without = distance(epochs=10, let=False)
    assert trained < 0.98 * start
    assert trained < 0.5 * without


def test_attention_sees_quantized_queries_keys_and_values(
    tiny_llama: Path, calibration_ids: Tensor
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    quantize_model(model, build("omniquant", epochs=0, **W6A6), calibration_ids[:2])
    assert all(block.self_attn.llq_attention.query.bits == 6 for block in model.model.layers)


# --- resume inside a block ------------------------------------------------------------------------


class Memory(State):
    def __init__(self) -> None:
        self.saved: dict[str, Tensor] | None = None
        self.saves = 0

    def load(self) -> dict[str, Tensor] | None:
        return self.saved

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.saved, self.saves = copy.deepcopy(tensors), self.saves + 1


class StoppedError(Exception):
    pass


class StopAfter(Progress):
    """Raises when `count` units of the `stages`-th training are done."""

    def __init__(self, stages: int, count: int) -> None:
        self.stages, self.count, self.training = stages, count, False

    def stage(self, text: str, total: int = 0) -> None:
        self.training = text == "training"
        self.stages -= self.training

    def advance(self, count: int = 1) -> None:
        if self.training and self.stages == 0:
            self.count -= count
            if self.count <= 0:
                raise StoppedError


class Units(PassListener):
    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def stage(self, text: str, total: int = 0) -> None:
        self.total, self.done = total, 0

    def advance(self, count: int = 1) -> None:
        self.done += count


RESUMED = {
    "weights": {"bits": 2, "aug_loss": True},
    "weights and activations": {"bits": 4, "a_bits": 4, "group_size": -1},
    "best": {"preset": "best", "bits": 2},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@torch.no_grad()
def test_a_training_that_stopped_inside_a_block_goes_on(
    tiny_llama: Path, calibration_ids: Tensor, options: dict
):
    """Stopped in the third of four epochs: the same bits, and only two epochs are done again."""
    method = build("omniquant", **{"epochs": 4, **options})
    fresh = partial(block_step, tiny_llama, calibration_ids, method)
    unbroken = method.quantize_block(fresh())
    state, units = Memory(), Units()
    with pytest.raises(StoppedError):
        method.quantize_block(replace(fresh(), state=state, listener=StopAfter(1, 2 * 8 + 3)))
    assert state.saves == 2
    resumed = method.quantize_block(replace(fresh(), state=state, listener=units))
    assert state.saves == 4
    assert units.done == units.total == 4 * 8
    for name in unbroken:
        checks.check_same_bits(unbroken[name], resumed[name])
    # After the last epoch, before the block's file
    once_more = method.quantize_block(replace(fresh(), state=state))
    assert state.saves == 4
    checks.check_same_bits(unbroken["mlp.up_proj"], once_more["mlp.up_proj"])


def test_a_run_stopped_in_the_training_of_its_second_block_goes_on(
    tiny_llama: Path, calibration_npy: Path, tmp_path: Path
):
    method = build("omniquant", bits=3, epochs=4)
    data = Calibration(str(calibration_npy), samples=4)

    def digests(out: Path) -> dict[str, str]:
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(out.iterdir())
        }

    quantize_checkpoint(str(tiny_llama), tmp_path / "a", method, data)
    with pytest.raises(StoppedError):
        quantize_checkpoint(
            str(tiny_llama), tmp_path / "b", method, data, progress=StopAfter(2, 3 * 4 + 2)
        )
    training = FileState.beside(tmp_path / "b")
    assert training.exists()
    again = StopAfter(1, 10**6)
    quantize_checkpoint(str(tiny_llama), tmp_path / "b", method, data, progress=again)
    assert 10**6 - again.count == 4 * 4
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not training.exists()
