"""Deliberate faults: each must make the contract's checks fail, or the suite would not notice a
broken method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from contract import checks
from contract.cases import CASES, Case
from torch import Tensor

from llq_hf.common.errors import LLQError
from llq_hf.kernels import bitpack
from llq_hf.method import Method, Packed, Step
from llq_hf.methods import METHODS

BITS = 3
Fault = Callable[[Packed, int], Packed]


def codes_through(change: Callable[[Tensor], Tensor]) -> Fault:
    def fault(packed: Packed, in_features: int) -> Packed:
        codes_OI = bitpack.unpack(packed["weight"], BITS, in_features).long()
        return {**packed, "weight": bitpack.pack(change(codes_OI).clamp(0, 2**BITS - 1), BITS)}

    return fault


def tensor_through(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    return lambda packed, in_features: {**packed, name: change(packed[name]).contiguous()}


# --- in what is stored: the ceilings must see it --------------------------------------------------

STORED_FAULTS: dict[str, Fault] = {
    "scale doubled": tensor_through("scale", lambda t: t * 2),
    "scale halved": tensor_through("scale", lambda t: t / 2),
    "codes one too high": codes_through(lambda codes: codes + 1),
    "codes one too low": codes_through(lambda codes: codes - 1),
    "columns shifted by one": codes_through(lambda codes: codes.roll(1, dims=1)),
    "rows shifted by one": codes_through(lambda codes: codes.roll(1, dims=0)),
    "codes mirrored": codes_through(lambda codes: 2**BITS - 1 - codes),
}
OWN_FAULTS: Mapping[
    str, dict[str, Fault]
] = {  # where a method stores more; a tensor that is absent is left alone
    "rtn": {"zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0))},
    "gptq": {
        "zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0)),
        "order reversed": tensor_through("order", lambda t: t.flip(0)),
    },
    "quip": {
        "zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0)),
        "sides swapped": tensor_through("seeds", lambda t: t.flip(0)),
        "another seed": tensor_through("seeds", lambda t: t + 1),
        "input scales doubled": tensor_through("in_scale", lambda t: t * 2),
        "input scales shifted": tensor_through("in_scale", lambda t: t.roll(1, dims=0)),
    },
    "db_llm": {
        "planes swapped": tensor_through(
            "weight", lambda t: ((t >> 1) & 0x55555555) | ((t & 0x55555555) << 1)
        ),
        "scales swapped": tensor_through("scale", lambda t: t.flip(2).contiguous()),
        "scales of another row": tensor_through("scale", lambda t: 2 * t.roll(1, dims=0)),
        "columns shifted": tensor_through("weight", lambda t: t.roll(1, dims=1)),
    },
    "pb_llm": {
        "signs flipped": tensor_through("weight", torch.bitwise_not),
        "salient codes shifted by one word": tensor_through("code", lambda t: t.roll(1)),
        "salient positions shifted by one word": tensor_through("position", lambda t: t.roll(1)),
        "alphas doubled": tensor_through("scale", lambda t: t * 2),
        "means one too high": tensor_through("mean", lambda t: t + 1),
        "salient scales doubled": tensor_through("salient_scale", lambda t: t * 2),
        "salient zero points 40 too high": tensor_through("salient_zero", lambda t: t + 40),
    },
    "billm": {
        "signs flipped": tensor_through("weight", torch.bitwise_not),
        "codes shifted by one row": tensor_through("weight", lambda t: t.roll(1, dims=0)),
        "salient columns inverted": tensor_through("salient", torch.bitwise_not),
        "scales doubled": tensor_through("scale", lambda t: t * 2),
        "scales of low and mid swapped": tensor_through("scale", lambda t: t[..., [1, 0, 2, 3]]),
        "means one too high": tensor_through("mean", lambda t: t + 1),
    },
    "spinquant": {"scales negative": tensor_through("scale", lambda t: -t)},
    "awq": {
        "zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0)),
        "input scales doubled": tensor_through("in_scale", lambda t: t * 2),
        "input scales shifted": tensor_through("in_scale", lambda t: t.roll(1, dims=0)),
    },
    "smoothquant": {"input scales doubled": tensor_through("in_scale", lambda t: t * 2)},
    "omniquant": {"zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0))},
    "hybrid": {"zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0))},
    "efficient_qat": {"zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0))},
    "slim_llm": {
        "scale doubled": tensor_through("scale", lambda t: t * 2),
        "scale halved": tensor_through("scale", lambda t: t / 2),
        "rows shifted by one": tensor_through("weight", lambda t: t.roll(1, dims=0)),
        "words shifted by one": tensor_through("weight", lambda t: t.roll(1, dims=1)),
        "codes mirrored": tensor_through("weight", lambda t: ~t),
        "zero points shifted": tensor_through("zero", lambda t: t.roll(1, dims=0)),
        "widths reversed": tensor_through("widths", lambda t: t.flip(0)),
    },
    "nf4": {
        "words shifted by one": tensor_through("weight", lambda t: t.roll(1, dims=0)),
        "codes mirrored": tensor_through("weight", torch.bitwise_not),
        "scales doubled": tensor_through("scale_absmax", lambda t: t * 40),
        "mean of the scales doubled": tensor_through("scale_mean", lambda t: t * 2),
        "shifts mirrored": tensor_through("tau", lambda t: 255 - t),
    },
}


def applicable() -> list[Any]:
    rows = []
    for case in CASES:
        layout = case.build(case.near(BITS)).layout(checks.OUT, checks.IN)
        needs = {
            "zero": "zero points",
            "order": "order",
            "seeds": ("sides", "another"),
            "in_scale": "input",
        }
        needs |= {"tau": "shifts", "scale_absmax": "scales", "scale_mean": "mean of"}
        generic = STORED_FAULTS if case.uniform else {}
        for words, fault in {**generic, **OWN_FAULTS[case.method]}.items():
            absent = [
                name
                for name, start in needs.items()
                if words.startswith(start) and name not in layout
            ]
            if not absent:
                rows.append(pytest.param(case, fault, id=f"{case}-{words}".replace(" ", "-")))
    return rows


@pytest.mark.parametrize(("case", "fault"), applicable())
def test_a_fault_in_what_is_stored_is_seen(case: Case, fault: Fault):
    method, weight_OI = case.build(case.near(BITS)), checks.weight()
    packed = checks.solved(case, case.near(BITS))
    # Whole before the fault
    checks.check_errors(case, case.near(BITS), weight_OI, checks.restore(method, packed, weight_OI))
    broken = fault(packed, checks.IN)
    checks.check_layout(method, broken, weight_OI)  # well-formed: only its meaning is wrong
    with pytest.raises((AssertionError, LLQError)):  # another weight, or one that is refused
        checks.check_errors(
            case, case.near(BITS), weight_OI, checks.restore(method, broken, weight_OI)
        )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_faces_at_least_three(name: str):
    uniform = next(case.uniform for case in CASES if case.method == name)
    assert len(STORED_FAULTS) * uniform + len(OWN_FAULTS[name]) >= 3


@pytest.mark.parametrize("case", [c for c in CASES if c.uniform and c.method != "quip"], ids=str)
def test_shifted_groups_are_seen(case: Case):
    """Groups differ in size, so that a scale read from the neighbouring group is noticed."""
    method = case.build(case.near(BITS))
    groups = method.layout(checks.OUT, checks.IN)["scale"].shape[1]
    if groups == 1:
        pytest.skip("one group a row: there is no neighbour")
    weight_OI = checks.weight() * (1 + 3 * (torch.arange(checks.IN) % 128 < 40))
    packed = checks.quantize(method, weight_OI)
    broken = {**packed, "scale": packed["scale"].roll(1, dims=1).contiguous()}
    before, _ = checks.relative_errors(weight_OI, checks.restore(method, packed, weight_OI))
    after, _ = checks.relative_errors(weight_OI, checks.restore(method, broken, weight_OI))
    assert after > 1.02 * before


# --- in the code of a method: the other checks must see it ----------------------------------------


class Wrapped:
    """A method with one behaviour replaced; everything else is the method's own."""

    def __init__(self, method: Method, **replaced: Callable[..., Any]) -> None:
        self._method = method
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


