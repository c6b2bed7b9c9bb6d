"""Uniform affine grids: the 2**b levels of each group of weights, and how they are stored.

Legend: O out_features, I in_features, g group size, G = ceil(I / g) groups, R any leading shape, C
candidate grids.

value = scale * (code - zero), code in 0..2**b - 1. Scales are found in fp32 and rounded to the
stored dtype *before* any code is chosen, so codes are optimal for the scales as stored. The grid
is that of IST-DASLab/gptq's `Quantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import Part, UniformCodes, bitpack, once, product

# The smallest fp16 above zero: a smaller scale would be stored as 0 and divide by zero.
_TINY_SCALE = 2.0**-24


class Grid(NamedTuple):
    """Scale and zero point of groups of weights, both fp32 [..., 1] or [O, G]; zero points are
    integers.
    """

    scale: Tensor
    zero: Tensor

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """Nearest code of each weight, as an fp32 integer. Rounds half to even, before the zero
        point is added.
        """
        return (weight / self.scale).round_().add_(self.zero).clamp_(0, 2**bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero)

    def per_group(self) -> list[Self]:
        """Split a grid [O, G] into one grid [O] per group."""
        parts = (part.T.contiguous() for part in self)
        return [self._replace(scale=scale, zero=zero) for scale, zero in zip(*parts, strict=True)]


class HalfGrid(Grid):
    """A grid whose zero point lies between two codes: as many levels below zero as above it, and
    none at zero.
    """

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        return (torch.round(weight / self.scale - 0.5) + (self.zero + 0.5)).clamp_(0, 2**bits - 1)


class Affine(NamedTuple):
    """A packed linear in the form that other formats use: weight = scale * (code - zero) /
    in_scale, with the scale and zero point of its group.

    Zero points are integers, or lie between two codes (levels "halves").
    """

    bits: int
    codes_OI: Tensor  # uint8, in the order of the input's columns
    scale_OG: Tensor  # fp32, as stored
    zero_OG: Tensor  # fp32
    groups_I: Tensor  # int64: group of each column
    sym: bool  # the method makes every zero point the middle code
    in_scale_I: Tensor | None = None  # fp32; the input is divided by it first

    @property
    def group_size(self) -> int:
        """Columns per group; -1 where a whole row is one group."""
        groups = self.scale_OG.shape[1]
        return -1 if groups == 1 else int((self.groups_I == 0).sum())

    @property
    def in_order(self) -> bool:
        """Whether groups are of consecutive columns."""
        return bool((self.groups_I.diff() >= 0).all())

    @property
    def weight_OI(self) -> Tensor:
        """fp32, the result of `dequantize`."""
        zero_OI = self.zero_OG[:, self.groups_I]
        weight_OI = (self.codes_OI - zero_OI) * self.scale_OG[:, self.groups_I]
        return weight_OI if self.in_scale_I is None else weight_OI / self.in_scale_I


def grouped(x: Tensor, size: int, mode: str = "constant") -> Tensor:
    """[..., I] -> [..., G, size].

    A last group that is shorter is padded with zeros, or with its last column (mode "replicate",
    for matrices only).
    """
    missing = -x.shape[-1] % size
    if missing:
        x = nn.functional.pad(x, (0, missing), mode=mode)
    return x.reshape(*x.shape[:-1], -1, size)


def at_once(device: torch.device, cpu: int = 1 << 18) -> int:
    """How many numbers an operation should work on.

    cpu: on CPUs; the default stays in the processor's cache. On GPUs it is far more, because the
    start of an operation takes as long there as its work on a million numbers.
    """
    return cpu if device.type == "cpu" else 1 << 24


def check_group_size(group_size: int, whole: str = "one group per row") -> None:
    """LLQError unless it is -1 or at least 1. whole: what -1 means, in words."""
    if group_size != -1 and group_size < 1:
        raise LLQError(f"group_size={group_size} must be -1 ({whole}) or at least 1")


def columns_per_group(group_size: int, in_features: int) -> int:
    """`group_size`; where it is -1, all columns."""
    return in_features if group_size == -1 else group_size


def scale_dtype(scale_bits: int) -> torch.dtype:
    """The dtype that scales are stored in. LLQError for widths other than 16 and 32."""
    if scale_bits not in (16, 32):
        raise LLQError(f"scale_bits={scale_bits} must be 16 (stored as fp16) or 32 (fp32)")
    return torch.float16 if scale_bits == 16 else torch.float32


def checked_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in the dtype that it is stored in. LLQError where it does not fit.

    `Uniform.stored` left the largest number of the dtype there. So that a GPU need not wait, this
    is asked once for a linear, when it is packed, and not for every grid.
    """
    stored = scale.to(dtype)
    if not bool((stored.abs() < torch.finfo(dtype).max).all()):
        width = torch.finfo(dtype).bits
        raise LLQError(f"a scale does not fit fp{width}: the weights are too large")
    return stored.contiguous()


