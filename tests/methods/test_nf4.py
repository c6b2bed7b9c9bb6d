"""NF4 equals its literal loops; the published levels, stored shifts, blocks that cross rows, the
layout that kernels read.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from contract import checks
from reference.nf4 import codebook, dynamic_map, entropy, nf4

from llq_hf.common.errors import LLQError
from llq_hf.kernels import bitsandbytes_rows, dispatch
from llq_hf.method import Packed, stored_bits
from llq_hf.methods import build
from llq_hf.methods import nf4 as module
from llq_hf.methods.nf4 import NF4, dynamic_levels, levels


def codes_of(method: NF4, packed: Packed, weights: int) -> list[int]:
    return method._unpack_codes(packed["weight"], weights).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_quantiles(bits: int):
    assert torch.allclose(levels(bits)[0], torch.tensor(codebook(bits)), rtol=0, atol=3e-7)
    assert float(levels(bits)[0].abs().min()) == 0
    assert torch.allclose(dynamic_levels()[0], torch.tensor(dynamic_map()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("double_quant", [True, False], ids=["scales in 8 bits", "fp32 scales"])
@pytest.mark.parametrize("shape", [(8, 64), (5, 45), (30, 160)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_equals_the_literal_loops(bits: int, double_quant: bool, shape: tuple[int, int]):
    weight_OI = checks.weight(*shape)
    method = build("nf4", bits=bits, double_quant=double_quant, block_size=16)
    packed = checks.quantize(method, weight_OI)
    codes, restored = nf4(weight_OI.flatten().tolist(), bits, 16, double_quant)
    assert codes_of(method, packed, weight_OI.numel()) == codes
    assert torch.allclose(
        checks.restore(method, packed, weight_OI).flatten(),
        torch.tensor(restored),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(4, 64), (5, 45)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_information_calibration_equals_the_literal_search(bits: int, shape: tuple[int, int]):
    weight_OI = checks.weight(*shape)
    method = build("nf4", bits=bits, icq=True, nearest_shift=True, tau_steps=6)
    packed = checks.quantize(method, weight_OI)
    codes, restored = nf4(weight_OI.flatten().tolist(), bits, shift=(0.1, 6))
    assert codes_of(method, packed, weight_OI.numel()) == codes
    assert torch.allclose(
        checks.restore(method, packed, weight_OI).flatten(),
        torch.tensor(restored),
        rtol=1e-5,
        atol=1e-7,
    )


def test_calibrated_codes_carry_more_information():
    weight_OI = checks.weight(16, 256)
    plain, calibrated = (
        codes_of(method, checks.quantize(method, weight_OI), weight_OI.numel())
        for method in (build("nf4"), build("nf4", icq=True))
    )
    bits = [
        sum(entropy(codes[i : i + 64]) for i in range(0, len(codes), 64)) / 64
        for codes in (plain, calibrated)
    ]
    assert bits[1] > bits[0] + 0.02


def test_the_search_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch):
    weight_OI, method = checks.weight(16, 256), build("nf4", icq=True, tau_steps=5)
    whole = checks.quantize(method, weight_OI)
    monkeypatch.setattr(module, "CHUNK", 3 * 64)
    checks.check_same_bits(whole, checks.quantize(method, weight_OI))


def test_bits_stored_are_those_of_the_papers():
    def stored(**options: object) -> float:
        return stored_bits(build("nf4", **options).layout(4096, 4096), 4096, 4096)

    assert stored() == pytest.approx(4.127, abs=1e-3)
    assert stored(icq=True) == pytest.approx(4.254, abs=1e-3)
    assert stored(double_quant=False) == 4.5
    assert stored(bits=2) == pytest.approx(2.127, abs=1e-3)


def test_zeros_are_zeros():
    """All-zero blocks and matrices stay zero: no division by zero, no noise from the mean scale."""
    weight_OI = checks.weight(8, 64).clone()
    weight_OI[3] = 0
    for options in ({}, {"icq": True}, {"icq": True, "search_range": True}):
        method = build("nf4", **options)
        assert (
            not checks.restore(method, checks.quantize(method, weight_OI), weight_OI)[3].abs().max()
            > 1e-2
        )
        zero_OI = torch.zeros(8, 64)
        assert not checks.restore(method, checks.quantize(method, zero_OI), zero_OI).any()


def test_options_are_checked():
    for options in ({"block_size": 1}, {"tau_range": 0.0}, {"tau_range": 1.0}, {"tau_steps": 0}):
        with pytest.raises(LLQError, match=next(iter(options))):
            build("nf4", **options)


@pytest.mark.parametrize("icq", [False, True], ids=["plain", "shifted"])
def test_kernels_are_given_what_they_read(icq: bool, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for bitsandbytes that decodes its documented layout: high half of a byte first,
    blocks row by row.
    """

    def dequantize(codes: torch.Tensor, state: SimpleNamespace) -> torch.Tensor:
        pairs = codes.flatten().int()
        indices = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1, state.blocksize)
        return (state.code[indices] * state.absmax[:, None]).view(state.shape).to(state.dtype)

    def matmul(
        x: torch.Tensor, codes: torch.Tensor, quant_state: SimpleNamespace, bias: torch.Tensor
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, dequantize(codes.t(), quant_state), bias)

    calls: list[str] = []
    functional = SimpleNamespace(QuantState=SimpleNamespace, dequantize_4bit=dequantize)
    library = SimpleNamespace(functional=functional, matmul_4bit=matmul)
    monkeypatch.setattr(bitsandbytes_rows, "_library", lambda: calls.append("served") or library)
    here = [row._replace(device="cpu", available=lambda: True) for row in bitsandbytes_rows.ROWS]
    monkeypatch.setattr(dispatch, "TABLE", here)
    method, weight_OI = build("nf4", icq=icq), checks.weight(24, 128)
    checks.check_linear(method, checks.quantize(method, weight_OI), weight_OI, torch.float32)
    served = len(calls)
    assert served > 0
    checks.check_gradient(method, checks.quantize(method, weight_OI), weight_OI)
    assert len(calls) > served  # these kernels have a derivative


@pytest.mark.parametrize(
    ("options", "columns"),
    [({"bits": 3}, 128), ({"block_size": 32}, 128), ({"block_size": 96}, 192), ({}, 96)],
    ids=["levels", "block size", "another block size", "blocks across rows"],
)
def test_kernels_are_not_given_what_they_cannot_read(options: dict[str, int], columns: int):
    def fitting(method: NF4, shape: tuple[int, int]) -> list[bool]:
        packed = checks.quantize(method, checks.weight(*shape))
        return [row.fits(method._stored(packed, *shape)) for row in bitsandbytes_rows.ROWS]

    assert fitting(build("nf4"), (24, 128)) == [True, False]
    assert fitting(build("nf4", icq=True), (24, 128)) == [False, True]
    assert fitting(build("nf4", **options), (24, columns)) == [False, False]
