"""torch.compile: every method runs in one graph, from a linear to `generate`, with the results of
the plain model.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import checks
from contract.cases import CASES, CHECKPOINTS, Case
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.kernels import CachedTensors, UniformCodes, cached_tensors, dispatch, reference
from llq_hf.kernels import build as building
from llq_hf.kernels.cached import _CACHE
from llq_hf.kernels.rows import ALL, MANY, Row
from llq_hf.layers import ops
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import METHODS, build
from llq_hf.numerics.activations import Attention, TokenQuant

PROMPT, TOKENS = 5, 4

each_method = pytest.mark.parametrize(
    "case",
    [next(case for case in CASES if case.method == name) for name in METHODS],
    ids=list(METHODS),
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests, and none left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def load(tiny_llama: Path, calibration_npy: Path, tmp_path: Path) -> Callable[..., Any]:
    """load(method, options): the tiny Llama, quantized to a folder and loaded from it."""

    def make(name: str, **options: Any) -> Any:
        calibration = Calibration(str(calibration_npy), samples=8)
        quantize_checkpoint(
            str(tiny_llama), tmp_path / "packed", build(name, **options), calibration
        )
        return AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()

    return make


def linear_of(case: Case, bias: bool = True) -> QuantLinear:
    """The packed linear [48, 172] of a case."""
    bits = case.near(4)
    dense = nn.Linear(checks.IN, checks.OUT, bias=bias)
    return QuantLinear.from_packed(case.build(bits), dense, dict(checks.solved(case, bits)))


def tensors_of(linear: QuantLinear) -> list[Tensor]:
    return [getattr(linear, name) for name in linear.layout]


def arguments(linear: QuantLinear) -> tuple[Any, ...]:
    """What a graph calls the operator with, after x."""
    names = ",".join(linear.layout)
    return tensors_of(linear), names, linear.bias, ops.register(linear.method), linear.out_features


def whole(model: Any, backend: str = "aot_eager") -> Any:
    """Compiled into one graph, or an error."""
    return torch.compile(model, fullgraph=True, backend=backend)


# --- one linear -----------------------------------------------------------------------------------


@each_method
def test_a_linear_gives_the_same_bits(case: Case):
    """With one token and with many, which are served by different kernels."""
    linear = linear_of(case).bfloat16()
    compiled = whole(linear)
    with torch.inference_mode():
        for tokens in (1, 40):
            x = checks.inputs()[:tokens].bfloat16()
            assert torch.equal(compiled(x), linear(x))


@each_method
def test_gradients_are_those_outside_graphs(case: Case):
    linear = linear_of(case)
    linear.bias.requires_grad_()

    def gradients(module: Any) -> tuple[Tensor, ...]:
        x = checks.inputs()[:3].clone().requires_grad_()
        return torch.autograd.grad(module(x).square().sum(), (x, linear.bias))

    for found, expected in zip(gradients(whole(linear)), gradients(linear), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@each_method
def test_the_host_reads_no_values(case: Case):
    """From the second call on, Python reads no tensor: on a GPU each read waits for the device,
    and a CUDA graph cannot hold one. Fake tensors, which have no values, would raise.
    """
    linear, x = linear_of(case), checks.inputs()[:2]
    packed = cached_tensors(linear.layout, tensors_of(linear))
    with reference(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            expected = linear(x)
        fake = CachedTensors({name: mode.from_tensor(tensor) for name, tensor in packed.items()})
        fake.computed = packed.computed
        y = linear.method.linear(mode.from_tensor(x), fake, linear.bias, linear.out_features)
    assert y.shape == expected.shape


def test_the_operators_are_what_they_say():
    linear = linear_of(CASES[0])
    x = checks.inputs()[:3]
    torch.library.opcheck(torch.ops.llq.linear.default, (x, *arguments(linear)))
    torch.library.opcheck(
        torch.ops.llq.trained.default, (x.clone().requires_grad_(), *arguments(linear))
    )


def test_derivatives_in_graphs_are_torchs_own(monkeypatch: pytest.MonkeyPatch):
    """torch.func goes through no autograd.Function of other libraries, so no kernel may serve."""
    linear, x = linear_of(CASES[0]), checks.inputs()[:3]

    def failing(x: Tensor, stored: UniformCodes, bias: Tensor | None) -> Tensor:
        pytest.fail("a kernel was asked for a derivative")

    row = Row(UniformCodes, "cpu", MANY, ALL, lambda: True, lambda view: True, failing, True)
    monkeypatch.setattr(dispatch, "TABLE", (row,))
    stored, names, _, method, out_features = arguments(linear)
    y_gradient = torch.ones(3, out_features)
    found = torch.ops.llq.gradient(y_gradient, x, stored, names, method, out_features)
    assert torch.allclose(found, y_gradient @ linear.dequantized(), rtol=1e-5, atol=1e-5)


def test_computed_values_are_found_in_a_graph_and_end_with_the_linear():
    gc.collect()
    linear, x, before = linear_of(CASES[0]), checks.inputs()[:1], len(_CACHE)
    linear(x)
    kept = cached_tensors(linear.layout, tensors_of(linear))
    made = dict(kept.computed)
    whole(linear)(x)
    assert len(_CACHE) == before + 1
    assert all(kept.computed[name] is made[name] for name in made)
    torch._dynamo.reset()
    del linear
    gc.collect()
    assert len(_CACHE) == before


def test_a_linear_sent_to_another_process_compiles_there(monkeypatch: pytest.MonkeyPatch):
    linear, x = linear_of(CASES[0]), checks.inputs()[:1]
    sent = pickle.dumps(linear)
    monkeypatch.setattr(ops, "_METHODS", {})
    assert torch.equal(whole(pickle.loads(sent))(x), linear(x))


def test_rotated_and_quantized_keys():
    """Hadamards whose size is no power of two are made with numpy, which no graph can hold."""
    quant = TokenQuant(4, sym=False)
    attention = Attention(key=quant, value=quant, joint_key=True, hadamard=True)
    q, k, v = torch.randn(3, 1, 2, 3, 96, generator=torch.Generator().manual_seed(0))
    found, expected = whole(attention.transform)(q, k, v), attention.transform(q, k, v)
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in zip(found, expected, strict=True))


@pytest.mark.skipif(building.compiler() is None, reason="inductor needs a C++ compiler, too")
def test_inductor():
    linear = linear_of(CASES[0])
    model = nn.Sequential(linear, nn.SiLU())
    with torch.inference_mode():
        x = checks.inputs()[:1]
        assert torch.allclose(whole(model, "inductor")(x), model(x), rtol=1e-5, atol=1e-6)


# --- whole models ---------------------------------------------------------------------------------


def decode(model: Any, step: Any, ids_BS: Tensor) -> Tensor:
    """Logits [B, S - PROMPT, vocabulary] of `step`, one token at a time, after a prompt that the
    model itself has read.
    """
    cache, logits = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS), []
    model(ids_BS[:, :PROMPT], past_key_values=cache)
    for i in range(PROMPT, ids_BS.shape[1]):
        with torch.compiler.set_stance("fail_on_recompile" if logits else "default"):
            logits.append(step(ids_BS[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [next(row for row in CHECKPOINTS if row[0] == name) for name in METHODS],
    ids=METHODS,
)
def test_decoding_is_one_graph_for_all_tokens(
    load: Any, calibration_ids: Tensor, name: str, bits: float, options: Any
):
    model, ids_BS = load(name, bits=bits, **options), calibration_ids[:2, : PROMPT + TOKENS]
    with torch.no_grad():
        expected = decode(model, model, ids_BS)
        found = decode(model, whole(model), ids_BS)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_with_a_static_cache(load: Any, calibration_ids: Tensor):
    """The same tokens as with a growing cache, also compiled, as `generate` compiles by itself on
    a GPU. The method brings attention of its own.
    """
    model = load("spinquant", a_bits=8, kv_bits=4)
    everywhere = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    everywhere._compile_all_devices = True
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    expected = model.generate(calibration_ids[:2, :PROMPT], **asked)
    for compiled in ({}, {"compile_config": everywhere}):
        found = model.generate(
            calibration_ids[:2, :PROMPT], cache_implementation="static", **asked, **compiled
        )
        assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1
