"""Which kernels multiply the linears of a packed checkpoint on this machine's CPU, and why not
faster ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from ..kernels import CachedTensors, Choice, listening
from ..method import Method, Packed
from ..models.decoder import quantizable
from ..models.load import build_skeleton, module_names
from .dense import Checkpoint
from .format import PackedConfig

FEW, SOME, MANY = 1, 16, 17  # tokens; larger numbers are all served alike


class Served(TypedDict):
    """Linears of one kind, the kernels that serve them, and what faster ones need."""

    linears: list[str]  # last parts of their names
    shape: list[int]
    one_token: str
    few_tokens: str  # up to 16
    more_tokens: str
    reasons: list[str]


class _Kind(NamedTuple):
    """What the choice of a kernel depends on."""

    method: str  # with all its options
    shape: tuple[int, int]


def served(path: Path) -> list[Served]:
    """The kinds of linears in the packed checkpoint in a folder. One linear of each kind is read,
    and multiplied with a few activations of the checkpoint's dtype.
    """
    checkpoint = Checkpoint.open(str(path))
    method = PackedConfig.from_section(checkpoint.config["quantization_config"]).method
    skeleton = build_skeleton(path)
    checkpoint = checkpoint.named(module_names(skeleton, checkpoint.specs))
    kinds: dict[_Kind, list[str]] = {}
    for name, linear in quantizable(skeleton).items():
        shape = (linear.out_features, linear.in_features)
        kinds.setdefault(_Kind(repr(method.for_linear(name)), shape), []).append(name)
    return [
        _served(checkpoint, method.for_linear(names[0]), kind.shape, names, skeleton.dtype)
        for kind, names in kinds.items()
    ]


def _served(
    checkpoint: Checkpoint,
    method: Method,
    shape: tuple[int, int],
    names: list[str],
    dtype: torch.dtype,
) -> Served:
    keys = {key: f"{names[0]}.{key}" for key in method.layout(*shape)}
    tensors = checkpoint.read(keys.values())
    packed = CachedTensors({key: tensors[name] for key, name in keys.items()})
    heard = {tokens: _heard(method, packed, shape, tokens, dtype) for tokens in (FEW, SOME, MANY)}
    return {
        "linears": list(dict.fromkeys(name.rpartition(".")[2] for name in names)),
        "shape": list(shape),
        "one_token": _names(heard[FEW]),
        "few_tokens": _names(heard[SOME]),
        "more_tokens": _names(heard[MANY]),
        "reasons": list(
            dict.fromkeys(text for all_ in heard.values() for c in all_ for text in c.passed)
        ),
    }


@torch.inference_mode()
def _heard(
    method: Method, packed: Packed, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> list[Choice]:
    with listening() as heard:
        method.linear(torch.ones(tokens, shape[1], dtype=dtype), packed, None, shape[0])
    return heard


def _names(heard: list[Choice]) -> str:
    """The kernels of a linear in the order of their calls; torch where none was asked for."""
    return ", ".join(dict.fromkeys(choice.kernel for choice in heard)) or "torch"
