"""How other libraries store quantized linears: what `llq convert` can read, and why not the rest.

A layout is made from a checkpoint's `quantization_config`, whose every number is checked there. It
tells the tensors of a linear before one is read, and then what they mean.

Legend: O out_features, I in_features, G groups, b bits.

    library             codes                          zero points           scales   groups
    gptq (v1, v2)       qweight [I*b/32, O], stream    qzeros [G, O*b/32]    [G, O]   g_idx [I]
    awq (gemm)          qweight [I, O/8], interleaved  qzeros [G, O/8]       [G, O]   in order
    compressed-tensors  weight_packed [O, I*b/32]      weight_zero_point     [O, G]   in order, or
      (pack-quantized)                                 [O*b/32, G], or none           weight_g_idx

Version 1 of GPTQ's format holds zero points less one. A zero point of 0 then borrows from its
neighbour in the word, because GPTQModel subtracts a whole word, and what it adds again when it
loads undoes that. (At 3 bits it subtracts from each number.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..common.words import either
from ..numerics.grids import check_group_size, columns_per_group
from .awq import ORDER
from .base import WORD, bitstream, codes_of

CURE = "quantize the full-precision model with `llq quantize`, or load this one in its own library"
SCALES = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32,)


class Wanted(NamedTuple):
    """A tensor of a linear: its shape, the dtypes that it may have, whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Layout(ABC):
    """How the linears of one checkpoint are stored. group_size: -1: a row is one group."""

    name: ClassVar[str]  # its `quant_method`
    codes: ClassVar[str]  # the tensor by which a quantized linear is known
    scales: ClassVar[str]
    widths: ClassVar[tuple[int, ...]]

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            known = either([str(width) for width in self.widths])
            raise LLQError(f"codes of {self.bits} bits are none that {self.name} packs: {known}")
        check_group_size(self.group_size)
        if self.group_size >= 1 << 31:
            raise LLQError(f"group_size={self.group_size} is more than any row has")

    @classmethod
    @abstractmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        """From a `quantization_config`; LLQError for what has no equal here."""

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, Wanted]:
        """What is stored of a linear [O, I] besides its bias, by name inside its module."""

    @abstractmethod
    def codes_OI(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """uint8 codes."""

    @abstractmethod
    def zero_OG(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """fp32 zero points, whole numbers."""

    @abstractmethod
    def scale_OG(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Scales, as stored."""

    @property
    @abstractmethod
    def index(self) -> str | None:
        """The tensor that holds the group of each column; None: groups are in order."""

    def groups(self, columns: int) -> int:
        """How many groups a row has."""
        return -(-columns // columns_per_group(self.group_size, columns))

    def groups_I(self, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        """int64: group of each column. LLQError where a group has another size than the others."""
        places_I = torch.arange(columns) // columns_per_group(self.group_size, columns)
        index_I = stored.get(self.index) if self.index else None
        if index_I is None or (index_I < 0).all():  # compressed-tensors: -1 where not used
            return places_I
        index_I = index_I.long()
        if not torch.equal(index_I.sort().values, places_I):
            raise LLQError(
                f"{self.index} does not put {self.group_size} columns into each of "
                f"{self.groups(columns)} groups: it is damaged"
            )
        return index_I


@dataclass(frozen=True)
class GPTQLayout(Layout):
    """version: 1 or 2 of the format."""

    name: ClassVar[str] = "gptq"
    codes: ClassVar[str] = "qweight"
    scales: ClassVar[str] = "scales"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    version: int

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        form = section.get("checkpoint_format") or section.get("format") or "gptq"
        versions = {"gptq": 1, "gptq_v2": 2}
        if not isinstance(form, str) or form not in versions:
            raise _no_equal(f"its checkpoint_format is {form!r}; gptq and gptq_v2 are read")
        if section.get("is_marlin_format"):
            raise _no_equal("its codes are in Marlin's order")
        for pattern, own in _mapping(section, "dynamic").items():
            if not str(pattern).startswith("-:") and own:
                raise _no_equal(f"`dynamic` gives linears like {pattern!r} options of their own")
        _check_none(section, "adapter")
        return cls(_integer(section, "bits"), _integer(section, "group_size"), versions[form])

    def tensors(self, rows: int, columns: int) -> dict[str, Wanted]:
        groups = self.groups(columns)
        return {
            "qweight": Wanted((_words(columns, self.bits), rows), INTS),
            "qzeros": Wanted((groups, _words(rows, self.bits)), INTS),
            "scales": Wanted((groups, rows), SCALES),
            "g_idx": Wanted((columns,), INTS, optional=True),
        }

    @property
    def index(self) -> str | None:
        return "g_idx"

    def codes_OI(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return codes_of(stored["qweight"].T, self.bits, columns)

    def zero_OG(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        words_GW = stored["qzeros"]
        if self.version == 1 and self.bits != 3:
            ones_1W = bitstream(torch.ones(1, rows, dtype=torch.uint8), self.bits)
            words_GW = words_GW + ones_1W  # wraps around, as it does for GPTQModel
        zero_GO = codes_of(words_GW, self.bits, rows)
        if self.version == 1 and self.bits == 3:
            zero_GO = (zero_GO + 1) % 2**self.bits
        return zero_GO.T.float()

    def scale_OG(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scales"].T


@dataclass(frozen=True)
class AWQLayout(Layout):
    """AutoAWQ's "gemm"."""

    name: ClassVar[str] = "awq"
    codes: ClassVar[str] = "qweight"
    scales: ClassVar[str] = "scales"
    widths: ClassVar[tuple[int, ...]] = (4,)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        version = section.get("version") or section.get("checkpoint_format")
        version = version or section.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise _no_equal(f"its version is {version!r}; gemm is read")
        bits = "bits" if "bits" in section else "w_bit"
        size = "group_size" if "group_size" in section else "q_group_size"
        return cls(_integer(section, bits), _integer(section, size))

    def tensors(self, rows: int, columns: int) -> dict[str, Wanted]:
        groups = self.groups(columns)
        return {
            "qweight": Wanted((columns, _words(rows, self.bits)), INTS),
            "qzeros": Wanted((groups, _words(rows, self.bits)), INTS),
            "scales": Wanted((groups, rows), SCALES),
        }

    @property
    def index(self) -> str | None:
        return None

    def codes_OI(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return _in_order(stored["qweight"], rows).T

    def zero_OG(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return _in_order(stored["qzeros"], rows).T.float()

    def scale_OG(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scales"].T


@dataclass(frozen=True)
class PackQuantized(Layout):
    """compressed-tensors' "pack-quantized". Codes and zero points are stored as signed numbers that
    got 2**(b-1) added, so both are the codes and zero points of the grid here.
    """

    name: ClassVar[str] = "compressed-tensors"
    codes: ClassVar[str] = "weight_packed"
    scales: ClassVar[str] = "weight_scale"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))

    sym: bool

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        if section.get("format") != "pack-quantized":
            raise _no_equal(f"its format is {section.get('format')!r}; pack-quantized is read")
        for key in ("kv_cache_scheme", "moe_sparsity_config"):
            _check_none(section, key)
        if _mapping(section, "sparsity_config").get("format", "dense") != "dense":
            raise _no_equal("its weights are stored sparse (sparsity_config)")
        if _mapping(section, "transform_config").get("config_groups"):
            raise _no_equal("it transforms inputs while the model runs (transform_config)")
        groups = list(_mapping(section, "config_groups").values())
        if not groups or not all(isinstance(group, Mapping) for group in groups):
            raise LLQError("quantization_config.config_groups describes no group of linears")
        weights = [_mapping(group, "weights") for group in groups]
        for group in groups:
            for key in ("input_activations", "output_activations"):
                _check_none(group, key)
        if any(cls._of(each) != cls._of(weights[0]) for each in weights):
            raise _no_equal("its groups of linears have different grids")
        return cls._of(weights[0])

    @classmethod
    def _of(cls, weights: Mapping[str, Any]) -> Self:
        strategy, kind = weights.get("strategy"), weights.get("type")
        if kind != "int":
            raise _no_equal(f"its weights are of type {kind!r}")
        if strategy not in ("channel", "group"):
            raise _no_equal(f"its scales are by {strategy}; those by group or channel are read")
        size = -1 if strategy == "channel" else _integer(weights, "group_size")
        return cls(_integer(weights, "num_bits"), size, weights.get("symmetric") is not False)

    def tensors(self, rows: int, columns: int) -> dict[str, Wanted]:
        groups = self.groups(columns)
        zeros = (_words(rows, self.bits), groups)
        return {
            "weight_packed": Wanted((rows, _words(columns, self.bits)), INTS),
            "weight_scale": Wanted((rows, groups), SCALES),
            **({} if self.sym else {"weight_zero_point": Wanted(zeros, INTS)}),
            "weight_g_idx": Wanted((columns,), INTS, optional=True),
            "weight_shape": Wanted((2,), (torch.int64, torch.int32), optional=True),
        }

    @property
    def index(self) -> str | None:
        return "weight_g_idx"

    def codes_OI(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return codes_of(stored["weight_packed"], self.bits, columns)

    def zero_OG(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        if self.sym:
            return torch.full((rows, self.groups(columns)), 2.0 ** (self.bits - 1))
        return codes_of(stored["weight_zero_point"].T, self.bits, rows).T.float()

    def scale_OG(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight_scale"]


LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (GPTQLayout, AWQLayout, PackQuantized)
}


def layout_of(section: Mapping[str, Any]) -> Layout:
    """The layout that a `quantization_config` names. LLQError, with the cure, where it is not one
    that is read.
    """
    kind = section.get("quant_method")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise _no_equal(f"its quant_method is {kind!r}, and {', '.join(LAYOUTS)} are read")
    return LAYOUTS[kind].of(section)


def problems_with(
    specs: Mapping[str, Spec], layout: Layout, shape: tuple[int, int]
) -> Sequence[str]:
    """Phrases about the tensors of a linear, by their headers. specs: by name in its module."""
    wanted, problems = layout.tensors(*shape), []
    for key, (own, dtypes, optional) in wanted.items():
        spec = specs.get(key)
        if spec is None:
            problems += [] if optional else [f"{key} is missing"]
        elif spec.shape != own or spec.dtype not in dtypes:
            names = either([str(dtype).removeprefix("torch.") for dtype in dtypes])
            found = f"{list(spec.shape)} of {str(spec.dtype).removeprefix('torch.')}"
            problems.append(f"{key} is {found}, and should be {list(own)} of {names}")
    return [*problems, *(f"{key} is unknown" for key in specs if key not in (*wanted, "bias"))]


def _in_order(words_RW: Tensor, features: int) -> Tensor:
    """The codes [R, O] of words whose codes are in ORDER."""
    codes_RO = codes_of(words_RW, 4, words_RW.shape[1] * 8)
    return codes_RO.view(len(codes_RO), -1, 8)[..., _PLACES].flatten(1)[:, :features]


_PLACES = sorted(range(8), key=ORDER.__getitem__)  # where each feature's code lies in a word


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // WORD)


def _no_equal(reason: str) -> LLQError:
    return LLQError(f"{reason}; {CURE}")


def _check_none(section: Mapping[str, Any], key: str) -> None:
    """LLQError where something is described that llq checkpoints of weights do not have."""
    if section.get(key):
        raise _no_equal(f"it has {key}, which no llq checkpoint of such codes does")


def _integer(section: Mapping[str, Any], key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise LLQError(f"quantization_config.{key} is {value!r:.60}, which is not a whole number")
    return value


def _mapping(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key; {} where there is none."""
    value = section.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LLQError(f"quantization_config.{key} is {value!r:.60}, which is not an object")
    return value
