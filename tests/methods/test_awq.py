"""AWQ: equal to literal loops, its groups and their outputs, grouped queries, clipping, what `best`
adds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import checks
from reference.awq import awq
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llq_hf.common.errors import LLQError
from llq_hf.engine import entrance
from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels.bitpack import unpack
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Flow, Packed, Step, stored_bits
from llq_hf.methods import build
from llq_hf.methods.awq import AWQ, _diagonal_blocks, _parent
from llq_hf.numerics.stats import Samples

VARIANTS: dict[str, dict[str, Any]] = {
    "one group a row": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "groups that do not divide": {"group_size": 24},
    "symmetric": {"group_size": 16, "sym": True},
    "not clipped": {"group_size": 16, "ranges": "full"},
    "duo scaling": {"group_size": 16, "duo_scaling": True},
    "five ratios": {"group_size": -1, "ratios": 5},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_literal_loops(options: dict[str, Any], bits: int):
    weight_OI, x_TI = checks.weight(6, 40), checks.inputs(40)[:64]
    given = checks.step(build("awq", bits=bits, scale_bits=32, **options), weight_OI, x_TI)
    with torch.no_grad():
        packed = build("awq", bits=bits, scale_bits=32, **options).quantize_block(given)["test"]
    literal = dict(options)
    clip, duo = literal.pop("ranges", "clip") == "clip", literal.pop("duo_scaling", False)
    restored, codes, s, ratio = awq(
        weight_OI.numpy(), x_TI.numpy(), bits, clip=clip, duo=duo, **literal
    )
    assert given.jobs["test"].notes["ratio"] == ratio
    assert torch.allclose(packed["in_scale"].double(), torch.from_numpy(s), rtol=1e-5)
    wrong = unpack(packed["weight"], bits, 40).numpy() != codes
    assert wrong.mean() <= 0.005, "a tie may round differently in fp32"
    method = build("awq", bits=bits, scale_bits=32, **options)
    off = (
        checks.restore(method, packed, weight_OI).double() - torch.from_numpy(restored)
    ).abs() > 1e-5
    assert off.double().mean() <= 0.01


# --- scales of a whole block ----------------------------------------------------------------------


def quantized(
    folder: Path, ids: Tensor, **options: Any
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """(quantized model, records by linear without the prefix "model.layers.")."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    records = quantize_model(model, build("awq", **options), ids)
    return model, {record["name"].removeprefix("model.layers."): record for record in records}


def packed_of(model: nn.Module, name: str) -> Packed:
    module = model.get_submodule(f"model.layers.{name}")
    assert isinstance(module, QuantLinear)
    return module.packed()


@torch.no_grad()
def literal_ratio(
    parent: nn.Module, call: tuple[Any, Any, Any], names: list[str], inputs_TI: Tensor, method: AWQ
):
    """Spec 4.2 for linears that share an input: the parent is copied, its weights replaced, its
    output compared.
    """
    args, kwargs, output = call
    target = output[0] if isinstance(output, tuple) else output
    losses = []
    for i in range(method.ratios):
        s_I = inputs_TI.abs().mean(0).pow(i / method.ratios).clamp_min(1e-4)
        s_I = s_I / (s_I.max() * s_I.min()).sqrt()
        changed = copy.deepcopy(parent)
        for name in names:
            linear = changed.get_submodule(name)
            grid = method.grid.spread(method.grid.grids(linear.weight * s_I), len(s_I))
            linear.weight.copy_(grid.values(grid.codes(linear.weight * s_I, method.bits)) / s_I)
        found = changed(*args, **kwargs)
        losses.append(
            float(((found[0] if isinstance(found, tuple) else found) - target).square().mean())
        )
    return losses.index(min(losses)) / method.ratios


