"""What a method does with the whole model in memory: learn before the first block, tune after the
last one.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..layers.attention import install
from ..method import Method, Packed, Rewrite, State


def resolve_method(
    model: nn.Module, method: Method, data: Tensor | Pairs | None, progress: Progress | None = None
) -> tuple[Method, dict[str, Tensor]]:
    """The method as it is for this model, and what it learned on a copy of it."""
    method = method.bound_to(model)
    learned = (
        learn(copy.deepcopy(model), method, token_ids(data), progress or Progress())
        if method.learns
        else {}
    )
    return method.with_learned(learned), learned


def tune(
    student: nn.Module,
    teacher: nn.Module,
    method: Method,
    ids_NS: Tensor | None,
    progress: Progress,
    state: State | None = None,
) -> Packed:
    """What training the packed model as a whole changes in it, by full tensor name."""
    if ids_NS is None:
        raise LLQError("this method needs calibration data")
    ids_NS = ids_NS.to(next(teacher.parameters()).device)
    with torch.enable_grad():
        return method.tune(student.eval(), teacher.eval(), ids_NS, progress, state or State())


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of its own that shares every parameter and buffer: what is replaced in one stays in
    the other.
    """
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    return copy.deepcopy(model, shared)


def learn(
    model: nn.Module, method: Method, ids_NS: Tensor | None, progress: Progress
) -> dict[str, Tensor]:
    """What `method` learns on a model of its own."""
    if ids_NS is None:
        raise LLQError("this method needs calibration data")
    attention = method.attention
    attend = partial(install, attention=attention) if attention is not None else lambda module: None
    return method.learn(model, ids_NS.to(next(model.parameters()).device), attend, progress)


@torch.no_grad()
def rewrite_model(model: nn.Module, rewrite: Rewrite) -> None:
    """Change the dense tensors of a model in memory, in place."""
    vectors = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 1}
    for name, source in rewrite.untied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(
            model.get_submodule(owner),
            attribute,
            nn.Parameter(model.get_parameter(source).detach().clone()),
        )
    if rewrite.untied:
        config: Any = model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    for name, parameter in model.named_parameters():
        parameter.copy_(rewrite(name, parameter, vectors.__getitem__))


def token_ids(data: Tensor | Pairs | None) -> Tensor | None:
    """The calibration data for what trains the whole model: that needs token ids."""
    if isinstance(data, Pairs):
        raise LLQError("training the whole model needs token ids; calibrate on text")
    return data
