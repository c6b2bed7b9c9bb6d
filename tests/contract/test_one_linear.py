"""The contract of one linear: each case at each width, for weights of fp32 and bf16 models."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from contract import checks
from contract.cases import CASES, CHECKPOINTS, Case, with_bits

from llq_hf.common.errors import LLQError
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import field_types, stored_bits
from llq_hf.methods import METHODS, build, method_type
from llq_hf.numerics import cholesky

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALIBRATED = [case for case in CASES if METHODS[case.method].observes is not None]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_width = pytest.mark.parametrize(("case", "bits"), list(with_bits()), ids=lambda v: str(v))
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def test_every_method_has_rows():
    assert {case.method for case in CASES} == set(METHODS)
    assert {name for name, _, _ in CHECKPOINTS} == set(METHODS)
    for case in CASES:
        assert len(case.frobenius) == len(case.largest) == len(case.all_bits), case


@each_width
@each_dtype
def test_layout_errors_and_linear(case: Case, bits: float, dtype: torch.dtype):
    method, weight_OI = case.build(bits), checks.weight(dtype=dtype)
    packed = checks.solved(case, bits, dtype)
    checks.check_layout(method, packed, weight_OI)
    checks.check_errors(case, bits, weight_OI, checks.restore(method, packed, weight_OI))
    checks.check_linear(method, packed, weight_OI, dtype)


@each_case
@pytest.mark.parametrize("near", [2, 3, 8])
def test_quantize_is_pure_and_deterministic(case: Case, near: int):
    bits = case.near(near)
    method = case.build(bits)
    checks.check_pure(method, checks.weight(), checks.inputs())
    checks.check_deterministic(method, checks.solved(case, bits), checks.weight())


@each_case
def test_more_bits_less_error(case: Case):
    weight_OI, x_TI = checks.weight(), checks.inputs()
    losses = []
    for bits in case.all_bits:
        restored_OI = checks.restore(case.build(bits), checks.solved(case, bits), weight_OI)
        losses.append(checks.proxy_loss(weight_OI - restored_OI, x_TI))
    for bits, (fewer, more) in zip(case.all_bits, pairwise(losses), strict=False):
        # A fixed range clips, so more than 5 bits gain nothing.
        limit = 1.02 if case.clips and bits >= 5 else 0.999
        assert more <= limit * fewer, f"{bits} bits and the next width: {fewer:.4g} -> {more:.4g}"


@pytest.mark.parametrize("case", CALIBRATED, ids=str)
@pytest.mark.parametrize("near", [1, 2, 4, 8])
def test_calibration_beats_rounding_to_nearest_on_the_same_grid(case: Case, near: int, monkeypatch):
    """By proxy loss. The other one is the method's own fallback, which has no factor."""
    bits = case.near(near)
    method, weight_OI, x_TI = case.build(bits), checks.weight(), checks.inputs()
    restored_OI = checks.restore(method, checks.solved(case, bits), weight_OI)
    loss = checks.proxy_loss(weight_OI - restored_OI, x_TI)
    if not case.feedback:
        pytest.skip("no feedback: there is nothing to fall back from")
    monkeypatch.setattr(cholesky, "factorize", lambda *args, **options: None)
    # A range that clips (2.4 sigma at many bits) costs both the same, and rounding costs nearly
    # nothing, so they tie but for noise.
    tie = 1.02 if case.clips and bits > 4 else 1.0
    assert loss <= checks.loss_of(method, weight_OI, x_TI) * tie


@pytest.mark.parametrize("name", METHODS)
def test_preset_best_costs_no_bits_and_is_no_worse_at_2_bits(name: str):
    # At 2 bits the presets matter. One problem at 4 bits cannot judge a method without data.
    bits = min(METHODS[name].bits_range, key=lambda own: abs(own - 2))
    weight_OI, x_TI = checks.weight(), checks.inputs()
    study, best = build(name, bits=bits), build(name, "best", bits=bits)
    shape = tuple(weight_OI.shape)
    assert stored_bits(best.layout(*shape), *shape) <= stored_bits(study.layout(*shape), *shape)
    assert checks.loss_of(best, weight_OI, x_TI) <= checks.loss_of(study, weight_OI, x_TI)


