"""Packed weights as kernels see them: which tensors, and how they are to be read. Nothing is
copied.

Legend: O out_features, I in_features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .bitpack import BLOCK, UNIT


@dataclass(frozen=True, eq=False)
class Part:
    """A run of codes of one width: `columns` of them in each row, from byte `start` of the row on.

    blocks: int32, which 128 columns of the weight each block stands for; None: all of them, in
    order.
    """

    bits: int
    columns: int
    start: int = 0
    blocks: Tensor | None = None
    zero_step: float = 1.0


@dataclass(frozen=True, eq=False)
class _Stored:
    """memo: what kernels found out about it, once: finding it again would take as long as a small
    product.
    """

    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, eq=False)
class UniformCodes(_Stored):
    """value = scale * (code - zero), with a scale and a zero for every row and group of columns.

    scale: [O, G] fp16 or fp32, or one number; zero: codes packed over [O, G], or one number. Groups
    of `group_size` columns; the last may be shorter.
    """

    weight: Tensor
    columns: int
    parts: tuple[Part, ...]
    scale: Tensor | float
    zero: Tensor | float
    group_size: int
    zero_bits: int = 0

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def groups(self) -> int:
        return self.scale.shape[1] if isinstance(self.scale, Tensor) else 1

    @property
    def whole_blocks(self) -> bool:
        """Whether no block of 128 columns belongs to two groups."""
        return self.groups == 1 or self.group_size % BLOCK == 0

    @property
    def half_blocks(self) -> bool:
        """Whether no half block, 64 columns, belongs to two groups."""
        return self.groups == 1 or self.group_size % (BLOCK // 2) == 0

    @property
    def centred(self) -> bool:
        """Whether int8 holds code - zero, with one scale a row: products can be those of integers."""
        middle = self.zero == 2 ** (self.parts[0].bits - 1) and len(self.parts) == 1
        return middle and isinstance(self.scale, Tensor) and self.groups == 1

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.weight, self.scale, self.zero, *(part.blocks for part in self.parts))
        return [tensor for tensor in found if isinstance(tensor, Tensor)]


class _ByRow(_Stored):
    """Storage whose weight [O, ..] and scale [O, G, ..] have a row for every output."""

    weight: Tensor
    scale: Tensor

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def groups(self) -> int:
        return self.scale.shape[1]


@dataclass(frozen=True, eq=False)
class LevelCodes(_ByRow):
    """2-bit codes that pick one of four levels of their row and group, or of four others in salient
    columns.

    scale [O, G, 2]: a level is the sum of the scales whose bit is set (dual binarization). scale
    [O, G, 4] with mean [O, G, 3 or 4]: bit 1 says low or mid, bit 0 the sign: mean +- scale; in
    salient columns both are signs, of two scales around one mean (or the sum of two). salient:
    packed bits [I].
    """

    weight: Tensor
    columns: int
    scale: Tensor
    group_size: int
    mean: Tensor | None = None
    salient: Tensor | None = None

    @property
    def whole_blocks(self) -> bool:
        return (self.groups == 1 or self.group_size % BLOCK == 0) and self.columns % BLOCK == 0

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.weight, self.scale, self.mean, self.salient)
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True, eq=False)
class Numbers:
    """fp32 values, or uint8 codes: values = map[codes] * step + mean, a step for every 256 codes."""

    values: Tensor
    map: Tensor | None = None
    step: Tensor | None = None
    mean: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.values, self.map, self.step, self.mean)
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True, eq=False)
class TableCodes(_Stored):
    """value = levels[code] * scale + shift, with a scale and a shift for every `group_size` weights
    of the flat matrix.

    levels: fp32 [2**bits], of at most 4 bits. 4-bit codes: the first of two in the high half of a
    byte.
    """

    weight: Tensor
    rows: int
    columns: int
    bits: int
    levels: Tensor
    group_size: int
    scale: Numbers
    shift: Numbers | None = None

    @property
    def groups(self) -> int:
        """In a row."""
        return self.columns // self.group_size

    @property
    def whole_blocks(self) -> bool:
        """Whether groups and blocks of codes end where rows do."""
        whole = self.columns % self.group_size == 0 and self.group_size % UNIT == 0
        return whole and (self.bits == 4 or self.columns % BLOCK == 0)

    @property
    def half_groups(self) -> bool:
        """Whether codes have 4 bits, rows are whole blocks, and groups whole half blocks of 64
        columns.
        """
        whole = (
            self.columns % max(self.group_size, BLOCK) == 0 and self.group_size % (BLOCK // 2) == 0
        )
        return self.bits == 4 and whole

    @property
    def tensors(self) -> list[Tensor]:
        return [
            self.weight,
            self.levels,
            *self.scale.tensors,
            *(self.shift.tensors if self.shift else []),
        ]


@dataclass(frozen=True, eq=False)
class SalientCodes(_ByRow):
    """value = mean +- scale by the sign bits [O, I] in `weight`, a mean and a scale for every row
    and group of columns.

    Of `count` listed weights the sign is the top bit of a code of 8 bits, whose others lie in `code`: value = own_scale
    * (code - own_zero), with a grid for every row. The list is Elias and Fano's: `low_bits` of a position as they are,
    its high part in unary among `unary` bits.
    """

    weight: Tensor
    columns: int
    scale: Tensor
    mean: Tensor
    group_size: int
    own_scale: Tensor
    own_zero: Tensor
    code: Tensor
    high: Tensor
    low: Tensor | None
    count: int
    unary: int
    low_bits: int

    @property
    def whole_blocks(self) -> bool:
        return self.groups == 1 or self.group_size % BLOCK == 0

    @property
    def tensors(self) -> list[Tensor]:
        found = [
            self.weight,
            self.scale,
            self.mean,
            self.own_scale,
            self.own_zero,
            self.code,
            self.high,
        ]
        return found if self.low is None else [*found, self.low]


@dataclass(frozen=True, eq=False)
class Turn(_Stored):
    """A transform in two factors: n = A * B numbers x[source] seen as [A, B], left @ . @ right, and
    of that [target].

    source, target: int32 [n]; left: fp32 [A, A]; right: fp32 [B, B].
    """

    source: Tensor
    left: Tensor
    right: Tensor
    target: Tensor

    @property
    def whole_vectors(self) -> bool:
        return self.right.shape[0] % 16 == 0

    @property
    def tensors(self) -> list[Tensor]:
        return [self.source, self.left, self.right, self.target]


Stored = UniformCodes | LevelCodes | TableCodes | SalientCodes


Made = TypeVar("Made")


class CachedTensors(dict[str, Tensor]):
    """Stored tensors by name, and what `once` has computed from them so far."""

    def __init__(self, packed: Mapping[str, Tensor]) -> None:
        super().__init__(packed)
        self.computed: dict[str, Any] = {}


class _CacheEntry(NamedTuple):
    """Cached tensors, and what must be unchanged for them to be reused.

    state: the address and the version counter of every tensor.
    """

    first: ReferenceType[Tensor]
    others: list[Tensor]
    state: list[tuple[int, int]]
    tensors: CachedTensors


_CACHE: dict[int, _CacheEntry] = {}  # by the id of a linear's first tensor; an entry ends with it


def cached_tensors(names: Iterable[str], tensors: Sequence[Tensor]) -> CachedTensors:
    """The CachedTensors of a linear: the same object until a tensor is replaced, moved or written.

    The tensors alone are the key, so that an operator in a graph, which is given no more than
    them, finds the same object.
    """
    first, *others = tensors
    if any(map(Tensor.is_inference, tensors)):  # these have no version counter
        return CachedTensors(dict(zip(names, tensors, strict=True)))
    state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    key = id(first)
    entry = _CACHE.get(key)
    if (
        entry is not None
        and entry.first() is first
        and entry.state == state
        and all(map(is_, entry.others, others))
    ):
        return entry.tensors
    found = CachedTensors(dict(zip(names, (tensor.data for tensor in tensors), strict=True)))
    ending = partial(_CACHE.pop, key)  # called with the dead reference, which serves as the default
    _CACHE[key] = _CacheEntry(ref(first, ending), others, state, found)
    return found


def once(packed: dict[str, Tensor], make: Callable[[], Made], name: str = "stored") -> Made:
    """The result of `make`, computed once for CachedTensors and each time for a plain dict.

    Values that the host reads from a tensor belong in here as well: on a GPU each reading waits
    for the device, and a CUDA graph may not contain one.
    """
    if not isinstance(packed, CachedTensors):
        return make()
    if name not in packed.computed:
        packed.computed[name] = make()
    made: Made = packed.computed[name]
    return made


def readable(stored: Stored | Turn) -> bool:
    """Whether every tensor lies in memory as C expects it."""
    dtypes = (torch.int32, torch.uint8, torch.float16, torch.float32)
    return all(
        t.is_contiguous() and t.dtype in dtypes and t.device.type == "cpu" for t in stored.tensors
    )
