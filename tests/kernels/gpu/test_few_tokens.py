"""The few-token kernels in the emulator against torch's decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.random_weights import error, generator
from storages import ROUNDING
from torch import Tensor

from llq_hf.kernels.gpu import few
from llq_hf.numerics.grids import Grid, Uniform

HALVES = [torch.bfloat16, torch.float16]
# Of y in fp32: bf16's operands stand at 128, whose products cancel.
SUMS = {torch.bfloat16: 5e-5, torch.float16: 2e-6}


def uniform_weight(grid: Uniform, rows: int, columns: int) -> tuple[Any, Tensor]:
    """Random codes on a grid, as kernels read them, and the weight."""
    random = generator()
    codes_OI = torch.randint(0, 2**grid.bits, (rows, columns), generator=random)
    groups = grid.layout(rows, columns)["scale"].shape[1]
    scale_OG = (torch.rand(rows, groups, generator=random) + 0.5).half().float()
    zero_OG = torch.randint(0, 2**grid.bits, (rows, groups), generator=random).float()
    packed = grid.pack(codes_OI, Grid(scale_OG, zero_OG))
    return grid.readable(packed, columns), grid.unpack(packed, columns).double()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [128, 256, 64, 32, -1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_uniform_codes(emulated: None, bits: int, group_size: int, dtype: torch.dtype):
    stored, weight_OI = uniform_weight(Uniform(bits, group_size), 20, 384)
    x = torch.randn(3, 384, generator=generator(1)).to(dtype)
    y = few.uniform_codes(x, stored, None, torch.ones(3, 1), torch.float32)
    assert error(y, x.double() @ weight_OI.T) < SUMS[dtype]


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16])
@pytest.mark.parametrize("rows", [4, 36, 100])
def test_every_number_of_tokens_and_rows(emulated: None, tokens: int, rows: int):
    stored, weight_OI = uniform_weight(Uniform(4, 128), rows, 256)
    x = torch.randn(tokens, 256, generator=generator(1)).bfloat16()
    bias = torch.randn(rows, generator=generator(2)).bfloat16()
    expected = x.double() @ weight_OI.T + bias.double()
    assert error(few.uniform(x, stored, bias), expected) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("columns", [544, 576, 680, 136])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_columns_after_the_last_whole_block(emulated: None, columns: int, bits: int):
    for grid in (Uniform(bits, -1), Uniform(bits, 128), Uniform(bits, -1, scale_bits=32)):
        stored, weight_OI = uniform_weight(grid, 20, columns)
        x = torch.randn(3, columns, generator=generator(1)).bfloat16()
        y = few.uniform_codes(x, stored, None, torch.ones(3, 1), torch.float32)
        assert error(y, x.double() @ weight_OI.T) < SUMS[torch.bfloat16]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_of_integers_are_exact(emulated: None, bits: int):
    stored, weight_OI = uniform_weight(Uniform(bits, -1, sym=True), 20, 256)
    codes = torch.randint(-127, 128, (3, 256), dtype=torch.int8, generator=generator(1))
    step = torch.rand(3, 1, generator=generator(2))
    y = few.uniform_codes(codes, stored, None, step, torch.float32)
    assert error(y, codes.double() @ weight_OI.T * step.double()) < 2e-7


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1024, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_tiles_fit_the_shared_memory_of_the_smallest_card(bits: int, rows: int, tokens: int):
    for wide in (False, True):
        used = few.tile(rows, tokens, bits, wide)
        assert few.ring_bytes(used, bits) <= few.SHARED


def test_a_wrong_zero_point_is_noticed(emulated: None, monkeypatch: pytest.MonkeyPatch):
    stored, weight_OI = uniform_weight(Uniform(4, 128), 20, 256)
    zeros = few.zero_points(stored)
    assert zeros is not None
    monkeypatch.setattr(few, "zero_points", lambda stored: zeros + 1)  # one code of each four
    x = torch.randn(3, 256, generator=generator(1)).bfloat16()
    assert error(few.uniform(x, stored, None), x.double() @ weight_OI.T) > 0.02


def test_codes_of_another_class_are_noticed(emulated: None, monkeypatch: pytest.MonkeyPatch):
    from llq_hf.kernels.gpu import uniform_few

    stored, weight_OI = uniform_weight(Uniform(2, 128), 20, 256)
    monkeypatch.setattr(uniform_few, "code_mask", lambda n, cls: 3 << 2 * (1 - cls))
    x = torch.randn(3, 256, generator=generator(1)).bfloat16()
    assert error(few.uniform(x, stored, None), x.double() @ weight_OI.T) > 0.5
