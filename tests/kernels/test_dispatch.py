"""The choice of a kernel, proved with a row on another device: it serves where it says so, and
torch elsewhere.

The device is "meta", whose tensors have no values, so that no CPU kernel can step in unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llq_hf import kernels
from llq_hf.kernels import dispatch, native
from llq_hf.kernels.rows import ALL, HALF, MANY, Row
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Job
from llq_hf.methods import build

OUT, IN = 24, 256


def by_kernel(x: Tensor, stored: kernels.Stored, bias: Tensor | None) -> Tensor:
    """A stand-in for a kernel. Its result has one column too many, which torch's has not."""
    return x.new_empty(*x.shape[:-1], stored.rows + 1)


FAKE = Row(kernels.UniformCodes, "meta", MANY, ALL, lambda: True, lambda view: True, by_kernel)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """table(row, ...): put rows before those of the package. No CPU library may be asked for."""

    def put(*rows: Row) -> None:
        monkeypatch.setattr(dispatch, "TABLE", (*rows, *dispatch.TABLE))

    monkeypatch.setattr(native, "backend", lambda: pytest.fail("a CPU library was asked for"))
    return put


def codes(device: str = "meta") -> kernels.UniformCodes:
    """4-bit codes of a linear [OUT, IN], with one scale a row."""
    weight = torch.zeros(OUT, IN // 8, dtype=torch.int32, device=device)
    scale_O1 = torch.ones(OUT, 1, device=device)
    return kernels.UniformCodes(weight, IN, (kernels.Part(4, IN),), scale_O1, 8.0, IN)


def inputs(*shape: int, **options: Any) -> Tensor:
    return torch.empty(*(shape or (2,)), IN, device="meta", **options)


def served(x: Tensor, stored: kernels.Stored | None) -> bool:
    """Whether the stand-in gave the product, and not torch."""
    y = kernels.product(x, stored, lambda: torch.empty(OUT, IN, device=x.device))
    assert y.shape[-1] in (OUT, OUT + 1)
    return y.shape[-1] == OUT + 1


def test_a_row_that_is_available_and_fits_serves(table: Callable[..., None]):
    table(FAKE)
    assert served(inputs(), codes())
    assert served(inputs(1, 3, dtype=torch.bfloat16), codes())


@pytest.mark.parametrize(
    "change",
    [
        {"available": lambda: False},
        {"fits": lambda view: False},
        {"view": kernels.LevelCodes},
        {"device": "cuda"},
        {"tokens": range(3, 9)},
        {"dtypes": HALF},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_that_does_not_fit_leaves_the_call_to_the_next(
    table: Callable[..., None], change: dict[str, Any]
):
    table(FAKE._replace(**change))
    assert not served(inputs(), codes())
    table(FAKE._replace(**change), FAKE)
    assert served(inputs(), codes())


def test_who_listens_hears_what_served_and_what_was_passed(table: Callable[..., None]):
    table(
        FAKE._replace(available=lambda: False),
        FAKE._replace(fits=lambda view: False, needs="more columns"),
        FAKE._replace(device="cuda"),
        FAKE,
        FAKE,
    )
    stored = codes()
    assert served(inputs(), stored)  # the choice is remembered, and heard all the same
    with kernels.listening() as heard:
        assert served(inputs(), stored)
        with kernels.reference():
            assert not served(inputs(), stored)
    assert not served(inputs(), None)
    passed = ["by kernel: not available here", "by kernel needs more columns"]
    assert heard == [kernels.Choice("by kernel", passed)]


def test_without_a_view_torch_serves(table: Callable[..., None]):
    table(FAKE)
    assert not served(inputs(), None)


def test_the_first_row_that_fits_serves(table: Callable[..., None]):
    table(FAKE._replace(kernel=lambda x, stored, bias: "first"), FAKE)
    assert kernels.product(inputs(), codes(), lambda: pytest.fail("decoded")) == "first"


def test_nothing_is_asked_where_it_need_not_be(table: Callable[..., None]):
    """`fits` is asked only where the kernel is available, as it may use the library. Rows of other
    devices are asked nothing.
    """
    table(
        FAKE._replace(device="cpu", available=lambda: pytest.fail("of another device")),
        FAKE._replace(available=lambda: False, fits=lambda view: pytest.fail("not available")),
    )
    assert not served(inputs(), codes())


def test_a_row_is_asked_once_for_a_weight_and_a_kind_of_call(table: Callable[..., None]):
    asked: list[str] = []
    row = FAKE._replace(
        available=lambda: asked.append("available") or True,
        fits=lambda view: asked.append("fits") or True,
    )
    table(row)
    stored = codes()
    assert served(inputs(2), stored)
    assert asked == ["available", "fits"]
    assert served(inputs(2), stored)
    assert asked == ["available", "fits"]
    assert served(inputs(3), stored)  # another number of tokens
    assert served(inputs(2), codes())  # another weight
    assert asked == ["available", "fits"] * 3
    assert served(inputs(dispatch.MOST), stored)
    assert served(inputs(dispatch.MOST + 1), stored)  # that many are all alike
    assert asked == ["available", "fits"] * 4


def test_no_row_ends_among_the_numbers_of_tokens_that_share_a_choice():
    for row in dispatch.TABLE:
        assert row.tokens == MANY or row.tokens.stop <= dispatch.MOST


def test_no_kernel_serves_inside_reference(table: Callable[..., None]):
    """Neither before nor after a kernel was chosen for such a call."""
    table(FAKE, FAKE._replace(differentiable=True))
    stored = codes()
    with kernels.reference():
        assert not served(inputs(), stored)
    assert served(inputs(), stored)
    with kernels.reference():
        assert not served(inputs(), stored)


def test_where_gradients_are_wanted_a_differentiable_row_serves(table: Callable[..., None]):
    table(FAKE)
    stored = codes()
    assert served(inputs(), stored)
    assert not served(inputs(requires_grad=True), stored)
    with torch.no_grad():
        assert served(inputs(requires_grad=True), stored)
    table(FAKE._replace(differentiable=True))
    assert served(inputs(requires_grad=True), codes())


def test_a_row_serves_a_whole_linear(table: Callable[..., None]):
    """Neither the module nor the method asks where tensors lie."""
    table(FAKE)
    linear = QuantLinear(build("rtn", bits=3), IN, OUT, bias=False, device="meta")
    assert linear(inputs(5, 7)).shape == (5, 7, OUT + 1)
    with kernels.reference():
        assert linear(inputs(5, 7)).shape == (5, 7, OUT)


def test_transforms_have_rows_in_the_same_table(table: Callable[..., None]):
    def by_kernel(x: Tensor, by: kernels.Transform, divisor: Tensor, factor: Tensor) -> Any:
        return by, divisor, factor

    order, square = torch.arange(IN, dtype=torch.int32, device="meta"), inputs(16)[:, :16]
    divisor, factor, slow = inputs(1), inputs(1), inputs()

    def result(x: Tensor) -> Any:
        by = kernels.Transform(order, square, square, order)
        y = kernels.transformed(x, by, lambda: slow, divisor, factor)
        return "torch" if y is slow else y[1:] == (divisor, factor) and y[0] is by

    row = FAKE._replace(view=kernels.Transform, kernel=by_kernel)
    assert result(inputs()) == "torch"
    table(row._replace(fits=lambda view: False))
    assert result(inputs()) == "torch"
    table(row)
    assert result(inputs()) is True
    assert result(inputs(requires_grad=True)) == "torch"
    with kernels.reference():
        assert result(inputs()) == "torch"
    assert kernels.transformed(inputs(), None, lambda: slow) is slow


def test_without_a_compiled_library_torch_decodes(monkeypatch: pytest.MonkeyPatch):
    """CPU rows ask for their library, and a row of another device changes nothing on the CPU."""
    monkeypatch.setenv("LLQ_CPU_ISA", "none")
    monkeypatch.setattr(dispatch, "TABLE", (FAKE, *dispatch.TABLE))
    native.backend.cache_clear()
    try:
        assert not native.compiled()
        method, dense = build("rtn", bits=3), nn.Linear(IN, OUT, bias=False)
        packed = method.quantize(dense.weight.data, None, Job("x"))
        linear = QuantLinear.from_packed(method, dense, packed)
        x = torch.randn(2, IN, generator=torch.Generator().manual_seed(0))
        assert kernels.choose(x, method.grid.readable(packed, IN)) is None
        assert torch.equal(linear(x), nn.functional.linear(x, linear.dequantized()))
    finally:
        native.backend.cache_clear()
