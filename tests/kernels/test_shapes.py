"""Every number of columns and every group on the fast path of the CPU kernels, against torch's
decoding.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.random_weights import error, generator, random_packed
from guarded import STRAY
from torch import Tensor
from torch.nn import functional as F

from llq_hf import kernels
from llq_hf.kernels import native
from llq_hf.methods import build
from llq_hf.numerics.grids import Uniform

# Tails of every number of units, of whole units and not; and no tail.
COLUMNS = [8, 24, 40, 64, 72, 120, 128, 200, 576, 1536 + 8]
GROUPS = [16, 32, 48, 64, 96, 128, -1]
TOKENS = [1, 3, 4, 8, 33]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the error of y, relative to the norm of |x| |W|, which does not depend on how sums cancel.
DIGITS, FLOATS = 5e-5, 1e-6


def packed_on(grid: Uniform, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Random bits in the layout of a grid."""
    random = generator(seed)
    return {
        name: (torch.rand(spec.shape, generator=random) + 0.5).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.randint(-(2**31), 2**31 - 1, spec.shape, generator=random).to(spec.dtype)
        for name, spec in grid.layout(rows, columns).items()
    }


def error_of_terms(y: Tensor, x: Tensor, weight_OI: Tensor) -> float:
    """The error of y = x W^T relative to the norms of the vectors whose products it is."""
    expected = F.linear(x.double(), weight_OI.double())
    scale = x.double().norm(dim=-1, keepdim=True) * weight_OI.double().norm(dim=-1)
    return float((y.double() - expected).norm() / scale.norm())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sym", [False, True], ids=["zeros", "symmetric"])
def test_products_of_every_shape(isa: str, bits: int, group_size: int, sym: bool) -> None:
    """In digits, fp32 activations in four of them. 37 rows are no whole tiles."""
    for columns in COLUMNS:
        grid = Uniform(bits, group_size, sym)
        packed = packed_on(grid, 37, columns)
        weight_OI, stored = grid.unpack(packed, columns), grid.readable(packed, columns)
        for tokens in TOKENS[:4]:
            x = torch.randn(tokens, columns, generator=generator(tokens))
            y = native.digits(x, stored, None)
            assert error_of_terms(y, x, weight_OI) < FLOATS, (columns, tokens)
            halves = native.digits(x.half(), stored, None)
            assert error_of_terms(halves, x.half(), weight_OI) < DIGITS + 2.0**-11


@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 40, 48, 64, 100, 128, -1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_shape_is_decoded_to_the_last_bit(isa: str, bits: int, group_size: int) -> None:
    """Also by groups that are no whole slots of 16 columns, which are decoded alone."""
    for columns in COLUMNS:
        for sym, scale_bits in ((False, 16), (True, 32)):
            grid = Uniform(bits, group_size, sym, scale_bits=scale_bits)
            packed = packed_on(grid, 5, columns)
            weight_OI, stored = grid.unpack(packed, columns), grid.readable(packed, columns)
            for dtype in DTYPES:
                out_OI = torch.empty(5, columns, dtype=dtype)
                native.decode(stored, 0, 5, out_OI)
                assert torch.equal(out_OI, weight_OI.to(dtype)), (columns, dtype)
                two_OI = torch.empty(2, columns, dtype=dtype)
                native.decode(stored, 3, 5, two_OI)
                assert torch.equal(two_OI, out_OI[3:])


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_whole_linears_of_every_shape(
    isa: str, group_size: int, dtype: torch.dtype, act_order: bool
) -> None:
    """The table's choice for few tokens and for many, with the gather of `act_order`."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for columns in COLUMNS:
        for bits in (2, 3, 4, 8):
            method = build("gptq", bits=bits, group_size=group_size, act_order=act_order)
            packed = kernels.CachedTensors(random_packed(method, 37, columns))
            weight_OI = method.dequantize(packed, 37, columns)
            for tokens in TOKENS:
                x = torch.randn(tokens, columns, generator=generator(tokens)).to(dtype)
                y = method.linear(x, packed, None, 37)
                bound = DIGITS + rounding if rounding else FLOATS
                assert error_of_terms(y, x, weight_OI) < 1.5 * bound, (columns, bits, tokens)


@pytest.mark.parametrize(("columns", "group_size"), [(576, 64), (1544, 32), (40, 16), (576, -1)])
def test_every_shape_goes_by_digits_and_tiles(isa: str, columns: int, group_size: int) -> None:
    """No number of columns, and no group of whole slots, sends few tokens to a slower kernel."""
    grid = Uniform(4, group_size)
    stored = grid.readable(packed_on(grid, 8, columns), columns)
    for dtype in DTYPES:
        few = kernels.choose(torch.zeros(1, columns, dtype=dtype), stored)
        many = kernels.choose(torch.zeros(40, columns, dtype=dtype), stored)
        assert (few, many) == (native.digits, native.tiles)
    odd = Uniform(4, 24)
    stored = odd.readable(packed_on(odd, 8, columns), columns)
    assert kernels.choose(torch.zeros(1, columns), stored) is native.floats


def test_instruction_sets_agree(libraries: dict[str, Path]) -> None:
    """Logits depend on the processor by the error of fp32 sums only: digits and decoded values are
    the same.
    """
    found: list[Tensor] = []
    grid = Uniform(4, 32)
    packed = packed_on(grid, 64, 1544)
    x = torch.randn(2, 1544, generator=generator())
    for name in native.supported():
        with pytest.MonkeyPatch.context() as patch:
            library = native.Backend(name, libraries[name], ctypes.CDLL(str(libraries[name])))
            patch.setattr(native, "backend", lambda library=library: library)
            found.append(native.digits(x, grid.readable(packed, 1544), None))
    assert all(error(y, found[0].double()) < 1e-6 for y in found)


def test_a_number_that_is_none_is_not_lost(isa: str) -> None:
    """NaN and infinity among the activations reach y, and no other token."""
    grid = Uniform(4, 32)
    stored = grid.readable(packed_on(grid, 16, 200), 200)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for column in (3, 199):
            x = torch.ones(3, 200).bfloat16()
            x[1, column] = bad
            y = native.digits(x, stored, None)
            assert not y[1].isfinite().any()
            assert y[0].isfinite().all()
            assert torch.equal(y[0], y[2])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_minus_the_middle_have_tails(isa: str, bits: int) -> None:
    """What `smoothquant` multiplies in integers."""
    for columns in COLUMNS:
        grid = Uniform(bits, -1, sym=True)
        packed = packed_on(grid, 5, columns)
        codes_OI = grid.unpack({**packed, "scale": torch.ones(5, 1)}, columns)
        found_OI = torch.empty(5, columns, dtype=torch.int8)
        centred = native._function(kernels.UniformCodes, "centred")
        stored = grid.readable(packed, columns)
        centred(native.structs(stored), 0, 5, 2 ** (bits - 1), found_OI.data_ptr(), 1)
        assert torch.equal(found_OI.float(), codes_OI)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_nothing_is_read_behind_a_tensor(libraries: dict[str, Path]) -> None:
    """Every tensor ends where memory ends: a byte too many is a segmentation fault."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = Path(__file__).with_name("guarded.py")
        paths = [f"{isa}={libraries[isa]}" for isa in native.supported()]
        command = [sys.executable, str(script), *arguments, *paths]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ran = run()
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "all" in ran.stdout
    assert run(STRAY).returncode < 0  # killed by the signal
