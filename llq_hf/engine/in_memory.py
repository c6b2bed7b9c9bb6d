"""Quantizes a model in memory, in place."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from ..checkpoints.records import LinearRecord
from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..kernels import reference
from ..layers.linear import QuantLinear
from ..method import Method
from ..models.decoder import check_covered, quantizable
from .blocks import LiveBlocks
from .options import RunOptions
from .precision import full_precision
from .step import quantize_step, record_tuned
from .walk import walk
from .whole_model import resolve_method, rewrite_model, shared_copy, tune


@reference()
@full_precision()
def quantize_model(
    model: nn.Module,
    method: Method,
    data: Tensor | Pairs | None,
    *,
    offload: Path | None = None,
    progress: Progress | None = None,
    learned: dict[str, Tensor] | None = None,
) -> list[LinearRecord]:
    """Quantize the linears in the decoder blocks of `model` in place; a record per linear.

    data: token ids [N, S] or image-text pairs; None for a method that reads none. offload: folder
    for the activations; None keeps them in memory. learned: what `resolve_method` returned with
    `method`; if it is None, the method is resolved here. LLQError where model, method and data do
    not fit.
    """
    progress = progress or Progress()
    check_covered(model)
    if learned is None:
        method, learned = resolve_method(model, method, data, progress)
    rewrite = method.rewrite(model, learned)
    if rewrite is not None:
        rewrite_model(model, rewrite)
    expected = len(quantizable(model))
    teacher = copy.deepcopy(model) if method.tunes else None
    records: list[LinearRecord] = []
    blocks = LiveBlocks(model)
    total = len(blocks.prefixes)
    progress.blocks(0, total)
    for block in walk(blocks, data, method, progress, RunOptions(offload=offload)):
        for step in block.steps():
            records += quantize_step(step, method)
        progress.blocks(block.index + 1, total)
    if len(records) != expected:
        raise LLQError(f"{len(records)} linears were quantized, {expected} should have been")
    if teacher is not None:
        tuned = tune(shared_copy(model), teacher, method, data, progress)
        _take_over(model, tuned)
        _update_records(records, model, teacher)
    progress.close()
    return records


def _take_over(model: nn.Module, tuned: dict[str, Tensor]) -> None:
    """Copy tuned tensors (by full name) into the packed linears."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            for key, tensor in module.packed().items():
                tensor.copy_(tuned.get(f"{name}.{key}", tensor))


def _update_records(records: list[LinearRecord], model: nn.Module, teacher: nn.Module) -> None:
    """Bring the records up to date after tuning."""
    for record in records:
        module = model.get_submodule(record["name"])
        assert isinstance(module, QuantLinear)
        weight_OI = teacher.get_parameter(record["name"] + ".weight").detach()
        record_tuned(record, weight_OI, module.dequantized())