@pytest.fixture(
    params=[next(case for case in CASES if case.method == name) for name in METHODS],
    ids=list(METHODS),
)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_linear_that_forgets_the_bias_is_seen(case: Case):
    method = case.build(case.near(BITS))
    broken = Wrapped(
        method, linear=lambda x, packed, bias, out: method.linear(x, packed, None, out)
    )
    with pytest.raises(AssertionError):
        checks.check_linear(
            broken, checks.solved(case, case.near(BITS)), checks.weight(), torch.float32
        )


def test_linear_that_is_one_percent_off_is_seen(case: Case):
    method = case.build(case.near(BITS))
    broken = Wrapped(
        method, linear=lambda x, packed, bias, out: method.linear(x * 1.01, packed, bias, out)
    )
    with pytest.raises(AssertionError):
        checks.check_linear(
            broken, checks.solved(case, case.near(BITS)), checks.weight(), torch.float32
        )


def test_linear_in_another_dtype_is_seen(case: Case):
    method = case.build(case.near(BITS))
    broken = Wrapped(
        method, linear=lambda x, packed, bias, out: method.linear(x, packed, bias, out).float()
    )
    with pytest.raises(AssertionError):
        checks.check_linear(
            broken,
            checks.solved(case, case.near(BITS)),
            checks.weight(dtype=torch.bfloat16),
            torch.bfloat16,
        )


