"""The tensors of a checkpoint's files beside the model that its config describes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..common.errors import LLQError
from ..layers.linear import checked_layout
from ..method import Method
from ..models.decoder import quantizable
from .dense import Checkpoint, untied_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_own_heads(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> Checkpoint:
    """The checkpoint, whose config then says so where a head is not the embeddings' matrix.

    Where config.json ties a head that the files hold with other values, transformers does not tie
    it. `skeleton` gets a matrix of its own for it.
    """
    for head, embedding in list(skeleton.all_tied_weights_keys.items()):
        if head not in checkpoint.files or embedding not in checkpoint.files:
            continue
        if torch.equal(*checkpoint.read([head, embedding]).values()):
            continue
        owner, _, attribute = head.rpartition(".")
        own = nn.Parameter(torch.empty_like(skeleton.get_parameter(embedding)))
        setattr(skeleton.get_submodule(owner), attribute, own)
        del skeleton.all_tied_weights_keys[head]
        skeleton.config.tie_word_embeddings = False
        checkpoint = replace(checkpoint, config=untied_config(checkpoint.config))
    return checkpoint


def problems_of(checkpoint: Checkpoint, skeleton: PreTrainedModel, method: Method) -> list[str]:
    """Sentences about everything in the files' headers that would stop the run."""
    problems = []
    for name, linear in quantizable(skeleton).items():
        try:
            checked_layout(method.for_linear(name), linear.out_features, linear.in_features)
        except LLQError as error:
            problems.append(f"{name}: {error}")
    for name, tensor in skeleton.state_dict().items():
        spec = checkpoint.specs.get(name)
        if spec is None:
            if name not in skeleton.all_tied_weights_keys:
                problems.append(f"the tensor {name} is missing")
        elif spec.shape != tuple(tensor.shape):
            problems.append(
                f"{name} has shape {list(spec.shape)}, its config says {list(tensor.shape)}"
            )
    return problems
