"""Checks of the promises that every method makes about one linear: functions that raise
AssertionError. The fault tests call them too.

Legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from contract.cases import Case
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf.layers.linear import checked_layout
from llq_hf.method import Job, Method, Packed, Step
from llq_hf.numerics.stats import Stat

OUT, IN, TOKENS, SEQUENCES = 48, 172, 512, 4


# Cached tensors serve all tests of a process, also those that train: none may be an inference
# tensor because the first test that asked for it ran in inference mode.


@cache
@torch.inference_mode(False)
def inputs(in_features: int = IN, seed: int = 7) -> Tensor:
    """Activations [T, I] like those of models: correlated, with one massive channel."""
    random = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(in_features, in_features, generator=random))
    spectrum = 1 / (1 + torch.arange(in_features) / 8)
    x_TI = (torch.randn(TOKENS, in_features, generator=random) * spectrum) @ basis.T
    x_TI[:, in_features // 3] *= 30
    return x_TI


@cache
@torch.inference_mode(False)
def weight(
    out_features: int = OUT, in_features: int = IN, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gaussian weights as a model of `dtype` holds them, in fp32."""
    random = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight_OI = torch.randn(out_features, in_features, generator=random) * in_features**-0.5
    return weight_OI.to(dtype).float()


class OneLinear(nn.Module):
    """A decoder block that is a single linear."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.test = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        self.test.weight = nn.Parameter(weight_OI, requires_grad=False)

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        return self.test(hidden)


@dataclass
class Data:
    """The test problem as calibration data of that block.

    The activations of the full-precision model are the same.
    """

    x_NSI: Tensor
    weight_OI: Tensor

    @property
    def count(self) -> int:
        return self.x_NSI.shape[0]

    @property
    def length(self) -> int:
        return self.x_NSI.shape[1]

    def batches(self) -> list[slice]:
        return [slice(i, i + 2) for i in range(0, self.count, 2)]

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, object]]:
        return self.x_NSI[rows], {}

    def targets(self, rows: slice) -> Tensor:
        return self.x_NSI[rows] @ self.weight_OI.T


def job() -> Job:
    return Job("model.layers.0.test")


def statistic(method: Method, x_TI: Tensor) -> Stat | None:
    kind = method.for_linear(job().name).observes
    if kind is None:
        return None
    stat = kind(x_TI.shape[1], x_TI.device)
    for part in x_TI.chunk(SEQUENCES):
        stat.update(part, 1)
        if stat.paired:
            stat.pair(part, part)
    stat.check("the test problem")
    return stat


def step(method: Method, weight_OI: Tensor, x_TI: Tensor | None = None) -> Step:
    """The step that a walk would give for a block of one linear called "test"."""
    x_TI = inputs(weight_OI.shape[1]) if x_TI is None else x_TI
    block, stat = OneLinear(weight_OI), statistic(method, x_TI)
    x_NSI = x_TI.view(SEQUENCES, -1, x_TI.shape[1])
    data = Data(x_NSI, weight_OI) if method.calibrated else None
    stats = {} if stat is None else {"test": stat}
    return Step("model.layers.0", block, {"test": block.test}, stats, [["test"]], data)


def quantize(method: Method, weight_OI: Tensor, x_TI: Tensor | None = None) -> Packed:
    with torch.no_grad():
        return method.quantize_block(step(method, weight_OI, x_TI))["test"]


@cache
@torch.inference_mode(False)
def solved(case: Case, bits: float, dtype: torch.dtype = torch.float32) -> Packed:
    """The packed tensors of a case on the test problem, computed once for all tests.

    Tests must not change them.
    """
    return quantize(case.build(bits), weight(dtype=dtype))


def restore(method: Method, packed: Packed, weight_OI: Tensor) -> Tensor:
    return method.dequantize(packed, *weight_OI.shape)


def proxy_loss(error_OI: Tensor, x_TI: Tensor) -> float:
    """tr(dW H dW^T) in fp64, up to the constant of H."""
    return float((x_TI.double() @ error_OI.double().T).square().sum())


def loss_of(method: Method, weight_OI: Tensor, x_TI: Tensor) -> float:
    restored_OI = restore(method, quantize(method, weight_OI, x_TI), weight_OI)
    return proxy_loss(weight_OI - restored_OI, x_TI)


# --- checks ---------------------------------------------------------------------------------------


def check_layout(method: Method, packed: Packed, weight_OI: Tensor) -> None:
    """Names, shapes, dtypes are those of `layout`; codes are int32 and not in the dense shape."""
    layout = checked_layout(method, *weight_OI.shape)
    assert set(packed) == set(layout)
    for name, spec in layout.items():
        assert tuple(packed[name].shape) == spec.shape, name
        assert packed[name].dtype == spec.dtype, name
        assert packed[name].is_contiguous(), name
    assert packed["weight"].dtype == torch.int32
    assert packed["weight"].shape != weight_OI.shape


def check_same_bits(first: Packed, second: Packed) -> None:
    assert set(first) == set(second)
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def relative_errors(weight_OI: Tensor, restored_OI: Tensor) -> tuple[float, float]:
    """(|dW| / |W|, max|dW| / rms W). Both show errors that a cosine hides."""
    error_OI = (weight_OI - restored_OI).double()
    rms = weight_OI.double().square().mean().sqrt()
    return float(error_OI.square().mean().sqrt() / rms), float(error_OI.abs().max() / rms)


def check_errors(
    case: Case, bits: float, weight_OI: Tensor, restored_OI: Tensor, slack: float = 1.0
) -> None:
    assert restored_OI.dtype == torch.float32
    assert restored_OI.shape == weight_OI.shape
    assert torch.isfinite(restored_OI).all()
    frobenius, largest = relative_errors(weight_OI, restored_OI)
    most_frobenius, most_largest = case.ceilings(bits)
    assert frobenius <= most_frobenius * slack, f"|dW|/|W| = {frobenius:.4g}"
    assert largest <= most_largest * slack, f"max|dW|/rms W = {largest:.4g}"


def check_linear(method: Method, packed: Packed, weight_OI: Tensor, dtype: torch.dtype) -> None:
    """`linear` is F.linear with the dequantized weight, but for rounding of `dtype`."""
    restored_OI = restore(method, packed, weight_OI)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(len(weight_OI), generator=random).to(dtype)
    for shape in ((5, weight_OI.shape[1]), (2, 3, weight_OI.shape[1])):
        x = torch.randn(shape, generator=random).to(dtype)
        for b in (None, bias):
            y = method.linear(x, packed, b, len(weight_OI))
            expected = F.linear(x.double(), restored_OI.double(), None if b is None else b.double())
            assert y.dtype == dtype
            assert y.shape == expected.shape
            off = (y.double() - expected).norm()
            if expected.any():
                assert off <= tolerance * expected.norm()
            else:  # one bit rounded the whole weight to nothing: terms that cancel are of fp32
                assert off <= 1e-6 * F.linear(x.double(), weight_OI.double()).norm()


def check_gradient(method: Method, packed: Packed, weight_OI: Tensor) -> None:
    """The input's gradient, by which adapters are trained, is that of the dequantized weight."""
    random = torch.Generator().manual_seed(4)
    x = torch.randn(5, weight_OI.shape[1], generator=random).requires_grad_()
    y = method.linear(x, packed, None, len(weight_OI))
    y.square().sum().backward()
    restored_OI = restore(method, packed, weight_OI).double()
    expected = 2 * (x.detach().double() @ restored_OI.T) @ restored_OI
    assert x.grad is not None
    assert (x.grad.double() - expected).norm() <= 1e-5 * expected.norm()


def check_pure(method: Method, weight_OI: Tensor, x_TI: Tensor) -> None:
    """Quantizing changes neither the weight, nor the statistic (q, k and v share one), nor the
    inputs.
    """
    given = step(method, weight_OI.clone(), x_TI.clone())
    stat = given.stats.get("test")
    tensors = vars(stat) if stat else {}
    before = {name: t.clone() for name, t in tensors.items() if isinstance(t, Tensor)}
    with torch.no_grad():
        method.quantize_block(given)
    assert torch.equal(given.linears["test"].weight, weight_OI)
    for name, tensor in before.items():
        assert torch.equal(getattr(stat, name), tensor), name
    if given.data is not None:
        assert torch.equal(given.data.inputs(slice(None))[0].flatten(0, 1), x_TI)


def check_deterministic(method: Method, first: Packed, weight_OI: Tensor) -> None:
    """Quantizing again gives the bits of `first`, whatever the state of the global generator."""
    torch.manual_seed(1)
    check_same_bits(first, quantize(type(method).build(**method.to_dict()), weight_OI))