@pytest.mark.parametrize("bits", [2, 4])
def test_shared_scales_are_judged_by_the_output_of_the_common_parent(
    bits: int, tiny_llama: Path, calibration_ids: Tensor
):
    """In both blocks on what the full-precision model makes: the second sees no quantized first."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    calls: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    for i in range(2):
        for parent, names in (
            ("self_attn", ["q_proj", "k_proj", "v_proj"]),
            ("mlp", ["gate_proj", "up_proj"]),
        ):
            key = f"{i}.{parent}"
            module = dense.get_submodule(f"model.layers.{key}")
            module.register_forward_hook(
                lambda m, args, kwargs, out, key=key: calls.update({key: (args, kwargs, out)}),
                with_kwargs=True,
            )
            module.get_submodule(names[0]).register_forward_pre_hook(
                lambda m, args, key=key: inputs.update({key: args[0].flatten(0, 1)})
            )
    with torch.no_grad():
        dense(calibration_ids, use_cache=False)
    method = build("awq", bits=bits, group_size=32, ratios=10, scale_bits=32)
    _, records = quantized(
        tiny_llama, calibration_ids, bits=bits, group_size=32, ratios=10, scale_bits=32
    )
    assert isinstance(method, AWQ)
    ratios = set()
    for key, call in calls.items():
        names = ["q_proj", "k_proj", "v_proj"] if key.endswith("attn") else ["gate_proj", "up_proj"]
        parent = dense.get_submodule(f"model.layers.{key}")
        for hooks in (parent._forward_hooks, parent.get_submodule(names[0])._forward_pre_hooks):
            hooks.clear()
        expected = literal_ratio(parent, call, names, inputs[key], method)
        assert {records[f"{key}.{name}"]["ratio"] for name in names} == {expected}
        ratios.add(expected)
    assert len(ratios) > 1, "the search chooses something"


def test_the_search_does_not_depend_on_the_batch(
    tiny_llama: Path, calibration_ids: Tensor, monkeypatch
):
    ratios = []
    for tokens in (32, 96, 4096):  # one, three and all eight sequences at a time
        monkeypatch.setattr(entrance, "BATCH_TOKENS", tokens)
        _, records = quantized(tiny_llama, calibration_ids, bits=3, ratios=10)
        ratios.append([record.get("ratio") for record in records.values()])
    assert ratios[0] == ratios[1] == ratios[2]


class TwoReaders(nn.Module):
    """A block whose two linears read its input, and whose sum, squared, is its output."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        for name in ("a", "b"):
            linear = nn.Linear(in_features, 12, bias=False)
            linear.weight = nn.Parameter(
                checks.weight(12, in_features) + (name == "b"), requires_grad=False
            )
            self.add_module(name, linear)

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        return (self.a(hidden) + self.b(hidden)).square()


def two_readers(x_NSI: Tensor) -> Step:
    block, stat = TwoReaders(x_NSI.shape[-1]), Samples(x_NSI.shape[-1], x_NSI.device)
    stat.update(x_NSI.flatten(0, 1), len(x_NSI))
    data = checks.Data(x_NSI, block.a.weight)
    return Step(
        "model.layers.0",
        block,
        dict(block.named_children()),
        dict.fromkeys("ab", stat),
        [["a", "b"]],
        data,
    )


@pytest.mark.parametrize(("tokens", "sequences"), [(10**6, [0, 1, 2, 3]), (256, [0, 2]), (1, [0])])
def test_outputs_are_compared_on_evenly_spaced_sequences(tokens: int, sequences: list[int]):
    step = two_readers(checks.inputs(40).view(4, 128, 40))
    weights = [linear.weight.clone() for linear in step.linears.values()]
    calls = build("awq", search_tokens=tokens)._calls(step, step.block)
    assert step.data is not None
    assert torch.equal(
        torch.cat([args[0] for args, _, _ in calls]), step.data.inputs(slice(None))[0][sequences]
    )
    assert all(torch.equal(step.block(args[0]), output) for args, _, output in calls)
    with torch.no_grad():
        build("awq", search_tokens=tokens).quantize_block(step)
    for linear, weight_OI in zip(step.linears.values(), weights, strict=True):
        assert torch.equal(linear.weight, weight_OI), "the search runs on copies"
    assert not step.block._forward_hooks