# --- awkward inputs -------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("near", [2, 8])
def test_zero_row_and_zero_column(case: Case, near: int):
    bits = case.near(near)
    method, weight_OI = case.build(bits), checks.weight().clone()
    weight_OI[3], weight_OI[:, 5] = 0, 0
    restored_OI = checks.restore(method, checks.quantize(method, weight_OI), weight_OI)
    checks.check_errors(case, bits, weight_OI, restored_OI, slack=1.3)
    if case.rows_apart and case.all_bits[0] < bits:
        assert not restored_OI[3].any(), "a row of zeros has a grid with a zero"


@each_case
@pytest.mark.parametrize("near", [2, 8])
def test_dead_channels_are_finite_and_leave_the_others_alone(case: Case, near: int):
    """Channels that never fired break no factorization, and add no error to the others."""
    bits = case.near(near)
    method, weight_OI, x_TI = case.build(bits), checks.weight(), checks.inputs().clone()
    x_TI[:, [0, 7, 171]] = 0
    packed = checks.quantize(method, weight_OI, x_TI)
    restored_OI = checks.restore(method, packed, weight_OI)
    assert torch.isfinite(restored_OI).all()
    alive_I = x_TI.any(0)
    frobenius, _ = checks.relative_errors(weight_OI[:, alive_I], restored_OI[:, alive_I])
    assert frobenius <= 1.3 * case.ceilings(bits)[0]
    if case not in CALIBRATED or not case.compensates:
        return
    share = checks.proxy_loss(weight_OI - restored_OI, x_TI) / checks.proxy_loss(weight_OI, x_TI)
    rtn = build("rtn", bits=int(bits))
    assert share <= max(
        checks.loss_of(rtn, weight_OI, x_TI) / checks.proxy_loss(weight_OI, x_TI), case.clip_share
    )


@each_case
@pytest.mark.parametrize("near", [2, 8])
def test_no_calibration_signal_at_all(case: Case, near: int):
    """With all inputs zero, the result is finite and as good as rounding to nearest."""
    bits = case.near(near)
    method, weight_OI = case.build(bits), checks.weight()
    restored_OI = checks.restore(
        method, checks.quantize(method, weight_OI, torch.zeros(64, checks.IN)), weight_OI
    )
    assert torch.isfinite(restored_OI).all()


@each_case
@pytest.mark.parametrize("near", [2, 8])
def test_one_outlier_of_1e3(case: Case, near: int):
    bits = case.near(near)
    method, weight_OI = case.build(bits), checks.weight().clone()
    weight_OI[2, 9] = 1e3
    restored_OI = checks.restore(method, checks.quantize(method, weight_OI), weight_OI)
    assert torch.isfinite(restored_OI).all()
    if case.rows_apart:
        others = [row for row in range(len(weight_OI)) if row != 2]
        checks.check_errors(case, bits, weight_OI[others], restored_OI[others], slack=1.1)
    # one range for the whole matrix: all that can be asked is an error below the outlier itself
    else:
        assert checks.relative_errors(weight_OI, restored_OI)[0] <= 1.0


SHAPES = [(7, 45), (24, 100), (5, 129), (48, 160), (3, 257), (1, 64)]


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
def test_odd_shapes_and_groups_that_do_not_divide(case: Case, shape: tuple[int, int]):
    bits = case.near(4)
    method, weight_OI = case.build(bits), checks.weight(*shape)
    packed = checks.quantize(method, weight_OI)
    checks.check_layout(method, packed, weight_OI)
    restored_OI = checks.restore(method, packed, weight_OI)
    assert torch.isfinite(restored_OI).all()
    assert checks.relative_errors(weight_OI, restored_OI)[0] <= 2 * case.ceilings(bits)[0]
    checks.check_linear(method, packed, weight_OI, torch.float32)


