"""Runs a Gluon kernel on numpy, one program after the other.

Triton's own interpreter does not know Gluon. A kernel's function is plain Python over
`gluon.language`, so it runs when that name stands for the classes below. They compute on whole
tensors and ignore layouts: that no thread has to give a bit away is what `assert_trivial` claims,
and the compiler checks (test_compiles.py).
"""

from __future__ import annotations

import re
import types
from typing import Any

import numpy as np
import torch

NUMPY = {
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.float16: np.float16,
    torch.float32: np.float32,
}


class Kind:
    """A dtype. bf16 numbers are fp32 ones that were rounded."""

    def __init__(self, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, dtype

    def rounded(self, values: np.ndarray) -> np.ndarray:
        if self.name != "bf16":
            return values.astype(self.dtype)
        return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


FLOAT32, BFLOAT16, FLOAT16 = (
    Kind("fp32", np.float32),
    Kind("bf16", np.float32),
    Kind("fp16", np.float16),
)
KINDS = {"bf16": BFLOAT16, "fp16": FLOAT16}
OF_TORCH = {
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
    torch.int32: Kind("i32", np.int32),
    torch.uint8: Kind("u8", np.uint8),
    torch.int8: Kind("i8", np.int8),
}


class Memory:
    """A torch tensor that a kernel reads or writes through pointers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.kind = tensor, OF_TORCH[tensor.dtype]
        flat = tensor.contiguous().view(-1)
        self.values = (flat.float() if self.kind is BFLOAT16 else flat).numpy().copy()
        self.written = np.zeros(len(self.values), bool)

    def write_back(self) -> None:
        if self.written.any():
            self.tensor.view(-1).copy_(torch.from_numpy(self.values))


class Pointer:
    def __init__(self, memory: Memory, at: Any = 0) -> None:
        self.memory, self.at = memory, np.asarray(at, np.int64)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(value(more), np.int64))

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.kind)


def value(x: Any) -> Any:
    return x.values if isinstance(x, Array) else x


class Array:
    """A tensor of a kernel."""

    def __init__(self, values: Any, kind: Kind | None = None) -> None:
        self.values = np.asarray(values)
        self.kind = kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Kind | None:
        return self.kind

    def to(self, kind: Kind, bitcast: bool = False) -> Array:
        if bitcast:
            return Array(self.values.view(kind.dtype), kind)
        return Array(kind.rounded(self.values), kind)

    def __and__(self, other: Any) -> Array:
        return Array(self.values & value(other))


def _operator(name: str) -> Any:
    def apply(self: Array, other: Any) -> Array:
        mine, theirs = self.values, value(other)
        if isinstance(theirs, (int, float)) and not isinstance(theirs, bool):
            integers = mine.dtype.kind in "iub" and isinstance(theirs, int)
            theirs = np.asarray(
                theirs, mine.dtype if integers or mine.dtype.kind == "f" else np.float32
            )
        with np.errstate(all="ignore"):
            if name in ("__lshift__", "__rshift__"):
                theirs = np.asarray(theirs).astype(mine.dtype)
            found = getattr(np.asarray(mine), name)(theirs)
        return Array(found, self.kind)

    return apply


ARITHMETIC = "add radd sub rsub mul rmul floordiv mod"
BITS = "and or xor lshift rshift"
ORDER = "lt le gt ge eq ne"
for _name in f"{ARITHMETIC} {BITS} {ORDER}".split():
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))


class Language:
    """What a kernel calls `gl`."""

    float32, bfloat16, float16 = FLOAT32, BFLOAT16, FLOAT16
    uint32, int32, int16, uint8, int64 = (
        Kind("u32", np.uint32), Kind("i32", np.int32), Kind("i16", np.int16), Kind("u8", np.uint8),
        Kind("i64", np.int64),
    )  # fmt: skip
    constexpr = staticmethod(lambda x: x)

    def __init__(self) -> None:
        self.program = 0

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *args, **more: None
        raise AttributeError(name)

    def program_id(self, axis: int) -> int:
        assert axis == 0
        return self.program

    def static_range(self, *bounds: int) -> range:
        return range(*bounds)

    def arange(self, first: int, last: int, layout: Any = None) -> Array:
        return Array(np.arange(first, last, dtype=np.int32))

    def full(self, shape: Any, fill: Any, kind: Kind, layout: Any = None) -> Array:
        return Array(np.full(shape, fill, kind.dtype), kind)

    def zeros(self, shape: Any, kind: Kind, layout: Any = None) -> Array:
        return self.full(shape, 0, kind)

    def zeros_like(self, x: Array) -> Array:
        return Array(np.zeros_like(x.values), x.kind)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return Array(np.expand_dims(x.values, axis), x.kind)

    def permute(self, x: Array, order: Any) -> Array:
        return Array(x.values.transpose(order), x.kind)

    def reshape(self, x: Array, shape: Any) -> Array:
        return Array(x.values.reshape(shape), x.kind)

    def split(self, x: Array) -> tuple[Array, Array]:
        return Array(x.values[..., 0], x.kind), Array(x.values[..., 1], x.kind)

    def allocate_shared_memory(self, kind: Kind, shape: Any, layout: Any) -> Ring:
        return Ring(shape, kind)

    def convert_layout(self, x: Array, layout: Any, assert_trivial: bool = False) -> Array:
        return x

    def minimum(self, x: Any, y: Any) -> Array:
        return Array(np.minimum(value(x), value(y)))

    def where(self, mask: Array, x: Any, y: Any) -> Array:
        kind = x.kind if isinstance(x, Array) else None
        return Array(np.where(value(mask), value(x), value(y)), kind)

    def sum(self, x: Array, axis: int) -> Array:
        return Array(x.values.sum(axis, dtype=np.float32))

    def max(self, x: Array, axis: int) -> Array:
        return Array(x.values.max(axis))

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Array:
        memory, at = pointer.memory, pointer.at
        live = (
            np.ones(at.shape, bool)
            if mask is None
            else np.broadcast_to(value(mask), np.broadcast_shapes(at.shape, value(mask).shape))
        )
        at = np.broadcast_to(at, live.shape)
        inside = (at >= 0) & (at < len(memory.values))
        assert (inside | ~live).all(), "a load outside of its tensor"
        found = memory.values[np.where(live, at, 0)]
        return Array(np.where(live, found, np.asarray(other, found.dtype)), memory.kind)

    def store(self, pointer: Pointer, x: Array, mask: Any) -> None:
        live = np.broadcast_to(value(mask), x.values.shape)
        at = np.broadcast_to(pointer.at, x.values.shape)[live]
        assert not pointer.memory.written[at].any(), "two programs wrote one number"
        pointer.memory.values[at], pointer.memory.written[at] = x.values[live], True

    def inline_asm_elementwise(
        self, code: str, kinds: str, args: list[Array], dtype: Kind, is_pure: bool, pack: int
    ) -> Array:
        words = args[0].values.astype(np.uint32)
        words = words.reshape(*words.shape[:-1], -1, pack)[..., 0]
        assert " " not in kinds, "constraints stand without blanks, as LLVM documents them"
        results = _run_ptx(code, words, outputs=kinds.count("="))
        halves = np.stack(results, -1)[..., None] >> np.array([0, 16], np.uint32) & 0xFFFF
        halves = halves.reshape(*args[0].values.shape).astype(np.uint16)
        if dtype is FLOAT16:
            return Array(halves.view(np.float16), dtype)
        return Array((halves.astype(np.uint32) << 16).view(np.float32), dtype)


class Ring:
    """Shared memory, whose first axis is a place for each step."""

    def __init__(self, shape: Any, kind: Kind) -> None:
        self.values = np.zeros(shape, kind.dtype)
        self.kind = kind

    def index(self, place: int) -> Ring:
        part = Ring((0,), self.kind)
        part.values = self.values[place]
        return part

    def load(self, layout: Any) -> Array:
        return Array(self.values.copy(), self.kind)


class AsyncCopy:
    """Copies that are there at once."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def async_copy_global_to_shared(self, ring: Ring, pointer: Pointer) -> None:
        ring.values[...] = self.language.load(pointer).values.view(ring.values.dtype)

    def commit_group(self) -> None: ...

    def wait_group(self, outstanding: int) -> None: ...


def mma_v2(a: Array, b: Array, sums: Array) -> Array:
    product = a.values.astype(np.float64) @ b.values.astype(np.float64)
    return Array((sums.values + product).astype(np.float32))


def _prmt(a: Any, b: Any, selector: Any) -> np.ndarray:
    """PTX's prmt in its default mode."""
    a, b, selector = np.broadcast_arrays(*(np.asarray(v, np.uint32) for v in (a, b, selector)))
    pool = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    pool = np.stack(pool)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = np.take_along_axis(pool, (nibble & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    return out


def _lop3(a: Any, b: Any, c: Any, table: int) -> np.ndarray:
    a, b, c = np.broadcast_arrays(*(np.asarray(v, np.uint32) for v in (a, b, c)))
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            terms = [v if i >> shift & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _run_ptx(code: str, words: np.ndarray, outputs: int) -> list[np.ndarray]:
    """The outputs $0, $1, ... of a few PTX instructions on the input word."""
    registers: dict[str, Any] = {f"${outputs + i}": words for i in range(16)}

    def read(operand: str) -> Any:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for line in re.sub(r"[{}]", "", code).split(";"):
        found = re.match(r"\s*(\w+)\.b32\s+(.*)", line)
        if not found or line.strip().startswith(".reg"):
            continue
        name, (to, *operands) = found[1], [part.strip() for part in found[2].split(",")]
        given = [read(operand) for operand in operands]
        if name == "lop3":
            registers[to] = _lop3(*given[:3], int(operands[3], 0))
        elif name == "prmt":
            registers[to] = _prmt(*given)
        elif name == "and":
            registers[to] = given[0] & given[1]
        elif name == "shl":
            registers[to] = given[0] << given[1]
        elif name == "shr":
            registers[to] = given[0] >> given[1]
        else:
            raise NotImplementedError(line)
    return [registers[f"${i}"] for i in range(outputs)]


class Emulated:
    """A kernel of a Gluon module, to be launched as the compiled one is."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            memories = {id(a): Memory(a) for a in args if isinstance(a, torch.Tensor)}
            given = [Pointer(memories[id(a)]) if isinstance(a, torch.Tensor) else a for a in args]
            language = Language()
            function = _plain(self.kernel, language, {})
            for language.program in range(grid[0]):
                function(*given, **constants)
            for memory in memories.values():
                memory.write_back()

        return launch


def _plain(kernel: Any, language: Language, done: dict[int, Any]) -> Any:
    """The Python function of a jitted one, in which `gl` is `language` and so are all callees'."""
    if id(kernel) in done:
        return done[id(kernel)]
    function = kernel.fn
    names: dict[str, Any] = dict(function.__globals__)
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    done[id(kernel)] = copy
    for name in function.__code__.co_names:
        found = names.get(name)
        if name == "gl":
            names[name] = language
        elif name == "mma_v2":
            names[name] = mma_v2
        elif name == "async_copy":
            names[name] = AsyncCopy(language)
        elif hasattr(found, "fn"):
            names[name] = _plain(found, language, done)
        elif type(found).__name__ == "constexpr":
            names[name] = found.value
    return copy
