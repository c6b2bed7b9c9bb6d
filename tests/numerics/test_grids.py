"""Uniform grids against spec 1.1 read as loops, and against what must hold of any grid."""

from __future__ import annotations

import pytest
import torch
from numerics.host_reads import watched
from reference.grid import code_of, grid_of, searched, value_of

from llq_hf.common.errors import LLQError
from llq_hf.common.spec import Spec
from llq_hf.numerics import grids
from llq_hf.numerics.grids import Grid, Uniform, grouped, scale_dtype

RANDOM = torch.Generator().manual_seed(5)
SLICES = {
    "mixed signs": torch.randn(6, 16, generator=RANDOM),
    "all zero": torch.zeros(2, 16),
    "all positive": torch.rand(4, 16, generator=RANDOM) + 0.5,
    "all negative": -torch.rand(4, 16, generator=RANDOM) - 0.5,
    "one value": torch.full((2, 16), 0.3),
    "one weight": torch.randn(5, 1, generator=RANDOM),
    "an outlier": torch.cat([torch.randn(3, 15, generator=RANDOM), torch.full((3, 1), 1e3)], dim=1),
    "tiny": torch.randn(3, 16, generator=RANDOM) * 1e-12,
}
each_slice = pytest.mark.parametrize("weight_Rg", SLICES.values(), ids=SLICES)
each_sym = pytest.mark.parametrize("sym", [False, True], ids=["asymmetric", "symmetric"])


@each_slice
@each_sym
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_equals_the_spec(weight_Rg: torch.Tensor, sym: bool, bits: int, scale_bits: int):
    grid = Uniform(bits, sym=sym, scale_bits=scale_bits).grid(weight_Rg)
    codes = grid.codes(weight_Rg, bits)
    assert grid.scale.shape == grid.zero.shape == (len(weight_Rg), 1)
    assert torch.equal(codes, codes.round())
    assert 0 <= codes.min() <= codes.max() <= 2**bits - 1
    assert 0 <= grid.zero.min() <= grid.zero.max() <= 2**bits - 1
    values = grid.values(codes)
    assert torch.isfinite(values).all()
    for row, weights in enumerate(weight_Rg.tolist()):
        scale, zero = grid_of(weights, bits, sym, scale_bits)
        assert float(grid.scale[row]) == pytest.approx(scale, rel=1e-6)
        assert int(grid.zero[row]) == zero
        expected = [code_of(w, float(grid.scale[row]), zero, bits) for w in weights]
        assert codes[row].tolist() == expected
        assert values[row].tolist() == pytest.approx(
            [value_of(c, scale, zero) for c in expected], rel=1e-5, abs=1e-9
        )


@each_sym
def test_scales_never_become_zero(sym: bool):
    grid = Uniform(4, sym=sym).grid(SLICES["tiny"])
    assert (grid.scale == 2.0**-24).all()
    assert grid.scale.half().float().equal(grid.scale)


@each_slice
@pytest.mark.parametrize("bits", range(1, 9))
def test_errors_are_at_most_half_a_step(weight_Rg: torch.Tensor, bits: int):
    """Asymmetric, fp32 scales: zero is rounded, so an end may clip by half a step more."""
    grid = Uniform(bits, scale_bits=32).grid(weight_Rg)
    error = (grid.values(grid.codes(weight_Rg, bits)) - weight_Rg).abs()
    assert (error <= grid.scale * 1.0001).all()
    inside = (weight_Rg / grid.scale + grid.zero >= 0) & (
        weight_Rg / grid.scale + grid.zero <= 2**bits - 1
    )
    assert (error[inside] <= (grid.scale * 0.5001).expand_as(error)[inside]).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_is_exact_on_every_grid(bits: int):
    for sym in (False, True):
        weight_Rg = SLICES["mixed signs"].clone()
        weight_Rg[:, 3] = 0
        grid = Uniform(bits, sym=sym).grid(weight_Rg)
        assert not grid.values(grid.codes(weight_Rg, bits))[:, 3].any()


