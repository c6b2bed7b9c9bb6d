"""Numbers in a file that become an index, a size, a shift or a divisor are refused where they
enter, by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llq_hf.common.errors import LLQError
from llq_hf.kernels import Part, UniformCodes
from llq_hf.kernels.bitpack import pack, unpack
from llq_hf.layers.linear import QuantLinear, check_linears
from llq_hf.methods import build
from llq_hf.methods.pb_llm import Positions
from llq_hf.numerics.grids import Uniform

ROWS, COLUMNS = 64, 640


def honest(name: str, bits: float, **options: Any) -> QuantLinear:
    """A packed linear of zeros whose numbers are all possible."""
    method = build(name, bits=bits, **options)
    linear = QuantLinear(method, COLUMNS, ROWS, False)
    for key, tensor in linear.packed().items():
        tensor.fill_(1 if tensor.is_floating_point() else 0)
        if key == "order":
            tensor.copy_(torch.arange(COLUMNS).flip(0))
        if key == "widths":
            tensor.copy_(torch.tensor([2, 1, 3, 2, 2]))
    if name == "pb_llm":
        positions = method._positions(ROWS, COLUMNS)  # type: ignore[attr-defined]
        salient = torch.arange(ROWS * COLUMNS) % 3 == 0
        salient &= salient.cumsum(0) <= positions.count
        for key, tensor in positions.pack(salient).items():
            getattr(linear, key).copy_(tensor)
    return linear


def at(index: int, value: float) -> Callable[[Tensor], Any]:
    return lambda tensor: tensor.view(-1).__setitem__(index, value)


CASES: list[tuple[str, float, dict[str, Any], str, Callable[[Tensor], Any]]] = [
    ("gptq", 4, {"act_order": True}, "order", at(0, 640)),
    ("gptq", 4, {"act_order": True}, "order", at(0, -1)),
    ("gptq", 4, {"act_order": True}, "order", at(0, 5)),
    ("gptq", 4, {}, "scale", at(3, float("nan"))),
    ("rtn", 4, {"scale_bits": 32}, "scale", at(-1, float("-inf"))),
    ("quip", 2, {}, "seeds", at(1, -7)),
    ("quip", 2, {}, "in_scale", at(1, 0.0)),
    ("awq", 4, {}, "in_scale", at(1, -1.0)),
    ("slim_llm", 2, {}, "widths", at(0, 3)),
    ("slim_llm", 2, {}, "widths", at(0, 8)),
    ("slim_llm", 2, {}, "widths", lambda tensor: tensor.fill_(3)),
    ("slim_llm", 2, {}, "widths", lambda tensor: tensor.copy_(torch.tensor([1, 1, 3, 3, 2]))),
    ("pb_llm", 1.7, {}, "position", at(0, 0)),
    ("nf4", 4, {}, "scale_absmax", at(0, float("inf"))),
    ("hybrid", 3, {"rules": "*=quip:2"}, "seeds", at(0, -1)),
]


@pytest.mark.parametrize(
    ("name", "bits", "options", "tensor", "edit"),
    CASES,
    ids=[f"{name}-{tensor}-{i}" for i, (name, _, _, tensor, _) in enumerate(CASES)],
)
def test_an_impossible_number_is_refused_by_name(name, bits, options, tensor, edit) -> None:
    linear = honest(name, bits, **options)
    check_linears({"model.x": linear})
    edit(getattr(linear, tensor))
    with pytest.raises(LLQError, match=rf"^model\.x\.{tensor}\b"):
        check_linears({"model.x": linear})
    # and so is a state dict that holds it
    state = linear.state_dict()
    with pytest.raises(LLQError, match=tensor):
        honest(name, bits, **options).load_state_dict(state)


def test_linears_without_numbers_are_left_out() -> None:
    check_linears({"x": QuantLinear(build("quip", bits=2), COLUMNS, ROWS, False, "meta")})


def crafted(positions: Positions, packed: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """Lists that have the right number of ones."""
    ones_U = unpack(packed["position"], 1, positions.unary_bits)
    low = positions.low_bits or 0
    low_K = unpack(packed["position_low"], low, positions.listed)
    if how == "front":  # all in the first cells
        ones_U = ones_U.sort(descending=True).values
    if how == "back":  # the last ones behind the end of the weight
        ones_U, low_K = ones_U.sort().values, torch.full_like(low_K, 2**low - 1)
    if how == "low bits":
        low_K = low_K.flip(0)
    return {"position": pack(ones_U, 1), "position_low": pack(low_K, low)}


@pytest.mark.parametrize("how", ["front", "back", "low bits"])
def test_a_list_that_does_not_ascend_is_refused_before_it_is_read(how: str) -> None:
    """By whoever reads it first: a kernel, or torch."""
    linear = honest("pb_llm", 1.7)
    positions = linear.method._positions(ROWS, COLUMNS)  # type: ignore[attr-defined]
    linear(torch.randn(2, COLUMNS))
    for key, tensor in crafted(positions, linear.packed(), how).items():
        getattr(linear, key).copy_(tensor)
    check_linears({"x": linear})  # the count is right
    for read in (lambda: linear(torch.randn(2, COLUMNS)), linear.dequantized):
        with pytest.raises(LLQError, match="does not ascend"):
            read()


def test_ones_in_the_padding_do_not_count() -> None:
    positions = Positions(7, 1000 - 13)
    mask = torch.zeros(positions.total, dtype=torch.bool)
    mask[::150] = True
    packed = positions.pack(mask)
    positions.check(packed)
    ones = unpack(packed["position"], 1, packed["position"].numel() * 32)
    assert positions.unary_bits % 32
    ones[positions.unary_bits :] = 1
    positions.check({**packed, "position": pack(ones, 1)})
    first = int(ones.nonzero()[0])
    ones[first] = 0
    with pytest.raises(LLQError, match="it holds 6 of them, not 7"):
        positions.check({**packed, "position": pack(ones, 1)})


# --- what kernels rely on -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**31, 2**32, 2**32 + 1, 2**40, 2**62])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_huge_group_is_a_whole_row(size: int, bits: int) -> None:
    """In 32 bits it would wrap around, to 0 at 2**32."""
    torch.manual_seed(0)
    grid, whole = Uniform(bits, size), Uniform(bits, -1)
    weight_OI = torch.randn(8, COLUMNS)
    packed = whole.pack(whole.grids(weight_OI).codes(weight_OI, bits), whole.grids(weight_OI))
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, COLUMNS)
        assert torch.equal(grid.linear(x, packed, None), whole.linear(x, packed, None))


def test_a_size_that_fits_nothing_is_refused() -> None:
    with pytest.raises(LLQError, match="does not fit 64 bits"):
        build("rtn", bits=4, group_size=2**64)
    with pytest.raises(LLQError, match="block_size"):
        build("nf4", bits=4, block_size=2**40)


def view(**changes: Any) -> UniformCodes:
    given: dict[str, Any] = {
        "weight": torch.zeros(8, 80, dtype=torch.int32),
        "columns": COLUMNS,
        "parts": (Part(4, COLUMNS),),
        "scale": torch.ones(8, 5),
        "zero": 8.0,
        "group_size": 128,
        "zero_bits": 4,
    }
    return UniformCodes(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": (Part(5, COLUMNS),)},
        {"parts": (Part(4, COLUMNS, start=16),)},
        {"parts": (Part(4, 512), Part(4, 256))},
        {"parts": (Part(4, COLUMNS, blocks=torch.zeros(4, dtype=torch.int32)),)},
        {"scale": torch.ones(8, 4)},
        {"zero": torch.zeros(4, dtype=torch.int32)},
        {"group_size": 64},
        {"group_size": 0},
        {"columns": 2**33},
    ],
    ids=str,
)
def test_a_view_that_does_not_fit_its_tensors_is_refused(changes: dict[str, Any]) -> None:
    view()
    with pytest.raises(LLQError, match="the checkpoint is damaged"):
        view(**changes)