@each_case
def test_an_empty_batch_passes_through(case: Case):
    method, weight_OI = case.build(case.near(4)), checks.weight()
    packed = checks.quantize(method, weight_OI)
    assert method.linear(torch.zeros(0, checks.IN), packed, None, checks.OUT).shape == (
        0,
        checks.OUT,
    )


@each_case
def test_gradients_flow_to_the_input(case: Case):
    checks.check_gradient(
        case.build(case.near(4)), checks.solved(case, case.near(4)), checks.weight()
    )


@each_case
def test_training_after_inference_mode(case: Case):
    """What a method caches between calls (rotations, tables) works in both modes."""
    method, weight_OI = case.build(case.near(4)), checks.weight()
    packed = checks.quantize(method, weight_OI)
    forget_caches()
    with torch.inference_mode():
        method.linear(checks.inputs()[:2], packed, None, checks.OUT)
    try:
        checks.check_gradient(method, packed, weight_OI)
    finally:
        forget_caches()


def forget_caches() -> None:
    from llq_hf.numerics.rotations import _hadamard, rotation

    rotation.cache_clear()
    _hadamard.cache_clear()


@each_case
def test_a_single_vector_is_an_input(case: Case):
    method = case.build(case.near(4))
    packed = checks.solved(case, case.near(4))
    x_TI = checks.inputs()
    y = method.linear(x_TI[0], packed, None, checks.OUT)
    assert torch.allclose(
        y, method.linear(x_TI[:1], packed, None, checks.OUT)[0], rtol=1e-5, atol=1e-5
    )


# --- QuantLinear ----------------------------------------------------------------------------------


@each_case
def test_casting_a_module_keeps_what_is_stored(case: Case):
    method, linear = case.build(case.near(3)), torch.nn.Linear(checks.IN, checks.OUT)
    packed = checks.quantize(method, checks.weight())
    module = QuantLinear.from_packed(
        method, linear, {name: t.clone() for name, t in packed.items()}
    )
    assert not module.weight.requires_grad
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
    ):
        cast(module)
        checks.check_same_bits(packed, module.packed())
    x = checks.inputs()[:4]
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(module(x), method.linear(x, packed, module.bias, checks.OUT))


def test_a_layout_in_the_dense_shape_is_refused():
    with pytest.raises(LLQError, match="dense weight"):  # 8 columns of 8 bits take 8 words
        QuantLinear(build("rtn", bits=8), 8, 16, bias=False)


# --- config ---------------------------------------------------------------------------------------


@each_width
def test_config_round_trip_through_json(case: Case, bits: float):
    method = case.build(bits)
    again = method_type(case.method).build(**json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert hash(again) == hash(method)


@each_case
def test_fields_are_checked(case: Case):
    with pytest.raises(LLQError, match="did you mean 'bits'"):
        build(case.method, bit=4)
    name, last = METHODS[case.method].field_names()[-1], METHODS[case.method].bits_range[-1]
    with pytest.raises(LLQError, match=rf"did you mean '{name}'"):
        build(case.method, **{name + "s": 1})
    kind = field_types(METHODS[case.method])["bits"]
    for wrong in ("4", True, None, [4], *([4.0] if kind is int else [])):
        with pytest.raises(LLQError, match=f"should be of type {kind.__name__}"):
            build(case.method, bits=wrong)
    for outside in (0, -1, int(last) + 1):
        with pytest.raises(LLQError, match=str(outside)):
            build(case.method, bits=outside)
    with pytest.raises(LLQError, match="preset='worst'"):
        build(case.method, "worst")


@pytest.mark.parametrize("name", METHODS)
def test_every_float_field_refuses_what_is_not_a_number(name: str):
    for option, kind in field_types(METHODS[name]).items():
        if kind is float:
            for value in (float("nan"), float("inf"), -float("inf")):
                with pytest.raises(LLQError, match=option):
                    build(name, **{option: value})


def test_unknown_method_names_the_nearest():
    with pytest.raises(LLQError, match="did you mean 'gptq'"):
        build("gtpq")


def test_a_method_is_frozen():
    from dataclasses import FrozenInstanceError

    with pytest.raises(FrozenInstanceError):
        build("rtn").bits = 3  # type: ignore[misc]