def test_the_common_parent_is_found_by_name():
    assert _parent(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn"
    # Blocks with attention and mlp side by side
    assert _parent(["self_attn.q_proj", "mlp.gate_proj"]) == ""
    assert _parent(["a", "b"]) == ""
    assert _parent(["mlp.expert.gate", "mlp.expert.up"]) == "mlp.expert"


def test_outputs_that_overflow_are_an_error():
    step = two_readers(checks.inputs(40).view(4, 128, 40) * 1e18)
    with (
        torch.no_grad(),
        pytest.raises(LLQError, match=r"model\.layers\.0\.a gives finite outputs"),
    ):
        build("awq").quantize_block(step)


def test_grouped_queries(tiny_llama: Path, calibration_ids: Tensor, make_checkpoint):
    """The tiny Llama has three query heads of 16 channels per value head."""
    name, scales = "0.self_attn.o_proj", {}
    for gqa in ("skip", "tie", "free"):
        model, records = quantized(tiny_llama, calibration_ids, bits=2, ratios=8, gqa=gqa)
        assert records[name].get("scaled", True) is (gqa != "skip")
        scales[gqa] = packed_of(model, name)["in_scale"].view(2, 3, 16)
    assert torch.equal(scales["skip"], torch.ones(2, 3, 16).half())
    assert torch.equal(scales["tie"], scales["tie"][:, :1].expand(2, 3, 16))
    assert not torch.equal(scales["free"], scales["free"][:, :1].expand(2, 3, 16))
    folder = make_checkpoint(num_key_value_heads=6, num_hidden_layers=1)
    for gqa in ("skip", "tie"):
        _, records = quantized(folder, calibration_ids, bits=2, ratios=8, gqa=gqa)
        assert records[name]["ratio"] > 0, (
            "as many value heads as query heads: scaled like any other"
        )


def test_queries_and_keys_are_not_clipped(tiny_llama: Path, calibration_ids: Tensor):
    options: dict[str, Any] = {"bits": 2, "ratios": 1, "group_size": -1}
    clipped, _ = quantized(tiny_llama, calibration_ids, **options)
    full, _ = quantized(tiny_llama, calibration_ids, ranges="full", **options)
    searched, _ = quantized(tiny_llama, calibration_ids, ranges="search", **options)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        first, second, third = (
            packed_of(m, f"1.self_attn.{name}")["scale"] for m in (clipped, full, searched)
        )
        assert torch.equal(first, second) is (name in ("q_proj", "k_proj")), name
        assert (first <= second).all()
        assert not torch.equal(third, second)


# --- grids ----------------------------------------------------------------------------------------


def test_without_scales_and_clipping_it_is_rtn():
    """r = 0 is s = 1 exactly."""
    for options in ({"group_size": 40}, {"group_size": -1, "sym": True}):
        packed = checks.quantize(
            build("awq", bits=3, ratios=1, ranges="full", **options), checks.weight()
        )
        assert torch.equal(packed.pop("in_scale"), torch.ones(checks.IN).half())
        checks.check_same_bits(
            packed, checks.quantize(build("rtn", bits=3, **options), checks.weight())
        )


def test_a_row_of_zeros_stays_zero():
    weight_OI = checks.weight().clone()
    weight_OI[3] = 0
    for preset in ("study", "best"):
        method = build("awq", preset, bits=3)
        assert not checks.restore(method, checks.quantize(method, weight_OI), weight_OI)[3].any()


def test_a_channel_that_never_fired_is_scaled_as_the_weakest_that_did():
    x_TI = checks.inputs().clone()
    x_TI[:, 7] = 0
    s_I = checks.quantize(build("awq", bits=3), checks.weight(), x_TI)["in_scale"]
    assert s_I[7] == s_I.min() < s_I.max()
    assert s_I.min() > 1e-2


def test_diagonal_blocks():
    H_II = torch.arange(49.0).view(7, 7)
    blocks = _diagonal_blocks(H_II, 3)
    assert torch.equal(blocks[0], H_II[:3, :3])
    assert torch.equal(blocks[1], H_II[3:6, 3:6])
    assert torch.equal(blocks[2], torch.diag(torch.tensor([48.0, 0, 0])))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, -1])
def test_each_step_of_best_lowers_the_loss(bits: int, group_size: int):
    def loss(**options: Any) -> float:
        method = build("awq", bits=bits, group_size=group_size, **options)
        return checks.loss_of(method, checks.weight(), checks.inputs())

    clip, search, best = loss(), loss(ranges="search"), loss(ranges="search", feedback=True)
    assert search < clip
    assert best < 0.8 * search


def test_feedback_sees_the_quantized_stream_and_notes_when_it_cannot_factorize(monkeypatch):
    assert build("awq").flow is Flow.DENSE
    assert build("awq", feedback=True).flow is Flow.QUANTIZED
    monkeypatch.setattr("llq_hf.numerics.cholesky.factorize", lambda *args, **options: None)
    given = checks.step(build("awq", bits=3, feedback=True), checks.weight())
    with torch.no_grad():
        packed = build("awq", bits=3, feedback=True).quantize_block(given)["test"]
    assert given.jobs["test"].notes["fallback"] == "rtn"
    checks.check_same_bits(packed, checks.quantize(build("awq", bits=3), checks.weight()))


def test_stored_bits_of_llama_3_8b():
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    layout = build("awq", bits=4).layout
    total = sum(stored_bits(layout(*shape), *shape) * shape[0] * shape[1] for shape in shapes)
    assert total / sum(o * i for o, i in shapes) == pytest.approx(4.1591, abs=1e-4)
    assert build("awq", scale_bits=32).layout(8, 40)["in_scale"].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"ratios": 0},
        {"search_tokens": 0},
        {"gqa": "tied"},
        {"ranges": "best"},
        {"damp": 2.0},
        {"group_size": 0},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]):
    (name,) = options
    with pytest.raises(LLQError, match=f"awq: {name}="):
        build("awq", **options)
