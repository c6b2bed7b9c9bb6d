"""The compiled CPU kernels: finding the library for this processor, and calling it through ctypes.

Legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.errors import LLQError
from ..common.machine import cache_root
from .build import ISAS, PACKAGED, library
from .views import (
    LevelCodes,
    Numbers,
    Part,
    SalientCodes,
    Stored,
    TableCodes,
    Transform,
    UniformCodes,
    View,
)

DTYPES = {torch.float16: 1, torch.float32: 2, torch.bfloat16: 3}
FAMILIES = {
    UniformCodes: "uniform",
    LevelCodes: "levels",
    TableCodes: "table",
    SalientCodes: "salient",
}
# Rows decoded at once: 4 MB of bf16 at 4096 columns, which stay in the cache until multiplied.
TILE = 512
MOST_THREADS = 1024
# Of the stored tensors that C reads.
READABLE = (torch.int32, torch.uint8, torch.float16, torch.float32)

Buffer = ctypes.c_void_p
Int = ctypes.c_int32

# The arguments of the C functions after the structs; cpp/cpu.cpp defines them. Declared types make
# ctypes convert faster than Python code could.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "digits": (Buffer, Int, Buffer, Int, Int, Int, Buffer, Buffer, Int),
    "floats": (Buffer, Int, Buffer, Int, Int, Int, Buffer, Buffer, Int),
    "decode": (Buffer, Int, Int, Int, Int, Int, Buffer, Int),
    "centred": (Buffer, Int, Int, Int, Buffer, Int),
    "transform": (Buffer, Buffer, Int, Int, Buffer, Buffer, Buffer, Int),
}


class _Uniform(ctypes.Structure):
    """`Uniform` of cpp/uniform.h."""

    _fields_ = (
        ("weight", Buffer),
        ("row_bytes", ctypes.c_int64),
        ("scale", Buffer),
        ("zero", Buffer),
        ("blocks", Buffer),
        *(
            (name, Int)
            for name in (
                "rows",
                "columns",
                "bits",
                "groups",
                "group_size",
                "scale_dtype",
                "zero_bits",
            )
        ),
        *((name, ctypes.c_float) for name in ("scale_value", "zero_value", "zero_step")),
    )


class _Levels(ctypes.Structure):
    """`Levels` of cpp/levels.h."""

    _fields_ = (
        ("weight", Buffer),
        ("row_bytes", ctypes.c_int64),
        ("scale", Buffer),
        ("mean", Buffer),
        ("salient", Buffer),
        *((name, Int) for name in ("rows", "columns", "groups", "group_size", "dtype", "means")),
    )


class _Numbers(ctypes.Structure):
    """`Numbers` of cpp/table.h."""

    _fields_ = (("values", Buffer), ("map", Buffer), ("step", Buffer), ("mean", Buffer))


class _Table(ctypes.Structure):
    """`Table` of cpp/table.h."""

    _fields_ = (
        ("weight", Buffer),
        ("levels", Buffer),
        ("scale", _Numbers),
        ("shift", _Numbers),
        *((name, Int) for name in ("rows", "columns", "groups", "group_size", "bits")),
    )


class _Salient(ctypes.Structure):
    """`Salient` of cpp/salient.h."""

    _fields_ = (
        ("weight", Buffer),
        ("row_bytes", ctypes.c_int64),
        *(
            (name, Buffer)
            for name in ("scale", "mean", "own_scale", "own_zero", "code", "high", "low")
        ),
        *((name, ctypes.c_int64) for name in ("count", "unary")),
        *((name, Int) for name in ("rows", "columns", "groups", "group_size", "dtype", "low_bits")),
    )


class _Transform(ctypes.Structure):
    """`Turn` of cpp/turn.h."""

    _fields_ = (
        *((name, Buffer) for name in ("source", "left", "right", "target")),
        ("a", Int),
        ("b", Int),
    )


class Backend(NamedTuple):
    """A loaded library, and the instruction set that it was compiled for."""

    isa: str
    path: Path
    library: ctypes.CDLL


def cache_folder() -> Path:
    """Where kernels are built if the package's own folder is read-only."""
    return cache_root() / "kernels"


