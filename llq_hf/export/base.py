"""The contract of an export format, and the packing that most formats share.

Legend: O out_features, I in_features, G groups, b bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.carried import copy_small_files
from ..checkpoints.format import CONFIG
from ..checkpoints.shards import gathered
from ..common.errors import LLQError
from ..common.files import write_json
from ..method import Method, Packed
from ..numerics.grids import Affine

WORD = 32  # codes that take whole int32 words at every width


@dataclass(frozen=True)
class Format(ABC):
    """A format, for one checkpoint. dtype: of scales and of all that is not quantized."""

    name: ClassVar[str]
    holds_codes: ClassVar[bool] = True  # False: weights are dense
    one_grid: ClassVar[bool] = True  # False: each linear may have a grid of its own
    keeps_names: ClassVar[bool] = True  # of the base's files; False: of the model
    file: ClassVar[str | None] = None  # the one that the export consists of; None: a folder
    preferred: ClassVar[torch.dtype | None] = None  # where none is asked for; None: the base's

    dtype: torch.dtype

    @abstractmethod
    def tensors(self, linear: Exported) -> dict[str, Tensor]:
        """What is stored of a linear without input scale, by name inside its module."""

    @abstractmethod
    def linear(self, method: Method, packed: Packed, shape: tuple[int, int]) -> Exported:
        """The linear of `shape` (O, I), to be stored in this format.

        LLQError, with the reason, where it does not fit.
        """

    def section(self, grid: Grid | None, dense: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config`; None where the exported model is dense.

        grid: that of all quantized linears; None where they are dense. dense: names of modules that
        hold linears, none of them quantized, by every name that a reader may know them by.
        """
        return None

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype in which numbers of a tensor that is not quantized are stored."""
        return self.dtype

    def check_model(self, model: Model) -> None:
        """LLQError, before anything is written, where the format cannot hold this model."""
        return

    def finish(self, parts: Sequence[Path], folder: Path, model: Model, grid: Grid | None) -> int:
        """Make the files of the export in `folder`, of the tensors in `parts`, which are deleted.

        grid: as for `section`. Returns the bytes of all tensors.
        """
        nbytes = gathered(parts, folder).nbytes
        copy_small_files(model.path, folder)
        dropped = ("quantization_config", "dtype", "torch_dtype")
        config = {key: value for key, value in model.config.items() if key not in dropped}
        section = self.section(grid, model.dense)
        config |= {"quantization_config": section} if section else {}
        dtype = str(self.dtype).removeprefix("torch.")
        write_json(folder / CONFIG, {**config, "dtype": dtype})
        return nbytes


@dataclass(frozen=True)
class Model:
    """The model that is exported. path: of its packed checkpoint; config: its config.json.

    skeleton: on the meta device. dense: names of modules that hold linears, none of them quantized.
    """

    path: Path
    config: dict[str, Any]
    skeleton: Any
    dense: Sequence[str]


class Grid(NamedTuple):
    """What a `quantization_config` says about linears: their width and their groups."""

    bits: int
    sym: bool
    group_size: int  # -1: a row is one group
    in_order: bool  # all groups are of consecutive columns

    def __str__(self) -> str:
        groups = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{'symmetric' if self.sym else 'asymmetric'} {self.bits}-bit {groups}"


@dataclass
class Grids:
    """Collects the grids of all linears, for which a `quantization_config` has one.

    compressed-tensors has groups of linears, but transformers 5.23 dequantizes every linear by the
    first of them, without an error.
    """

    seen: dict[tuple[Grid, int], str] = field(default_factory=dict)  # and columns -> a name

    def see_all(self, linears: Mapping[str, Exported]) -> None:
        """Those of linears, by name; dense ones have none. Only sizes are kept."""
        for name, linear in linears.items():
            if linear.affine is not None:
                self._see(name, linear.affine)

    def _see(self, name: str, affine: Affine) -> None:
        grid = Grid(affine.bits, affine.sym, affine.group_size, affine.in_order)
        self.seen.setdefault((grid, affine.codes_OI.shape[1]), name)

    def only(self, form: str) -> Grid | None:
        """The grid of all; None where none was seen. LLQError, for the format, where they differ.

        A row that is one group counts as a group of as many columns where there are such.
        """
        sizes = {grid.group_size for grid, _ in self.seen}
        merged: dict[Grid, str] = {}
        for (grid, columns), name in self.seen.items():
            size = columns if grid.group_size == -1 and columns in sizes else grid.group_size
            merged.setdefault(grid._replace(group_size=size, in_order=True), name)
        if not merged:
            return None
        (grid, name), *others = merged.items()
        for other, other_name in others:
            raise LLQError(
                f"{other_name} is stored in {other}, {name} in {grid}, and {form} names one kind "
                "for all; export as dense"
            )
        return grid._replace(in_order=all(each.in_order for each, _ in self.seen))


@dataclass
class Exported:
    """A linear that is being exported: as codes (`affine`) or dense (`weight_OI`)."""

    affine: Affine | None
    weight_OI: Tensor | None = None  # where affine is None

    @property
    def in_scale_I(self) -> Tensor | None:
        """What its input must be divided by; None: nothing."""
        return self.affine.in_scale_I if self.affine is not None else None

    def divide_outputs(self, s_O: Tensor) -> None:
        """Divide the outputs by s, by means of the rows' scales; the codes stay."""
        assert self.affine is not None
        self.affine = self.affine._replace(scale_OG=self.affine.scale_OG / s_O[:, None])


