"""Which packed linears vLLM's layers are made of, and which part of a linear a process holds.

vLLM fuses layers (q, k and v; gate and up) and names modules in its own way. Here its names are
traced back to the linears that transformers' model of the same config has in its decoder blocks,
since those were quantized. What cannot be traced back is an error. vLLM is not imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..checkpoints.format import CONFIG, HASHES, PackedConfig
from ..checkpoints.hashes import check
from ..common.errors import LLQError
from ..layers.linear import QuantLinear
from ..method import Method
from ..models.decoder import decoder_of, quantizable
from ..models.load import build_skeleton, skeleton_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# "model.layers.3.mlp.up_proj": decoder, block, the rest
_NAME = re.compile(r"(?:(.*)\.)?(layers\.\d+)\.(.+)")


@dataclass(frozen=True)
class Plan:
    """The packed linears of a checkpoint.

    decoder: module name of the text decoder in transformers. shapes: (out_features, in_features) of
    every packed linear, by its name inside of the decoder, as in "layers.3.mlp.up_proj".
    """

    packed: PackedConfig
    decoder: str
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, packed: PackedConfig, config: PreTrainedConfig) -> Self:
        """The plan of a model's config. LLQError unless it has as many linears in its blocks as the
        checkpoint says that it packed.
        """
        model = skeleton_of(config)
        decoder = decoder_of(model)[0]
        shapes = {
            name.removeprefix(f"{decoder}."): (linear.out_features, linear.in_features)
            for name, linear in quantizable(model).items()
        }
        if len(shapes) != packed.quantized_linears:
            raise LLQError(
                f"the model has {len(shapes)} linears in its blocks, the checkpoint"
                f" {packed.quantized_linears}; restore its config.json"
            )
        return cls(packed, decoder, shapes)

    def method(self, name: str) -> Method:
        """The method that serves the linear of this name inside of the decoder."""
        return self.packed.method.for_linear(f"{self.decoder}.{name}" if self.decoder else name)

    def inside(self, prefix: str) -> str | None:
        """The name inside of the text decoder of a module that vLLM calls `prefix`; None for other
        modules, such as a vision tower's.

        Both call the decoder after the same parts, such as "language_model", in another order, and
        with "model" in between or not.
        """
        found = _NAME.fullmatch(prefix)
        if found is None or _parts(found[1] or "") != _parts(self.decoder):
            return None
        return f"{found[2]}.{found[3]}"

    def linears(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """The packed linears of which vLLM's layer `prefix` consists, in the order of its outputs;
        [] for a layer that stays dense.

        fused: vLLM's `packed_modules_mapping`, such as qkv_proj: q_proj, k_proj, v_proj. LLQError
        for a layer of a block that consists of anything else: guessing would serve another model.
        """
        inside = self.inside(prefix)
        if inside is None:
            return []
        parent, _, last = inside.rpartition(".")
        names = [f"{parent}.{part}" for part in fused.get(last, [last])]
        strange = [name for name in names if name not in self.shapes]
        if strange:
            raise LLQError(
                f"vLLM's layer {prefix} consists of {', '.join(names)}, but the checkpoint packs no"
                f" {strange[0]}: the plugin cannot serve this architecture; export to"
                " compressed-tensors instead (`llq export`)"
            )
        return names


def _parts(name: str) -> set[str]:
    return set(name.split(".")) - {"", "model"}


def block_of(inside: str) -> str:
    """ "layers.3" of a name inside of the decoder."""
    return ".".join(inside.split(".")[:2])


def check_folder(folder: Path) -> None:
    """LLQError unless a checkpoint that lies on this machine is as it was written."""
    if (folder / CONFIG).is_file():
        check(folder)
        if not (folder / HASHES).is_file():  # then nothing else tells of an edited field
            build_skeleton(folder)


# --- tensor parallelism ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The rows and columns of a linear that one process of several holds: equal parts along one of
    the two axes.
    """

    rows: slice
    columns: slice

    @classmethod
    def of(cls, shape: tuple[int, int], size: tuple[int, int], rank: int, ranks: int) -> Self:
        """Part `rank` of a linear [O, I], of `size` [o, i]. Where there are fewer parts than ranks,
        as of the few keys and values of grouped queries, neighbours hold the same. LLQError unless
        parts of this size make up the linear.
        """
        both = list(zip(shape, size, strict=True))
        if any(whole % part or ranks * part % whole for whole, part in both):
            raise LLQError(
                f"vLLM asks {ranks} processes for {list(size)} of a linear of {list(shape)}"
            )
        rows, columns = (
            slice(index * part, (index + 1) * part)
            for whole, part in both
            for index in [rank * (whole // part) // ranks]
        )
        return cls(rows, columns)


def take_part(linear: QuantLinear, part: Part, dtype: torch.dtype) -> nn.Linear:
    """The part of a packed linear: packed as well where it falls on whole blocks of the storage,
    otherwise dense in `dtype`.

    A cut of the stored tensors is taken only if it means the same numbers.
    """
    weight = linear.dequantized()[part.rows, part.columns]
    try:
        packed = _cut(linear, part, weight.shape)
        if packed is not None and torch.equal(packed.dequantized(), weight):
            return packed
    except LLQError:  # a linear of this size has no layout
        pass
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return dense


def _cut(linear: QuantLinear, part: Part, shape: Sequence[int]) -> QuantLinear | None:
    """The part, if each stored tensor can be cut along one axis; it may mean other numbers."""
    cut = QuantLinear(linear.method, shape[1], shape[0], bias=False, device="meta")
    index = part.rows.start // shape[0] + part.columns.start // shape[1]  # one of them is 0
    for name, whole in linear.packed().items():
        piece = _piece(whole, cut.layout[name].shape, index) if name in cut.layout else None
        if piece is None:
            return None
        cut.put(name, piece)
    return cut


def _piece(whole: Tensor, shape: tuple[int, ...], index: int) -> Tensor | None:
    """Piece `index` of a tensor that is cut along one axis into pieces of this shape, or not at
    all; None if that is impossible.
    """
    axes = [axis for axis, size in enumerate(shape) if whole.shape[axis] != size]
    if not axes:
        return whole.clone()
    axis = axes[0]
    if len(axes) > 1 or (index + 1) * shape[axis] > whole.shape[axis]:
        return None
    return whole.narrow(axis, index * shape[axis], shape[axis]).clone()