def supported() -> list[str]:
    """The instruction sets that both this processor and our kernels have, best first."""
    has_vnni = (
        torch.cpu._is_vnni_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    more = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_vbmi2 = has_vnni and all(
        more.get(f"avx512_{name}") for name in ("vbmi", "vbmi2", "vpopcntdq")
    )
    has = {"avx512vbmi2": has_vbmi2, "avx512": has_vnni, "avx2": torch.cpu._is_avx2_supported()}
    return [isa for isa in ISAS if has[isa]]


@cache
def _wanted_threads() -> int | None:
    """What LLQ_CPU_THREADS asks for; None where it is not set."""
    text = os.environ.get("LLQ_CPU_THREADS", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_THREADS):
        raise LLQError(
            f"LLQ_CPU_THREADS={text} is no number of threads; give one from 1 to {MOST_THREADS}, "
            "or unset it to have as many as PyTorch"
        )
    return int(text)


def threads() -> int:
    """On how many threads a kernel may run: LLQ_CPU_THREADS, or as many as PyTorch's."""
    return _wanted_threads() or torch.get_num_threads()


@cache
def backend() -> Backend | None:
    """The library that serves this process; None if there is none or LLQ_CPU_ISA=none.

    LLQ_CPU_ISA=avx2 selects that instruction set. LLQError if its library is missing, or if the
    processor does not have it, or if LLQ_CPU_THREADS is wrong.
    """
    _wanted_threads()
    wanted, isas = os.environ.get("LLQ_CPU_ISA"), supported()
    if wanted == "none":
        return None
    if wanted and wanted not in isas:
        raise LLQError(
            f"LLQ_CPU_ISA={wanted} is not one of none, {', '.join(isas)}, which this processor has"
        )
    for isa in [wanted] if wanted else isas:
        for folder in (PACKAGED, cache_folder()):
            path = library(folder, isa)
            if path.is_file():
                return Backend(isa, path, ctypes.CDLL(str(path)))
    if wanted:
        raise LLQError(f"LLQ_CPU_ISA={wanted}: its kernels are not built; run `llq build-kernels`")
    return None


def compiled() -> bool:
    """Whether a library serves this process."""
    return backend() is not None


def describe() -> str:
    """One line for people: what multiplies packed weights on this machine's CPU."""
    found = backend()
    if found is not None:
        return f"compiled, {found.isa} ({found.path.name}), threads: {threads()}"
    if os.environ.get("LLQ_CPU_ISA") == "none":
        return "torch operations (LLQ_CPU_ISA=none)"
    if not supported():
        return "torch operations (no kernels for this processor)"
    return "torch operations (kernels are not built: run `llq build-kernels`)"


# --- products -------------------------------------------------------------------------------------


def digits(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """F.linear of few tokens, each activation as two int8 digits. With Gaussian activations the
    relative error is 5e-5, less than that of bf16. fp32 activations of uniform codes get two more
    digits, and errors are those of fp32 sums.
    """
    return _dot("digits", x, stored, bias)


def floats(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """F.linear of few tokens in fp32."""
    return _dot("floats", x, stored, bias)


def tiles(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """F.linear of many tokens: decodes `TILE` rows of the weight at a time, bit for bit as torch
    does, and multiplies them.
    """
    tile_RI = torch.empty(min(TILE, stored.rows), stored.columns, dtype=x.dtype)
    x_TI = x.reshape(-1, stored.columns)
    y_TO = torch.empty(len(x_TI), stored.rows, dtype=x.dtype)
    for first in range(0, stored.rows, TILE):
        last = min(first + TILE, stored.rows)
        decode(stored, first, last, tile_RI)
        part = None if bias is None else bias[first:last]
        y_TO[:, first:last] = F.linear(x_TI, tile_RI[: last - first], part)
    return y_TO.view(*x.shape[:-1], stored.rows)


def integer_tiles(x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    """fp32 y of many tokens whose activations are int8 codes, with int32 sums. Each row of the
    weight has one scale, and its zero is the middle code.
    """
    assert isinstance(stored, UniformCodes)
    scale, zero = stored.scale, stored.zero
    assert isinstance(scale, Tensor)
    assert isinstance(zero, float)
    tile_RI = torch.empty(min(TILE, stored.rows), stored.columns, dtype=torch.int8)
    x_TI = x.reshape(-1, stored.columns).contiguous()
    y_TO = torch.empty(len(x_TI), stored.rows)
    given, centred = structs(stored), _function(type(stored), "centred")
    for first in range(0, stored.rows, TILE):
        last = min(first + TILE, stored.rows)
        centred(given, first, last, int(zero), tile_RI.data_ptr(), threads())
        y_TO[:, first:last] = torch._int_mm(x_TI, tile_RI[: last - first].T)
    y_TO *= scale.float().T
    return (y_TO if bias is None else y_TO + bias).view(*x.shape[:-1], stored.rows)


def decode(stored: Stored, first: int, last: int, out_RI: Tensor) -> None:
    """Decode the rows from `first` up to `last` of the weight into the first rows of `out_RI`, in
    its dtype.
    """
    given = structs(stored)
    where = (stored.columns, first, last, DTYPES[out_RI.dtype], out_RI.data_ptr())
    _function(type(stored), "decode")(given, len(given), *where, threads())


def transform(x: Tensor, by: Transform, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    """factor * (the transform `by` of x / divisor), computed in fp32, in the dtype of x."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = (
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // x.shape[-1],
        _pointer(divisor),
        _pointer(factor),
        y.data_ptr(),
    )
    found = backend()
    assert found is not None
    function = _bound(found.library, "llq_turn", "transform")
    function(structs(by), *rows, threads())
    return y


def _dot(name: str, x: Tensor, stored: Stored, bias: Tensor | None) -> Tensor:
    # Little Python: in a decoding step each call finds it cold, which costs as much as the product.
    function, given, count, rows, columns = stored.once(name, lambda: _prepared(name, stored))
    x = (x if x.is_floating_point() else x.float()).contiguous()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    bias_O = None if bias is None else bias.float().contiguous()
    activations = (x.data_ptr(), DTYPES[x.dtype], columns, x.numel() // columns)
    function(given, count, *activations, _pointer(bias_O), y.data_ptr(), threads())
    return y


def _prepared(name: str, stored: Stored) -> tuple[Any, Any, int, int, int]:
    """What every such product with this weight needs: the C function, the structs and their number,
    rows and columns.
    """
    given = structs(stored)
    return _function(type(stored), name), given, len(given), stored.rows, stored.columns


def _function(kind: type[Stored], name: str) -> Any:
    """The C function of this name for such storage: llq_uniform_digits, llq_levels_decode, ..."""
    found = backend()
    assert found is not None
    return _bound(found.library, f"llq_{FAMILIES[kind]}_{name}", name)


@cache
def _bound(library: ctypes.CDLL, function: str, name: str) -> Any:
    found = getattr(library, function)
    found.argtypes, found.restype = ARGUMENTS[name], None
    return found


def structs(view: View) -> Any:
    """A C array of the structs that describe `view`: one, or one for each part of uniform codes.
    None where C cannot read the tensors.
    """
    return view.once("structs", lambda: _structs(view) if _fits_c(view) else None)


def _fits_c(view: View) -> bool:
    """Whether every tensor lies in memory as C expects it."""
    return all(
        tensor.is_contiguous() and tensor.dtype in READABLE and tensor.device.type == "cpu"
        for tensor in view.tensors
    )


def _structs(view: View) -> Any:
    if isinstance(view, UniformCodes):
        each = [_uniform_struct(view, part) for part in view.parts]
    else:
        makers: dict[type, Any] = {
            LevelCodes: _levels_struct,
            TableCodes: _table_struct,
            SalientCodes: _salient_struct,
            Transform: _transform_struct,
        }
        each = [makers[type(view)](view)]
    return (type(each[0]) * len(each))(*each)


def _transform_struct(by: Transform) -> _Transform:
    return _Transform(*map(_pointer, by.tensors), by.left.shape[0], by.right.shape[0])


def _salient_struct(stored: SalientCodes) -> _Salient:
    tensors = (
        stored.scale,
        stored.mean,
        stored.own_scale,
        stored.own_zero,
        stored.code,
        stored.high,
        stored.low,
    )
    return _Salient(
        stored.weight.data_ptr(),
        stored.weight.shape[1] * 4,
        *map(_pointer, tensors),
        stored.count,
        stored.unary,
        stored.rows,
        stored.columns,
        stored.groups,
        stored.group_size,
        DTYPES[stored.scale.dtype],
        stored.low_bits,
    )


def _table_struct(stored: TableCodes) -> _Table:
    return _Table(
        stored.weight.data_ptr(),
        stored.levels.data_ptr(),
        _numbers_struct(stored.scale),
        _numbers_struct(stored.shift),
        stored.rows,
        stored.columns,
        stored.groups,
        stored.group_size,
        stored.bits,
    )


def _numbers_struct(numbers: Numbers | None) -> _Numbers:
    parts = (
        (None,) * 4
        if numbers is None
        else (numbers.values, numbers.map, numbers.step, numbers.mean)
    )
    return _Numbers(*map(_pointer, parts))


def _levels_struct(stored: LevelCodes) -> _Levels:
    return _Levels(
        stored.weight.data_ptr(),
        stored.weight.shape[1] * 4,
        stored.scale.data_ptr(),
        _pointer(stored.mean),
        _pointer(stored.salient),
        stored.rows,
        stored.columns,
        stored.groups,
        stored.group_size,
        DTYPES[stored.scale.dtype],
        0 if stored.mean is None else stored.mean.shape[2],
    )


def _uniform_struct(stored: UniformCodes, part: Part) -> _Uniform:
    scale, zero = stored.scale, stored.zero
    return _Uniform(
        stored.weight.data_ptr() + part.start,
        stored.weight.shape[1] * 4,
        _pointer(scale),
        _pointer(zero),
        _pointer(part.blocks),
        stored.rows,
        part.columns,
        part.bits,
        stored.groups,
        stored.group_size,
        DTYPES[scale.dtype] if isinstance(scale, Tensor) else 0,
        stored.zero_bits,
        0.0 if isinstance(scale, Tensor) else scale,
        0.0 if isinstance(zero, Tensor) else zero,
        part.zero_step,
    )


def _pointer(tensor: Tensor | float | None) -> int | None:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else None
