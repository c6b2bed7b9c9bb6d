"""SmoothQuant: smoothing and the product of tokens and weights equal literal loops; integers equal
floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import checks
from reference.smoothquant import on_grid, product, smoothing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llq_hf.common.errors import LLQError
from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels import reference
from llq_hf.kernels.bitpack import unpack
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Method, Packed, Step, stored_bits
from llq_hf.methods import build, smoothquant
from llq_hf.numerics.grids import Uniform
from llq_hf.numerics.stats import AbsMax

TOKENS = 20
WIDTHS = [(8, 8), (6, 6), (4, 4), (4, 8), (8, 3)]
each_width = pytest.mark.parametrize(
    ("bits", "a_bits"), WIDTHS, ids=[f"W{w}A{a}" for w, a in WIDTHS]
)


def tokens(in_features: int = 40) -> Tensor:
    return checks.inputs(in_features)[:TOKENS]


def several(method: Method, weights: list[Tensor], x_TI: Tensor) -> tuple[list[Packed], Step]:
    """What linears of these weights become that all read the same tokens."""
    block = nn.ModuleDict()
    for i, weight_OI in enumerate(weights):
        linear = nn.Linear(weight_OI.shape[1], len(weight_OI), bias=False)
        linear.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)
        block[f"linear{i}"] = linear
    stat = AbsMax(x_TI.shape[1], x_TI.device)
    stat.update(x_TI, 1)
    linears = {name: linear for name, linear in block.items() if isinstance(linear, nn.Linear)}
    step = Step("model.layers.0", block, linears, dict.fromkeys(linears, stat), [list(linears)])
    with torch.no_grad():
        return list(method.quantize_block(step).values()), step


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothing_and_codes_equal_the_literal_loops(bits: int, alpha: float):
    x_TI, weights = tokens().clone(), [checks.weight(6, 40), checks.weight(9, 40) * 3]
    x_TI[:, 11] = 0
    found, step = several(
        build("smoothquant", bits=bits, alpha=alpha, scale_bits=32), weights, x_TI
    )
    s = smoothing(x_TI.double().numpy(), [w.double().numpy() for w in weights], alpha)
    for packed, weight_OI, job in zip(found, weights, step.jobs.values(), strict=True):
        assert np.allclose(packed["in_scale"].numpy(), s, rtol=1e-5)
        assert packed["in_scale"][11] == 1
        assert job.notes["smoothed"]
        codes = unpack(packed["weight"], bits, 40).numpy().astype(int) - 2 ** (bits - 1)
        for row, scale, own in zip(
            weight_OI.double().numpy() * s, packed["scale"].flatten(), codes, strict=True
        ):
            literal, step_size = on_grid(row, bits)
            assert scale.item() == pytest.approx(step_size, rel=1e-5)
            assert np.abs(own).max() == 2 ** (bits - 1) - 1, (
                "the largest weight of a row is a code; -2**(b-1) is none"
            )
            assert (own != literal).sum() <= 1, "a tie may round differently in fp32"


@each_width
@pytest.mark.parametrize("integers", [True, False], ids=["int8", "float"])
def test_the_product_equals_the_literal_loops(bits: int, a_bits: int, integers: bool, monkeypatch):
    monkeypatch.setattr(smoothquant, "_cpu_has_int8", lambda: integers)
    method = build("smoothquant", bits=bits, a_bits=a_bits)
    x_TI = tokens()
    weights = [checks.weight(6, 40)] * 2
    packed = several(method, weights, x_TI)[0][0]
    s = packed["in_scale"].double().numpy()
    # The stored rows, so that only the product is compared; their largest value is a code, so the
    # grids agree.
    rows = checks.restore(method, packed, weights[0]).double().numpy()
    expected = torch.from_numpy(product(x_TI.double().numpy(), rows, s, bits, a_bits))
    y_TO = method.linear(x_TI, packed, None, 6)
    off = (y_TO.double() - expected).abs() > 1e-4 * expected.abs().max()
    assert off.any(1).double().mean() <= 0.1, "a tie in a token may round differently in fp32"
    assert (y_TO.double() - x_TI.double() @ torch.from_numpy(rows).T).norm() > 1e-4 * y_TO.norm(), (
        "it is quantized"
    )


@each_width
@pytest.mark.parametrize("shape", [(40,), (0, 40), (3, 40), (2, 5, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integers_equal_floats(
    bits: int, a_bits: int, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch
):
    method = build("smoothquant", bits=bits, a_bits=a_bits)
    packed = several(method, [checks.weight(6, 40)] * 2, tokens())[0][0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(6, generator=torch.Generator().manual_seed(2)).to(dtype)
    called = []
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: called.append(1) or original(a, b))
    outputs = []
    for integers in (True, False):
        monkeypatch.setattr(smoothquant, "_cpu_has_int8", lambda integers=integers: integers)
        with reference():  # kernels of our own have their tests
            outputs += [method.linear(x, packed, b, 6) for b in (None, bias)]
    assert len(called) == 2
    assert all(y.dtype == dtype and y.shape == (*shape[:-1], 6) for y in outputs)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    for mine, other in zip(outputs[:2], outputs[2:], strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


def test_gradients_pass_through_the_rounding():
    """As those of the dequantized weight, but for what rounding a token's largest value does to its
    step.
    """
    for bits, tolerance in ((8, 0.02), (4, 0.3)):
        method = build("smoothquant", bits=bits)
        weight_OI, x = checks.weight(6, 40), tokens().clone().requires_grad_()
        packed = several(method, [weight_OI] * 2, tokens())[0][0]
        y = method.linear(x, packed, None, 6)
        with torch.no_grad():
            assert torch.allclose(y, method.linear(x, packed, None, 6), rtol=1e-4, atol=1e-4), (
                "the same in training"
            )
        y.sum().backward()
        assert x.grad is not None
        expected = checks.restore(method, packed, weight_OI).sum(0).expand_as(x)
        assert 0 < (x.grad - expected).norm() <= tolerance * expected.norm()


def test_activations_off():
    method, weight_OI = build("smoothquant", bits=4, a_bits=16), checks.weight(6, 40)
    packed = several(method, [weight_OI] * 2, tokens())[0][0]
    expected = F.linear(tokens(), checks.restore(method, packed, weight_OI))
    assert torch.allclose(method.linear(tokens(), packed, None, 6), expected, atol=1e-5)
    assert build("smoothquant", bits=4).tokens == build("smoothquant", bits=4, a_bits=4).tokens


def test_nine_bits_of_activations_are_no_integers(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", None)
    packed = several(build("smoothquant"), [checks.weight(6, 40)] * 2, tokens())[0][0]
    fine = build("smoothquant", a_bits=12).linear(tokens(), packed, None, 6)
    exact = build("smoothquant", a_bits=16).linear(tokens(), packed, None, 6)
    assert 0 < (fine - exact).norm() < 2e-3 * exact.norm()


# --- a whole model --------------------------------------------------------------------------------


def quantized(
    folder: Path, ids: Tensor, **options: Any
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, {
        r["name"]: r for r in quantize_model(model, build("smoothquant", **options), ids)
    }


def test_what_norms_feed_is_smoothed_by_the_full_precision_activations(
    tiny_llama: Path, calibration_ids: Tensor
):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    largest: dict[str, Tensor] = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, args, name=name: largest.update(
                    {name: args[0].abs().flatten(0, 1).amax(0)}
                )
            )
    with torch.no_grad():
        dense(calibration_ids)
    model, records = quantized(tiny_llama, calibration_ids, bits=4)
    for block in ("model.layers.0.", "model.layers.1."):
        for group in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            weights = [dense.get_submodule(block + name).weight.detach().numpy() for name in group]
            s = smoothing(largest[block + group[0]][None].numpy(), weights, 0.85)
            for name in group:
                found = model.get_submodule(block + name).packed()["in_scale"].numpy()
                assert np.allclose(found, s, rtol=2e-3), name
                assert records[block + name]["smoothed"]
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert (model.get_submodule(block + name).packed()["in_scale"] == 1).all()
            assert not records[block + name]["smoothed"]


@pytest.mark.parametrize("on", [True, False])
def test_outputs_of_q_k_and_v_are_quantized(
    on: bool, tiny_llama: Path, calibration_ids: Tensor, tmp_path: Path
):
    """Per token over the whole width: at 4 bits no more than 15 values. Also after loading."""
    model, records = quantized(tiny_llama, calibration_ids, bits=4, quantize_bmm_input=on)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(
                lambda m, args, out, name=name: outputs.update({name: out.flatten(0, 1)})
            )
    with torch.no_grad():
        model(calibration_ids)
    for name, y_TO in outputs.items():
        quantized_output = on and name.endswith(("q_proj", "k_proj", "v_proj"))
        assert records[name]["bmm_input"] is quantized_output
        distinct = max(len(row.unique()) for row in y_TO)
        assert (distinct <= 15) is quantized_output, name


def test_for_linear_serves_q_k_and_v_with_the_same_options_and_layout():
    method = build("smoothquant", bits=6, alpha=0.5)
    own = method.for_linear("model.layers.3.self_attn.k_proj")
    assert own is not method
    assert own.to_dict() == method.to_dict()
    assert own.layout(8, 40) == method.layout(8, 40)
    assert own == method.for_linear("model.layers.0.self_attn.q_proj")
    assert own != method
    assert method.for_linear("model.layers.3.self_attn.o_proj") is method
    assert build("smoothquant", quantize_bmm_input=False).for_linear(
        "model.layers.3.self_attn.k_proj"
    ).linear.__func__ is (type(method).linear)


# --- storage and options --------------------------------------------------------------------------


def test_codes_are_dense_at_every_width():
    for bits in (8, 6, 4):
        stored = stored_bits(build("smoothquant", bits=bits).layout(4096, 4096), 4096, 4096)
        assert stored == pytest.approx(bits + 32 / 4096)
    assert "in_scale" not in build("smoothquant", smooth=False).layout(8, 40)
    assert build("smoothquant", scale_bits=32).layout(8, 40)["in_scale"].dtype == torch.float32


def test_best_searches_the_range_of_each_row():
    packed = several(
        build("smoothquant", "best", bits=4, smooth=False), [checks.weight(6, 40)], tokens()
    )[0][0]
    rtn = checks.quantize(
        build("rtn", bits=4, group_size=-1, sym=True, search_range=True), checks.weight(6, 40)
    )
    checks.check_same_bits(packed, rtn)
    assert build("smoothquant", "best", bits=4).grid == Uniform(4, sym=True, search=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"a_bits": 1}, "bits=1"),
        ({"a_bits": 17}, "bits=17"),
        ({"bits": 1}, "bits=1"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], says: str):
    with pytest.raises(LLQError, match=says):
        build("smoothquant", **options)