@dataclass(frozen=True)
class AffineFormat(Format):
    """A format of codes on uniform grids."""

    preferred: ClassVar[torch.dtype | None] = torch.float16
    widths: ClassVar[tuple[int, ...]]

    def linear(self, method: Method, packed: Packed, shape: tuple[int, int]) -> Exported:
        if not method.weight_only:
            raise LLQError(
                f"{method.name} quantizes activations while the model runs; "
                "this format holds weights only"
            )
        affine = method.affine(packed, *shape)
        self.check(affine)
        return Exported(affine)

    def check(self, affine: Affine) -> None:
        """LLQError where codes or grids do not fit. Formats add their own rules."""
        if affine.bits not in self.widths:
            widths = ", ".join(map(str, self.widths))
            raise LLQError(f"{affine.bits}-bit codes have no place in it: it has {widths}")
        if (affine.zero_OG != affine.zero_OG.round()).any():
            raise LLQError(
                "its levels lie at odd halves of a step, and zero points of this format are whole"
            )
        columns = len(affine.groups_I)
        size = affine.group_size
        if size != -1 and columns % size:
            raise LLQError(
                f"its {columns} columns are no multiple of the group of {size}, "
                "and no last group is shorter"
            )

    def tensors(self, linear: Exported) -> dict[str, Tensor]:
        assert linear.affine is not None
        scale_OG, dtype = linear.affine.scale_OG, self.scale_dtype
        stored_OG = scale_OG.to(dtype)
        if not torch.isfinite(stored_OG).all() or (stored_OG[scale_OG > 0] == 0).any():
            cure = "export with dtype float32" if dtype == self.dtype else "it has no other"
            raise LLQError(f"a scale does not fit {dtype}; {cure}")
        return self.pack(linear.affine)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales."""
        return self.dtype

    @abstractmethod
    def pack(self, affine: Affine) -> dict[str, Tensor]:
        """The tensors of a linear, by name inside its module; in_scale was folded before."""


def bitstream(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, n] -> int32 [R, ceil(n * b / 32)].

    Codes follow one after the other, lowest bit first, and may cross the borders of words.
    """
    rows, n = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -n % WORD))
    shifts = torch.arange(bits, dtype=torch.uint8)
    each_bit = ((codes[..., None] >> shifts) & 1).view(rows, -1, 8)
    as_bytes = (each_bit << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return as_bytes.view(torch.int32)[:, : -(-n * bits // 32)].contiguous()


def codes_of(words_RW: Tensor, bits: int, n: int) -> Tensor:
    """int32 [R, ceil(n * b / 32)] -> uint8 codes [R, n]; the inverse of `bitstream`."""
    as_bytes = words_RW.contiguous().view(torch.uint8)
    as_bytes = torch.nn.functional.pad(as_bytes, (0, -as_bytes.shape[1] % bits))
    bytes_RUb = as_bytes.view(len(as_bytes), -1, bits)  # a unit of b bytes holds 8 codes
    codes_RU8 = torch.empty(*bytes_RUb.shape[:2], 8, dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = bytes_RUb[..., byte] >> shift
        if shift + bits > 8:
            code |= bytes_RUb[..., byte + 1] << (8 - shift)
        codes_RU8[..., place] = code & ((1 << bits) - 1)
    return codes_RU8.flatten(1)[:, :n]


def whole(what: str, features: int) -> None:
    """LLQError unless `features` codes of any width fill whole words."""
    if features % WORD:
        raise LLQError(
            f"its {features} {what} features are no multiple of {WORD}, "
            "which the readers' kernels need"
        )
