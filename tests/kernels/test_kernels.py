"""The CPU kernels against torch's decoding, for every width, group size, dtype and shape; the calls
they serve, their compilation and their loading.

The library is that of this checkout, or one that the first test compiles. Without a compiler, the
tests skip.
"""

from __future__ import annotations

import ast
import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.random_weights import error, generator, random_packed
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf import kernels
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.kernels import build as building
from llq_hf.kernels import cpu_rows, native
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Job, Packed
from llq_hf.methods import build
from llq_hf.numerics.grids import Grid, Uniform
from llq_hf.numerics.rotations import rotation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Bounds of the error of y relative to its norm.
DIGITS = 1e-4  # digits, Gaussian activations
FLOATS = 2e-6  # fp32 sums
ROUNDING = {torch.float32: FLOATS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of y, once


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_compiler_of_c_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "gcc")
    with pytest.raises(building.BuildError, match=r"gcc .* failed"):
        building.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_the_build_needs_python_alone() -> None:
    """The wheel's build hook runs the file by itself, where no package is installed."""
    tree = ast.parse(Path(building.__file__).read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{'.' * node.level}{node.module}" for node in froms}
    names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def rounded(grid: Uniform, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Random codes, scales and zeros on a grid."""
    random = generator(seed)
    codes_OI = torch.randint(0, 2**grid.bits, shape, generator=random)
    groups = grid.layout(*shape)["scale"].shape[1]
    scale_OG = (torch.rand(shape[0], groups, generator=random) + 0.5).to(grid.scale_dtype).float()
    zero_OG = torch.randint(0, 2**grid.bits, (shape[0], groups), generator=random).float()
    return grid.pack(codes_OI, Grid(scale_OG, zero_OG))


SHAPES = [(37, 384), (7, 556), (4, 100), (1, 128)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [128, -1, 256, 64, 48])
def test_uniform_codes_are_decoded_to_the_last_bit(isa: str, bits: int, group_size: int):
    for shape in SHAPES:
        for sym, scale_bits in ((False, 16), (True, 32)):
            grid = Uniform(bits, group_size, sym, scale_bits=scale_bits)
            packed = rounded(grid, shape)
            expected_OI = grid.unpack(packed, shape[1])
            for dtype in DTYPES:
                out_OI = torch.empty(shape, dtype=dtype)
                native.decode(grid.readable(packed, shape[1]), 0, shape[0], out_OI)
                assert torch.equal(out_OI, expected_OI.to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [128, -1, 256, 64, 192])
def test_uniform_products_in_digits(isa: str, bits: int, group_size: int):
    for shape in SHAPES[:3]:
        grid = Uniform(bits, group_size)
        packed = rounded(grid, shape)
        weight_OI = grid.unpack(packed, shape[1]).double()
        bias = torch.randn(shape[0], generator=generator(2))
        for tokens in (1, 2, 3, 4, 7):
            x = torch.randn(tokens, shape[1], generator=generator(tokens))
            for b in (None, bias):
                y = native.digits(x, grid.readable(packed, shape[1]), b)
                expected = F.linear(x.double(), weight_OI, None if b is None else b.double())
                assert error(y, expected) < DIGITS * 3  # few columns: sums cancel


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_regime_agrees_with_torch(isa: str, bits: int, dtype: torch.dtype):
    """The table chooses digits, floats or tiles. 600 rows are more than one tile."""
    for group_size in (128, 64):
        grid = Uniform(bits, group_size)
        packed = rounded(grid, (600, 512))
        weight_OI = grid.unpack(packed, 512).to(dtype)
        for tokens in (1, 3, 8, 40):
            x = torch.randn(tokens, 512, generator=generator(tokens)).to(dtype)
            kernel = kernels.choose(x, grid.readable(packed, 512))
            assert kernel is not None
            expected = F.linear(x.double(), weight_OI.double())
            assert error(grid.linear(x, packed, None), expected) < 1.5 * ROUNDING[dtype] + FLOATS, (
                kernel
            )


@pytest.mark.parametrize(("bits", "a_bits"), [(8, 8), (6, 6), (4, 4), (4, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_integers_are_exact(isa: str, bits: int, a_bits: int, dtype: torch.dtype):
    """With few tokens and with many, y equals torch's int32 sums up to one rounding. 600 rows are
    two tiles.
    """
    method = build("smoothquant", bits=bits, a_bits=a_bits)
    packed = random_packed(method, 600, 556)
    few, many = cpu_rows.digits_of_codes, cpu_rows.tiles_of_codes
    for tokens, kernel in ((1, few), (8, few), (40, many)):
        x = torch.randn(tokens, 556, generator=generator(tokens)).to(dtype)
        codes = method.tokens.codes(x / packed["in_scale"].float())[0]
        assert kernels.choose(codes, method.grid.readable(packed, 556)) is kernel
        y = method.linear(x, packed, None, 600)
        with kernels.reference():
            expected = method.linear(x.float(), packed, None, 600)
        assert y.dtype == dtype
        assert error(y, expected.double()) < ROUNDING[dtype]


def test_an_outlier_leaves_the_other_columns_their_digits(isa: str):
    """One activation that is 100 times the others reduces the precision of its own block of 128
    columns only.
    """
    grid = Uniform(4, 128)
    packed = rounded(grid, (64, 1024))
    weight_OI = grid.unpack(packed, 1024).double()
    x = torch.randn(1, 1024, generator=generator(1))
    x[0, 130] = 100
    y = native.digits(x, grid.readable(packed, 1024), None)
    assert error(y, F.linear(x.double(), weight_OI)) < 1e-3


def test_threads_and_empty_inputs_change_nothing(isa: str):
    grid = Uniform(3, 128)
    packed = rounded(grid, (300, 1024))  # with 16 tokens, enough work for three threads
    x = torch.randn(16, 1024, generator=generator()).bfloat16()
    alone = grid.linear(x, packed, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(grid.linear(x, packed, None), alone) for _ in range(50))
    finally:
        torch.set_num_threads(before)
    assert grid.linear(x[:0], packed, None).shape == (0, 300)
    assert torch.equal(grid.linear(x[0], packed, None), alone[0])


@pytest.mark.parametrize(("text", "threads"), [("", 3), ("1", 1), ("2", 2), ("5", 5)])
def test_llq_cpu_threads_sets_the_threads_of_kernels(
    isa: str, monkeypatch: pytest.MonkeyPatch, text: str, threads: int
):
    """PyTorch has as many threads as before."""
    asked: list[int] = []
    monkeypatch.setenv("LLQ_CPU_THREADS", text)
    monkeypatch.setattr(native.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(native, "_function", lambda *of: lambda *given: asked.append(given[-1]))
    native._wanted_threads.cache_clear()
    try:
        grid = Uniform(4, 128)
        stored = grid.readable(rounded(grid, (8, 128)), 128)
        native.digits(torch.ones(1, 128), stored, None)
        native.decode(stored, 0, 8, torch.empty(8, 128))
        assert asked == [threads, threads]
        assert native.describe().endswith(f"threads: {threads}")
    finally:
        native._wanted_threads.cache_clear()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "\u0662", " "])
def test_a_wrong_llq_cpu_threads_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("LLQ_CPU_THREADS", text)
    native._wanted_threads.cache_clear()
    native.backend.cache_clear()
    try:
        for ask in (native.describe, native.compiled):
            with pytest.raises(LLQError, match=r"LLQ_CPU_THREADS=.* give one from 1 to 1024"):
                ask()
    finally:
        native._wanted_threads.cache_clear()
        native.backend.cache_clear()


# --- dispatch -------------------------------------------------------------------------------------


def test_gradients_and_calibration_go_by_torch(isa: str):
    grid = Uniform(4, 128)
    packed = rounded(grid, (32, 256))
    stored = grid.readable(packed, 256)
    x = torch.randn(2, 256, generator=generator())
    assert kernels.choose(x, stored) is not None
    assert kernels.choose(x.clone().requires_grad_(), stored) is None
    with kernels.reference():
        assert kernels.choose(x, stored) is None
        expected = F.linear(x, grid.unpack(packed, 256))
        assert torch.equal(grid.linear(x, packed, None), expected)
    assert kernels.choose(x, stored) is not None


def tensors_of(linear: QuantLinear) -> list[Tensor]:
    return [getattr(linear, name) for name in linear.layout]


def test_cached_tensors_end_with_the_tensors(isa: str):
    """They are the same from call to call, and new after a tensor was replaced, filled, moved or
    copied.
    """
    method, x = build("rtn", bits=4), torch.randn(2, 256, generator=generator()).bfloat16()
    packs = [
        method.quantize(torch.randn(32, 256, generator=generator(seed)), None, Job("x"))
        for seed in range(4)
    ]
    linear = QuantLinear.from_packed(
        method, nn.Linear(256, 32, bias=False), {k: t.clone() for k, t in packs[0].items()}
    )

    def agrees(module: QuantLinear, packed: Packed) -> bool:
        expected = F.linear(x.float(), method.dequantize(packed, 32, 256))
        return error(module(x).float(), expected) < 0.01

    assert agrees(linear, packs[0])
    cached = kernels.cached_tensors(linear.layout, tensors_of(linear))
    assert agrees(linear, packs[0])
    assert kernels.cached_tensors(linear.layout, tensors_of(linear)) is cached
    linear.weight.data = packs[1]["weight"]  # the same tensor at another address
    linear.scale = packs[1]["scale"]  # another tensor
    linear.zero.copy_(packs[1]["zero"])  # the same tensor, written to
    assert agrees(linear, packs[1])
    linear.load_state_dict(packs[2])
    assert agrees(linear, packs[2])
    twin = copy.deepcopy(linear.to(torch.float16))
    twin.load_state_dict(packs[3])
    assert agrees(twin, packs[3])
    assert agrees(linear, packs[2])


def test_values_filled_in_place_are_read_anew(isa: str):
    """SliM-LLM's widths are made into lists for kernels, anew when the tensor gets other widths."""
    method, x = build("slim_llm", bits=2), torch.randn(2, 1024, generator=generator()).bfloat16()
    first, second = random_packed(method, 32, 1024), random_packed(method, 32, 1024)
    second["widths"] = second["widths"].flip(0)
    assert not torch.equal(first["widths"], second["widths"])
    linear = QuantLinear.from_packed(method, nn.Linear(1024, 32, bias=False), first)
    linear(x)
    linear.load_state_dict(second)
    assert error(linear(x).float(), F.linear(x.float(), method.dequantize(second, 32, 1024))) < 0.01


def test_codes_that_c_cannot_read_go_by_torch(isa: str):
    grid = Uniform(4, 128)
    packed = rounded(grid, (32, 256))
    x = torch.randn(1, 256, generator=generator())
    expected = grid.linear(x, packed, None)
    strided = {**packed, "scale": packed["scale"].T.contiguous().T}
    assert kernels.choose(x, grid.readable(strided, 256)) is None
    assert error(grid.linear(x, strided, None), expected.double()) < FLOATS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {"bits": 3}),
        ("gptq", {"bits": 4, "act_order": True}),
        ("awq", {"bits": 4}),
        ("efficient_qat", {"bits": 2}),
        ("quip", {"bits": 2}),
        ("quip", {"bits": 2, "incoherence": False}),
        ("spinquant", {"bits": 4}),
        ("omniquant", {"bits": 2}),
        ("smoothquant", {"bits": 8, "a_bits": 16}),
        ("slim_llm", {"bits": 2}),
        ("db_llm", {}),
        ("db_llm", {"group_size": -1, "scale_bits": 32}),
        ("billm", {}),
        ("billm", {"block_size": 256, "scale_bits": 32}),
        ("pb_llm", {"bits": 1.7}),
        ("pb_llm", {"bits": 2.6, "group_size": 256}),
        ("pb_llm", {"bits": 3.5}),
        ("nf4", {}),
        ("nf4", {"bits": 3}),
        ("nf4", {"icq": True, "block_size": 128}),
        ("nf4", {"double_quant": False, "block_size": 32}),
        ("slim_llm", {"bits": 4, "group_size": 256, "scale_bits": 32}),
        ("slim_llm", {"bits": 3, "group_size": 64}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_methods_multiply_what_they_dequantize(
    isa: str, name: str, options: dict[str, Any], dtype: torch.dtype
):
    method = build(name, **options)
    packed = random_packed(method, 160, 1024)
    weight_OI = method.dequantize(packed, 160, 1024).double()
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 1024, generator=generator(tokens)).to(dtype)
        y = method.linear(x, packed, None, 160)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
        assert error(y, F.linear(x.double(), weight_OI)) < tolerance


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("slim_llm", {"bits": 3}),
        ("db_llm", {}),
        ("billm", {}),
        ("billm", {"scale_bits": 32}),
        ("nf4", {}),
        ("nf4", {"bits": 2, "icq": True}),
        ("nf4", {"icq": True, "double_quant": False, "block_size": 256}),
        ("pb_llm", {"bits": 1.7}),
        ("pb_llm", {"bits": 2.0, "group_size": -1, "scale_bits": 32}),
        ("pb_llm", {"bits": 1.05}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_storage_is_decoded_to_the_last_bit(
    isa: str, name: str, options: dict[str, Any], dtype: torch.dtype
):
    """The product with the unit matrix is the weight itself."""
    method = build(name, **options)
    packed = random_packed(method, 40, 512)
    found_OI = method.linear(torch.eye(512, dtype=dtype), packed, None, 40).T
    assert torch.equal(found_OI, method.dequantize(packed, 40, 512).to(dtype))


def test_a_broken_weight_breaks_no_other(isa: str):
    """Kernels pad groups to a multiple of four. Scales of another weight that were left in the
    padding must not count.
    """
    good, bad = Uniform(4, 128), Uniform(4, 128)
    x = torch.randn(1, 640, generator=generator()).bfloat16()
    packed, broken = rounded(good, (32, 640)), rounded(bad, (32, 1024))
    broken["scale"].fill_(float("inf"))
    before = good.linear(x, packed, None)
    assert not bad.linear(torch.ones(1, 1024).bfloat16(), broken, None).isfinite().all()
    assert torch.equal(good.linear(x, packed, None), before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("billm", {}),
        ("billm", {"block_size": 256, "scale_bits": 32}),
        ("db_llm", {}),
        ("db_llm", {"group_size": -1, "scale_bits": 32}),
        ("pb_llm", {"bits": 1.7}),
        ("pb_llm", {"bits": 2.0, "group_size": -1, "scale_bits": 32}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [40, 3, 131])
def test_other_products_in_digits(isa: str, name: str, options: dict[str, Any], rows: int):
    method = build(name, **options)
    packed = kernels.CachedTensors(random_packed(method, rows, 1024))
    weight_OI = method.dequantize(packed, rows, 1024).double()
    method.linear(torch.ones(1, 1024), packed, None, rows)
    stored = packed.computed["stored"]
    for tokens in (1, 2, 7):
        x = torch.randn(tokens, 1024, generator=generator(tokens))
        y = native.digits(x, stored, None)
        # Levels are rounded too, and sums cancel.
        assert error(y, F.linear(x.double(), weight_OI)) < DIGITS * 3


@pytest.mark.parametrize("n", [256, 1024, 11008, 13824])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transforms_agree_with_torch(isa: str, n: int, dtype: torch.dtype):
    Q = rotation(3, n, False, torch.device("cpu"))
    assert Q.forth is not None
    assert Q.back is not None
    divisor, factor = torch.rand(n, generator=generator()).half() + 0.5, torch.tensor([0.3])
    for shape in ((n,), (3, n), (2, 1, n)):
        x = torch.randn(shape, generator=generator(1)).to(dtype)
        forth = kernels.transformed(
            x, Q.forth, lambda: pytest.fail("torch was asked"), divisor, factor
        )
        back = kernels.transformed(x, Q.back, lambda: pytest.fail("torch was asked"))
        assert forth.dtype == back.dtype == dtype
        assert forth.shape == back.shape == x.shape
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert error(forth, 0.3 * Q.apply(x.double() / divisor.double()).double()) < tolerance
        assert error(back, Q.invert(x).double()) < tolerance


def test_transforms_that_kernels_cannot_make_go_by_torch(isa: str):
    x, slow = torch.randn(2, 96), torch.zeros(2, 96)
    odd = rotation(3, 96, False, torch.device("cpu"))  # 8 x 12: no whole vectors
    assert kernels.transformed(x, odd.forth, lambda: slow) is slow
    blocked = rotation(3, 96, True, torch.device("cpu"))
    assert kernels.transformed(x, blocked.forth, lambda: slow) is slow
    whole = rotation(3, 256, False, torch.device("cpu")).forth
    with kernels.reference():
        assert kernels.transformed(torch.randn(2, 256), whole, lambda: slow) is slow
    assert kernels.transformed(torch.randn(2, 256, requires_grad=True), whole, lambda: slow) is slow


def test_files_do_not_depend_on_kernels(
    isa: str,
    make_checkpoint: Callable[..., Path],
    calibration_npy: Path,
    tmp_path: Path,
    monkeypatch,
):
    """A calibrated run over two blocks: the second is calibrated on the output of the packed
    first.
    """
    base = make_checkpoint(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, dtype=torch.bfloat16
    )
    calibration = Calibration(str(calibration_npy), samples=8)

    def run(name: str) -> dict[str, bytes]:
        quantize_checkpoint(str(base), tmp_path / name, build("gptq", bits=2), calibration)
        return {
            file.name: file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))
        }

    with_kernels = run("with")
    monkeypatch.setattr(native, "backend", lambda: None)
    assert run("without") == with_kernels


# --- which library --------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """asked(isa): the result of `describe` with LLQ_CPU_ISA=isa, where libraries lie only in
    tmp_path / "kernels".
    """

    def ask(isa: str) -> str:
        monkeypatch.setenv("LLQ_CPU_ISA", isa)
        native.backend.cache_clear()
        return native.describe()

    monkeypatch.setenv("LLQ_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "PACKAGED", tmp_path / "nothing")
    yield ask
    native.backend.cache_clear()


def test_llq_cpu_isa_chooses(
    libraries: dict[str, Path], asked: Callable[[str], str], tmp_path: Path
):
    assert "run `llq build-kernels`" in asked("")
    for isa in native.supported():
        with pytest.raises(LLQError, match="run `llq build-kernels`"):
            asked(isa)
    (tmp_path / "kernels").mkdir()
    for path in libraries.values():
        (tmp_path / "kernels" / path.name).symlink_to(path)
    for isa in native.supported():
        assert f"compiled, {isa}" in asked(isa)
    assert native.supported()[0] in asked("")
    assert "LLQ_CPU_ISA=none" in asked("none")
    with pytest.raises(LLQError, match="sse9"):
        asked("sse9")


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = building.library(tmp_path, "avx2")
    monkeypatch.setattr(building, "FLAGS", [*building.FLAGS, "-O2"])
    assert building.library(tmp_path, "avx2") != before


def test_without_a_compiler_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(building.BuildError, match="install g"):
        building.build(tmp_path)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(building.BuildError, match="failed"):
        building.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))
