"""Runs the hooks of a method that need the whole model in memory.

`learn` runs before the first block, `tune` after the last one (see `method.WholeModel`).
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.pairs import Pairs, PairSequences
from ..layers.attention import install
from ..method import Method, Packed, Rewrite, State
from ..models.sequences import Sequences, TextSequences
from .blocks import check_in_memory
from .precision import full_precision


@full_precision()
def resolve_method(
    model: nn.Module, method: Method, data: Tensor | Pairs | None, progress: Progress | None = None
) -> tuple[Method, dict[str, Tensor]]:
    """The method for this model, and the tensors that it learned on a copy of the model.

    data: token ids [N, S] or image-text pairs, which a method that learns needs.
    """
    check_in_memory(model)
    method = method.bound_to(model)
    learned: dict[str, Tensor] = {}
    if method.learns:
        learned = learn(copy.deepcopy(model), method, data, progress or Progress())
    return method.with_learned(learned), learned


def tune(
    student: nn.Module,
    teacher: nn.Module,
    method: Method,
    data: Tensor | Pairs | None,
    progress: Progress,
    state: State | None = None,
) -> Packed:
    """Train the packed model as a whole; the stored tensors that change, by full name.

    student: the packed model, which may be modified. teacher: the full-precision model. data: the
    calibration's. LLQError where there are none.
    """
    given = sequences(data, teacher)
    with torch.enable_grad():
        return method.tune(student.eval(), teacher.eval(), given, progress, state or State())


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer with `model`.

    A module that is replaced in one of them stays in the other.
    """
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, shared)


def learn(
    model: nn.Module, method: Method, data: Tensor | Pairs | None, progress: Progress
) -> dict[str, Tensor]:
    """The tensors that `method` learns on `model`, which may be modified.

    LLQError where there are no calibration data.
    """
    attention = method.attention
    attend = partial(install, attention=attention) if attention is not None else lambda module: None
    return method.learn(model, sequences(data, model), attend, progress)


@torch.no_grad()
def rewrite_model(model: nn.Module, rewrite: Rewrite) -> None:
    """Rewrite the dense tensors of a model in memory, in place."""
    vectors = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 1}
    for name, source in rewrite.untied.items():
        owner, _, attribute = name.rpartition(".")
        untied = nn.Parameter(model.get_parameter(source).detach().clone())
        setattr(model.get_submodule(owner), attribute, untied)
    if rewrite.untied:
        config: Any = model.config
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    for name, parameter in model.named_parameters():
        parameter.copy_(rewrite(name, parameter, vectors.__getitem__))


def sequences(data: Tensor | Pairs | None, model: nn.Module) -> Sequences:
    """The calibration data as `model` takes them. LLQError where there are none."""
    if data is None:
        raise LLQError("this method needs calibration data")
    weight = next(model.parameters())
    if isinstance(data, Pairs):
        return PairSequences(data, weight.device, weight.dtype)
    return TextSequences(data.to(weight.device))