def test_quantize_that_writes_into_its_weight_is_seen(case: Case):
    method = case.build(case.near(BITS))

    def quantize_block(step: Step) -> dict[str, Packed]:
        packed = method.quantize_block(step)
        step.linears["test"].weight[:, 0] = 0
        return packed

    with pytest.raises(AssertionError):
        checks.check_pure(
            Wrapped(method, quantize_block=quantize_block), checks.weight(), checks.inputs()
        )


def test_quantize_that_writes_into_its_statistic_is_seen(case: Case):
    method = case.build(case.near(BITS))
    if method.observes is None:
        pytest.skip("takes no statistic")

    def quantize_block(step: Step) -> dict[str, Packed]:
        packed = method.quantize_block(step)
        next(t for t in vars(step.stats["test"]).values() if isinstance(t, Tensor)).mul_(1.5)
        return packed

    with pytest.raises(AssertionError):
        checks.check_pure(
            Wrapped(method, quantize_block=quantize_block), checks.weight(), checks.inputs()
        )


def test_quantize_that_asks_the_global_generator_is_seen(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    method_type = METHODS[case.method]
    original = method_type.quantize_block

    def quantize_block(self: Method, step: Step) -> dict[str, Packed]:
        weight_OI = step.linears["test"].weight
        noisy_OI = weight_OI + torch.randn(weight_OI.shape) * weight_OI.std()
        return original(self, checks.step(self, noisy_OI))

    first = checks.solved(case, case.near(BITS))
    monkeypatch.setattr(method_type, "quantize_block", quantize_block)
    with pytest.raises(AssertionError):
        checks.check_deterministic(case.build(case.near(BITS)), first, checks.weight())


def a_scale(packed: Packed) -> str:
    """Name of a stored tensor of floats."""
    return next(name for name, tensor in packed.items() if tensor.is_floating_point())


@pytest.mark.parametrize("which", ["codes", "floats"])
def test_a_tensor_of_another_dtype_shape_or_name_is_seen(case: Case, which: str):
    method, packed = case.build(case.near(BITS)), checks.solved(case, case.near(BITS))
    name = "weight" if which == "codes" else a_scale(packed)
    other = torch.int64 if which == "codes" else torch.float64
    for broken in (
        {**packed, name: packed[name].to(other)},
        {**packed, name: packed[name].repeat_interleave(2, dim=0)},
        {key: t for key, t in packed.items() if key != name},
        {**packed, "extra": packed[name]},
    ):
        with pytest.raises(AssertionError):
            checks.check_layout(method, broken, checks.weight())


def test_scales_cast_on_the_way_are_seen(case: Case):
    """Scales that were cast to bf16 and back have other bits."""
    packed = checks.solved(case, case.near(BITS))
    name = a_scale(packed)
    cast = {**packed, name: packed[name].to(torch.bfloat16).to(packed[name].dtype)}
    with pytest.raises(AssertionError):
        checks.check_same_bits(packed, cast)
