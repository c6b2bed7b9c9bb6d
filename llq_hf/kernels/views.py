"""Views: descriptions of packed weights that kernels can read. A view names the stored tensors and
says how their bits are to be read; it copies none of them.

Legend: O out_features, I in_features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..common.errors import LLQError
from .bitpack import BLOCK, SLOT, UNIT, packed_words

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Part:
    """The codes of one width: `columns` of them in each row, from byte `start` of the row on.

    blocks: int32, the number of the 128 columns of the weight that each block of codes belongs to;
    None: the blocks are all blocks of the weight, in order.
    """

    bits: int
    columns: int
    start: int = 0
    blocks: Tensor | None = None
    zero_step: float = 1.0


@dataclass(frozen=True, eq=False)
class _View:
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_view(self)

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, computed once for this view: for example, which kernel serves a
        call. Computing it at each call would take as long as a small product.
        """
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


@dataclass(frozen=True, eq=False)
class UniformCodes(_View):
    """value = scale * (code - zero), with a scale and a zero for each row and group of columns.

    scale: [O, G] fp16 or fp32, or one number; zero: codes packed over [O, G], or one number. A
    group has `group_size` columns; the last group may be shorter.
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
    def whole_slots(self) -> bool:
        """Whether no slot of 16 columns belongs to two groups."""
        return self.groups == 1 or self.group_size % SLOT == 0

    @property
    def centred(self) -> bool:
        """Whether code - zero fits int8 and each row has one scale: the product can be computed in
        integers.
        """
        middle = self.zero == 2 ** (self.parts[0].bits - 1) and len(self.parts) == 1
        return middle and isinstance(self.scale, Tensor) and self.groups == 1

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.weight, self.scale, self.zero, *(part.blocks for part in self.parts))
        return [tensor for tensor in found if isinstance(tensor, Tensor)]


class _ByRow(_View):
    """A view whose weight [O, ..] and scale [O, G, ..] have a row for each output."""

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
    """2-bit codes that select one of four levels. Each row and group has its own four levels, and
    four others for salient columns.

    scale [O, G, 2]: a level is the sum of the scales whose bit is set (dual binarization).

    scale [O, G, 4] with mean [O, G, 3 or 4]: in most columns bit 1 says low or mid, bit 0 is a
    sign, and the level is mean +- scale. In salient columns both bits are signs, of two scales
    around one mean (or around the sum of two). salient: packed bits [I].
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
    """fp32 numbers [B]: as they are, or as uint8 codes with map[code] * step + mean, where a step
    serves `STEP_CODES` neighbours.
    """

    STEP_CODES: ClassVar[int] = 256

    values: Tensor
    map: Tensor | None = None
    step: Tensor | None = None
    mean: Tensor | None = None

    def decoded(self) -> Tensor:
        """The numbers, fp32 [B]."""
        if self.map is None or self.step is None:
            return self.values
        step_B = self.step.repeat_interleave(self.STEP_CODES)[: len(self.values)]
        numbers_B = self.map[self.values.int()] * step_B
        return numbers_B if self.mean is None else numbers_B + self.mean

    @property
    def tensors(self) -> list[Tensor]:
        found = (self.values, self.map, self.step, self.mean)
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True, eq=False)
class TableCodes(_View):
    """value = levels[code] * scale + shift, with a scale and a shift for each `group_size` weights
    of the matrix read row by row.

    levels: fp32 [2**bits], at most 4 bits. Of two 4-bit codes in a byte, the first lies in the high
    half. levels_name: how other libraries call these levels, where they know them.
    """

    weight: Tensor
    rows: int
    columns: int
    bits: int
    levels: Tensor
    group_size: int
    scale: Numbers
    shift: Numbers | None = None
    levels_name: str | None = None

    @property
    def groups(self) -> int:
        """Groups of a row."""
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
    """value = mean +- scale: the signs are bits [O, I] in `weight`, and each row and group of
    columns has a mean and a scale.

    `count` salient weights have 8-bit codes instead: value = own_scale * (code - own_zero), with
    one grid for each row. The top bit of such a code is the weight's sign bit, the others lie in
    `code`. Their positions are an Elias-Fano list: `low_bits` bits of a position are stored as they
    are, its high part in unary among `unary` bits.
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
class Transform(_View):
    """An orthogonal transform in two factors: the n = A * B numbers x[source] are seen as a matrix
    M [A, B]; the result is (left @ M @ right)[target], read as a vector again.

    source, target: int32 [n]; left: fp32 [A, A]; right: fp32 [B, B].
    """

    source: Tensor
    left: Tensor
    right: Tensor
    target: Tensor

    @cached_property
    def columns(self) -> int:
        """n"""
        return self.source.shape[0]

    @property
    def whole_vectors(self) -> bool:
        """Whether a row of M is whole vector registers of 16 fp32 numbers."""
        return self.right.shape[0] % 16 == 0

    @property
    def tensors(self) -> list[Tensor]:
        return [self.source, self.left, self.right, self.target]


@dataclass(frozen=True, eq=False)
class Kronecker(_View):
    """An orthogonal transform in two factors without shuffles: the n = A * B numbers of a vector
    are seen as a matrix M [A, B]; the result is left @ M @ right, read as a vector again.

    left: fp32 [A, A]; right: fp32 [B, B].
    """

    left: Tensor
    right: Tensor

    @cached_property
    def columns(self) -> int:
        """n"""
        return self.left.shape[0] * self.right.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.left, self.right]


@dataclass(frozen=True, eq=False)
class TokenGrid(_View):
    """The symmetric grid of `bits` that each vector of `columns` activations gets for itself:
    codes round(x / step), with step = max |x| / (2**(bits - 1) - 1), at least `least`.
    """

    bits: int
    columns: int
    least: float

    @property
    def tensors(self) -> list[Tensor]:
        return []


@dataclass(frozen=True, eq=False)
class Division(_View):
    """The division of a vector by another: divisor fp16 or fp32 [n]."""

    divisor: Tensor

    @cached_property
    def columns(self) -> int:
        """n"""
        return self.divisor.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.divisor]


Stored = UniformCodes | LevelCodes | TableCodes | SalientCodes
Turn = Transform | Kronecker
View = Stored | Turn | TokenGrid | Division


# --- what kernels rely on -------------------------------------------------------------------------

MOST = 2**31 - 2**12  # of rows, columns or groups: kernels count them, and a block more, in 32 bits


def check_view(view: Any) -> None:
    """LLQError unless every tensor of a view is as large as its numbers say: kernels read memory by
    these numbers, and check nothing. A group that is longer than what it divides is made as long.

    Numbers inside tensors that lead to memory (positions, widths) are checked by who makes a view.
    """
    if isinstance(view, Kronecker | TokenGrid | Division):
        return
    if isinstance(view, Transform):
        a, b = len(view.left), len(view.right)
        pairs = [(view.left, a * a), (view.right, b * b), (view.source, a * b)]
        _require(view, [a, b, a * b], [*pairs, (view.target, a * b)])
        return
    rows, columns = view.rows, view.columns
    whole = rows * columns if isinstance(view, TableCodes) else columns
    object.__setattr__(view, "group_size", min(view.group_size, whole))
    size = view.group_size
    _require(view, [rows, columns, size], [])
    if isinstance(view, TableCodes):
        _check_table(view)
        return
    groups = view.groups
    numbers = rows * groups
    _require(view, [groups, groups * size - columns + 1 if groups > 1 else 1], [])
    if isinstance(view, UniformCodes):
        _check_uniform(view, numbers)
    elif isinstance(view, LevelCodes):
        levels = 2 if view.mean is None else 4
        pairs = [(view.weight, rows * packed_words(columns, 2)), (view.scale, levels * numbers)]
        if view.mean is not None:
            pairs.append((view.mean, view.mean.shape[-1] * numbers))
        if view.salient is not None:
            pairs.append((view.salient, packed_words(columns, 1)))
        _require(view, [], pairs)
    else:
        _check_salient(view, numbers)


def _check_uniform(view: UniformCodes, numbers: int) -> None:
    row_bytes = view.weight.shape[1] * 4
    for part in view.parts:
        _require(view, [part.bits, 9 - part.bits], [])
        ends = part.start + 4 * packed_words(part.columns, part.bits)
        blocks = part.columns // BLOCK
        whole = part.blocks is None or part.columns == part.blocks.numel() * BLOCK
        _require(view, [row_bytes - ends + 1, int(whole)], [])
        _require(view, [], [] if part.blocks is None else [(part.blocks, blocks)])
    _require(view, [int(sum(part.columns for part in view.parts) == view.columns)], [])
    pairs = [(view.scale, numbers), (view.zero, packed_words(numbers, view.zero_bits))]
    _require(view, [], [(each, least) for each, least in pairs if isinstance(each, Tensor)])


def _check_table(view: TableCodes) -> None:
    weights = view.rows * view.columns
    numbers = -(-weights // view.group_size)
    _require(view, [view.bits, 5 - view.bits], [(view.levels, 2**view.bits)])
    words = -(-weights // 8) if view.bits == 4 else packed_words(weights, view.bits)
    pairs = [(view.weight, words)]
    for each in (view.scale, view.shift):
        if each is not None:
            pairs.append((each.values, numbers))
            if each.map is not None and each.step is not None:
                pairs += [(each.map, 256), (each.step, -(-numbers // Numbers.STEP_CODES))]
    _require(view, [], pairs)


def _check_salient(view: SalientCodes, numbers: int) -> None:
    pairs = [(view.weight, view.rows * packed_words(view.columns, 1))]
    pairs += [(each, numbers) for each in (view.scale, view.mean)]
    pairs += [(each, view.rows) for each in (view.own_scale, view.own_zero)]
    pairs += [(view.code, packed_words(view.count, 7)), (view.high, packed_words(view.unary, 1))]
    if view.low is not None:
        pairs.append((view.low, packed_words(view.count, view.low_bits)))
    listed = (view.low is not None) == (view.low_bits > 0)
    _require(view, [int(listed), view.low_bits + 1, 9 - view.low_bits], pairs)


def _require(view: Any, numbers: Iterable[int], pairs: Iterable[tuple[Tensor, int]]) -> None:
    """LLQError unless all numbers lie in 1..MOST, and tensors have at least so many elements."""
    if not all(1 <= number <= MOST for number in numbers) or any(
        tensor.numel() < least for tensor, least in pairs
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in view.tensors)
        raise LLQError(
            f"the tensors {shapes} are not what {type(view).__name__} of {view.columns} columns"
            " reads: the checkpoint is damaged"
        )