def test_the_symmetric_range_is_symmetric_without_negative_weights():
    """The authors' scale is half of that there, which clips the upper half."""
    grid = Uniform(4, sym=True, scale_bits=32).grid(SLICES["all positive"])
    assert torch.allclose(grid.scale, 2 * SLICES["all positive"].amax(1, keepdim=True) / 15)
    assert (grid.zero == 8).all()


@each_sym
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_equals_the_loop_and_never_loses(sym: bool, bits: int):
    weight_Rg = SLICES["mixed signs"]
    grid = Uniform(bits, sym=sym, search=True, scale_bits=32).grid(weight_Rg)
    plain = Uniform(bits, sym=sym, scale_bits=32).grid(weight_Rg)

    def error(g: Grid) -> torch.Tensor:
        return (g.values(g.codes(weight_Rg, bits)) - weight_Rg).abs().pow(2.4).sum(1)

    assert (error(grid) <= error(plain)).all()
    for row, weights in enumerate(weight_Rg.tolist()):
        _, best = searched(weights, bits, sym)
        assert float(error(grid)[row]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("group_size", [-1, 1, 5, 16, 40, 200])
@each_sym
def test_groups_are_consecutive_columns_and_the_last_may_be_short(group_size: int, sym: bool):
    weight_OI = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    uniform = Uniform(4, group_size, sym)
    grid_OG = uniform.grids(weight_OI)
    size = 40 if group_size == -1 else group_size
    assert grid_OG.scale.shape == (3, -(-40 // size)) == uniform.layout(3, 40)["scale"].shape
    spread = uniform.spread(grid_OG, 40)
    for column in range(40):
        own = Uniform(4, sym=sym).grid(
            weight_OI[:, column // size * size : (column // size + 1) * size]
        )
        scale = spread.scale.expand(3, 40)[:, column]
        assert torch.equal(scale, own.scale[:, 0])


@pytest.mark.parametrize("group_size", [-1, 7, 32, 128])
@pytest.mark.parametrize("levels", ["asymmetric", "full", "halves"])
@pytest.mark.parametrize("chunk", [1, 500, 1 << 24])
def test_all_groups_at_once_have_the_grids_of_each_alone(
    group_size: int, levels: str, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """To the last bit, however many rows and candidates are worked on together."""
    random = torch.Generator().manual_seed(2)
    weight_OI, importance_I = torch.randn(5, 140, generator=random), torch.rand(140)
    symmetric = {
        "sym": levels != "asymmetric",
        **({} if levels == "asymmetric" else {"levels": levels}),
    }
    uniform = Uniform(3, group_size, search=True, **symmetric)
    size = uniform.size(140)
    alone = [
        uniform.grid(weight_OI[:, start : start + size], importance_I[start : start + size])
        for start in range(0, 140, size)
    ]
    monkeypatch.setattr(grids, "at_once", lambda device: chunk)
    together = uniform.grids(weight_OI, importance_I)
    assert type(together) is type(alone[0])
    for part in range(2):
        assert torch.equal(together[part], torch.cat([grid[part] for grid in alone], dim=1))


def test_a_search_reads_nothing_and_starts_as_much_for_many_groups_as_for_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(grids, "at_once", lambda device: 1 << 24)  # as on a GPU
    weight_OI = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    uniform = Uniform(4, 16, search=True)
    many = watched(lambda: uniform.grids(weight_OI))
    one = watched(lambda: uniform.grids(weight_OI[:, :16]))
    assert not many.reads
    assert many.operations <= one.operations + 2


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [-1, 8, 24, 64])
@each_sym
def test_what_is_packed_comes_back(bits: int, group_size: int, sym: bool):
    weight_OI = torch.randn(5, 72, generator=torch.Generator().manual_seed(bits))
    uniform = Uniform(bits, group_size, sym)
    grid_OG = uniform.grids(weight_OI)
    spread = uniform.spread(grid_OG, 72)
    codes_OI = spread.codes(weight_OI, bits)
    packed = uniform.pack(codes_OI, grid_OG)
    assert {name: Spec(tuple(t.shape), t.dtype) for name, t in packed.items()} == uniform.layout(
        5, 72
    )
    assert torch.equal(uniform.unpack(packed, 72), spread.values(codes_OI)), (
        "codes are final with the stored scales"
    )


def test_bad_options_are_named():
    for group_size in (0, -2):
        with pytest.raises(LLQError, match=f"group_size={group_size}"):
            Uniform(4, group_size)
    with pytest.raises(LLQError, match="scale_bits=8"):
        Uniform(4, scale_bits=8)
    weight_OI = torch.tensor([[-1e5, 1e5]])
    with pytest.raises(LLQError, match="too large"):
        Uniform(1).pack(torch.zeros(1, 2), Uniform(1).grid(weight_OI))
    assert torch.isfinite(Uniform(1).grid(weight_OI).scale).all()  # so that feedback goes on
    assert torch.isfinite(Uniform(1, scale_bits=32).grid(torch.tensor([[-1e5, 1e5]])).scale).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("levels", ["absmax", "halves"])
@pytest.mark.parametrize("search", [False, True])
def test_other_symmetric_levels(bits: int, levels: str, search: bool):
    """Level by level: multiples of max / (2**(b-1) - 1), or odd multiples of max / (2**b - 1)."""
    weight_Rg = SLICES["mixed signs"]
    family = Uniform(bits, sym=True, search=search, scale_bits=32, levels=levels)
    grid = family.grid(weight_Rg)
    codes = grid.codes(weight_Rg, bits)
    assert torch.equal(codes, codes.round())
    assert 0 <= codes.min() <= codes.max() <= 2**bits - 1
    k = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + (0.5 if levels == "halves" else 0.0)
    restored = family.unpack(family.pack(codes, grid), 16)
    best = (
        torch.stack([(weight_Rg - value).abs() for value in (k[:, None, None] * grid.scale)])
        .min(0)
        .values
    )
    assert torch.allclose((restored - weight_Rg).abs(), best, atol=1e-6)
    largest = weight_Rg.abs().amax(1, keepdim=True)
    if not search:
        assert torch.allclose(grid.scale * float(k[-1]), largest)
    else:
        plain = Uniform(bits, sym=True, scale_bits=32, levels=levels).grid(weight_Rg)
        errors = [
            (g.values(g.codes(weight_Rg, bits)) - weight_Rg).abs().pow(2.4).sum(1)
            for g in (grid, plain)
        ]
        assert (errors[0] <= errors[1]).all()


def test_unknown_levels_are_refused():
    with pytest.raises(LLQError, match="'odd'"):
        Uniform(4, sym=True, levels="odd")


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "last"), [("constant", [5.0, 0.0, 0.0]), ("replicate", [5.0, 5.0, 5.0])]
)
def test_a_short_group_is_filled_up(mode: str, last: list[float]):
    x_OI = torch.arange(12.0).view(2, 6)[:, :4] + 2
    groups_OGg = grouped(x_OI, 3, mode)
    assert groups_OGg.shape == (2, 2, 3)
    assert groups_OGg[0].tolist() == [[2.0, 3.0, 4.0], last]


def test_groups_of_a_vector_and_of_whole_groups():
    assert grouped(torch.arange(4.0), 3).tolist() == [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]
    x_OI = torch.randn(3, 8)
    assert torch.equal(grouped(x_OI, 4).flatten(1), x_OI)


def test_the_group_of_a_whole_row():
    assert Uniform(4, -1).size(70) == 70
    assert Uniform(4, 32).size(70) == 32


def test_scales_are_stored_in_16_or_32_bits():
    assert scale_dtype(16) == torch.float16
    assert scale_dtype(32) == torch.float32
    with pytest.raises(LLQError, match="scale_bits=8 must be 16"):
        scale_dtype(8)