SYMMETRIC = ("full", "absmax", "halves")


@dataclass(frozen=True)
class Uniform:
    """A kind of uniform grid, and how it is stored.

    group_size: -1 is one group per row; a last group may be shorter.
    search: shrink each range to where sum |error|**2.4 is least.
    scale_bits: 16 or 32 stored bits per scale.
    levels: of symmetric grids.
        "full": step 2 max|w| / (2**b - 1), zero at 2**(b-1). The largest weight may lie half a
            step outside.
        "absmax": step max|w| / (2**(b-1) - 1). The largest weight is the last level (SpinQuant).
        "halves": step of "full", levels at odd multiples of half a step.
    """

    bits: int
    group_size: int = -1
    sym: bool = False
    search: bool = False
    scale_bits: int = 16
    levels: str = "full"

    def __post_init__(self) -> None:
        if self.levels not in SYMMETRIC:
            raise LLQError(f"levels={self.levels!r} is unknown; there are {', '.join(SYMMETRIC)}")
        check_group_size(self.group_size)
        _ = self.scale_dtype  # validates scale_bits

    def size(self, in_features: int) -> int:
        """Columns of a group."""
        return columns_per_group(self.group_size, in_features)

    # --- finding grids ----------------------------------------------------------------------------

    def grid(self, weight_Rg: Tensor, importance_g: Tensor | None = None) -> Grid:
        """The grid of each row of weights, fp32 [R, 1]. Its range always contains zero.

        importance_g: the cost of an error in each column, where ranges are searched; None: equal.
            It may differ from group to group [G, g].

        sym: the range is always symmetric. (The authors' code leaves its lower end at 0 where a
        row has no negative weight, which halves the scale and clips the upper half.)
        """
        low = weight_Rg.amin(-1, keepdim=True).clamp_max(0)
        high = weight_Rg.amax(-1, keepdim=True).clamp_min(0)
        if self.search:
            return self._searched(weight_Rg, low, high, importance_g)
        return self._spanning(low, high)

    def grids(self, weight_OI: Tensor, importance_I: Tensor | None = None) -> Grid:
        """One grid per row and group of consecutive columns: scale and zero point [O, G]."""
        columns = weight_OI.shape[1]
        size = self.size(columns)
        # Whole groups, then a short last one: padding it would change the last bits of its errors.
        whole = columns // size * size
        cuts = [(start, stop) for start, stop in ((0, whole), (whole, columns)) if start < stop]
        rows = max(1, at_once(weight_OI.device) // columns)
        found = []
        for start, stop in cuts:
            importance_Gg = None
            if importance_I is not None:
                importance_Gg = grouped(importance_I[start:stop], min(size, stop - start))
            weight_OGg = grouped(weight_OI[:, start:stop], min(size, stop - start))
            parts = [self.grid(part, importance_Gg) for part in torch.split(weight_OGg, rows)]
            found.append(joined(parts, 0))
        grid_OG1 = joined(found, 1)
        return grid_OG1._replace(scale=grid_OG1.scale[..., 0], zero=grid_OG1.zero[..., 0])

    def spread(self, grid_OG: Grid, in_features: int) -> Grid:
        """[O, G] -> [O, I]: each column gets the scale and zero point of its group."""
        if grid_OG.scale.shape[1] == 1:
            return grid_OG
        return Grid(
            *(part.repeat_interleave(self.group_size, dim=1)[:, :in_features] for part in grid_OG)
        )

    def _spanning(self, low: Tensor, high: Tensor) -> Grid:
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        empty = low == high  # an all-zero row: any range will do, as long as the scale is not 0
        low = torch.where(empty, -1.0, low)
        high = torch.where(empty, 1.0, high)
        scale = self.stored((high - low) / self._steps)
        if self.sym:
            zero = torch.full_like(scale, self._centre)
            return HalfGrid(scale, zero) if self.levels == "halves" else Grid(scale, zero)
        return Grid(scale, torch.round(-low / scale).clamp_(0, 2**self.bits - 1))

    @property
    def _steps(self) -> int:
        """Steps from one end of the range to the other."""
        if self.sym and self.levels == "absmax":
            return int(2 * max(2 ** (self.bits - 1) - 1, 1))  # of 1 bit: codes -1 and 0
        return int(2**self.bits - 1)

    @property
    def _centre(self) -> float:
        """The zero point of symmetric grids."""
        return 2.0 ** (self.bits - 1) - (0.5 if self.levels == "halves" else 0.0)

    def _searched(
        self, weight_Rg: Tensor, low: Tensor, high: Tensor, importance_g: Tensor | None
    ) -> Grid:
        """The best grid of each row among 80 shrunken ranges (1.00 to 0.21 of the full one); of
        equally good ones, the first.

        This is the option `mse` of IST-DASLab/gptq. Asymmetric grids also try the zero point one
        code lower and higher (as GPTQModel does at 2 bits).
        """
        best = self._spanning(low, high)
        least = torch.full_like(low, torch.inf)
        axes = (-1, *(1,) * low.ndim)
        size = max(1, at_once(low.device) // weight_Rg.numel())
        candidates = (torch.split(part, size) for part in _candidates(low.device, self.sym))
        for share_C, move_C in zip(*candidates, strict=True):
            share_C11 = share_C.view(axes)
            grid = self._spanning(share_C11 * low, share_C11 * high)
            zero = (grid.zero + move_C.view(axes)).clamp_(0, 2**self.bits - 1)
            grid = grid._replace(zero=zero)
            error = self._error(grid, weight_Rg, importance_g)
            which = error.argmin(0, keepdim=True)
            error = error.gather(0, which)[0]
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = (
                torch.where(better, new.gather(0, which)[0], old)
                for new, old in zip(grid, best, strict=True)
            )
            best = grid._replace(scale=scale, zero=zero)
        return best

    def _error(self, grid: Grid, weight_Rg: Tensor, importance_g: Tensor | None) -> Tensor:
        error_Rg = grid.values(grid.codes(weight_Rg, self.bits)).sub_(weight_Rg).abs_().pow_(2.4)
        return (error_Rg if importance_g is None else error_Rg * importance_g).sum(-1, keepdim=True)

    def stored(self, scale: Tensor) -> Tensor:
        """`scale` rounded to what is stored, in fp32.

        Where it overflows it is the largest number of the dtype, which `pack` refuses.
        """
        largest = torch.finfo(self.scale_dtype).max
        return scale.clamp(_TINY_SCALE, largest).to(self.scale_dtype).float()

    # --- storing codes ----------------------------------------------------------------------------

    @property
    def scale_dtype(self) -> torch.dtype:
        return scale_dtype(self.scale_bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        """ "weight": codes. "scale": one per group. "zero": b bits per group, packed over the whole
        matrix (absent if sym).
        """
        groups = -(-in_features // self.size(in_features))
        layout = {
            "weight": Spec(
                (out_features, bitpack.packed_words(in_features, self.bits)), torch.int32
            ),
            "scale": Spec((out_features, groups), self.scale_dtype),
        }
        if not self.sym:
            layout["zero"] = Spec(
                (bitpack.packed_words(out_features * groups, self.bits),), torch.int32
            )
        return layout

    def pack(self, codes_OI: Tensor, grid_OG: Grid) -> dict[str, Tensor]:
        """Tensors of `layout` from integer codes and grids. Nothing is rounded here.

        LLQError where a scale overflows.
        """
        packed = {
            "weight": bitpack.pack(codes_OI, self.bits),
            "scale": checked_scale(grid_OG.scale, self.scale_dtype),
        }
        if not self.sym:
            packed["zero"] = bitpack.pack(grid_OG.zero.flatten(), self.bits)
        return packed

    def unpack(self, packed: dict[str, Tensor], in_features: int) -> Tensor:
        """fp32 weight [O, I] of the stored tensors."""
        scale_OG, zero_OG = self._stored_grid(packed)
        weight_OI = bitpack.unpack(packed["weight"], self.bits, in_features).float()
        groups = scale_OG.shape[1]
        if groups > 1 and in_features == groups * self.group_size:
            # A view instead of two temporary matrices [O, I].
            weight_OGg = weight_OI.view(-1, groups, self.group_size)
            weight_OGg.sub_(zero_OG[..., None]).mul_(scale_OG[..., None])
            return weight_OI
        grid = self.spread(Grid(scale_OG, zero_OG), in_features)
        return weight_OI.sub_(grid.zero).mul_(grid.scale)

    def affine(self, packed: dict[str, Tensor], in_features: int) -> Affine:
        """The stored tensors for other formats.

        `packed` may also hold "order", the input channel of each stored column, and "in_scale" (see
        `Affine`).
        """
        order_I = packed.get("order")
        in_scale_I = packed.get("in_scale")
        codes_OI = bitpack.unpack(packed["weight"], self.bits, in_features)
        groups_I = torch.arange(in_features, device=codes_OI.device) // self.size(in_features)
        if order_I is not None:
            back_I = torch.argsort(order_I)
            codes_OI = codes_OI[:, back_I]
            groups_I = groups_I[back_I]
        in_scale_I = in_scale_I.float() if in_scale_I is not None else None
        return Affine(
            self.bits, codes_OI, *self._stored_grid(packed), groups_I, self.sym, in_scale_I
        )

    def _stored_grid(self, packed: dict[str, Tensor]) -> Grid:
        """fp32 scale and zero point [O, G]."""
        scale_OG = packed["scale"].float()
        if self.sym:
            return Grid(scale_OG, torch.full_like(scale_OG, self._centre))
        zero_OG = bitpack.unpack(packed["zero"], self.bits, scale_OG.numel()).view_as(scale_OG)
        return Grid(scale_OG, zero_OG.float())

    # --- multiplying ------------------------------------------------------------------------------

    def readable(self, packed: dict[str, Tensor], in_features: int) -> UniformCodes:
        """The tensors of `layout` in the form that kernels read."""
        size = self.size(in_features)
        zero = self._centre if self.sym else packed["zero"]
        parts = (Part(self.bits, in_features),)
        return UniformCodes(
            packed["weight"], in_features, parts, packed["scale"], zero, size, self.bits
        )

    def linear(self, x: Tensor, packed: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        """F.linear with the weight of `unpack`."""
        in_features = x.shape[-1]
        stored = once(packed, lambda: self.readable(packed, in_features))
        return product(x, stored, lambda: self.unpack(packed, in_features), bias)


def concatenated(grids: Sequence[Grid]) -> Grid:
    """Join grids [O] or [O, 1] of consecutive groups into one [O, G]."""
    scale, zero = (torch.column_stack(parts) for parts in zip(*grids, strict=True))
    return grids[0]._replace(scale=scale, zero=zero)


def joined(grids: Sequence[Grid], dim: int) -> Grid:
    """One grid from those of parts of a matrix."""
    scale, zero = (torch.cat(parts, dim) for parts in zip(*grids, strict=True))
    return grids[0]._replace(scale=scale, zero=zero)


@cache
@torch.inference_mode(False)
def _candidates(device: torch.device, sym: bool) -> tuple[Tensor, Tensor]:
    """Of every grid that a search tries [C]: its share of the range, and how far its zero point is
    moved. They are copied to a device once.
    """
    moves = (0,) if sym else (0, -1, 1)
    tried = [(1 - step / 100, float(move)) for step in range(80) for move in moves]
    share_C, move_C = torch.tensor(tried).to(device).T.contiguous()
    return share_C, move_C
