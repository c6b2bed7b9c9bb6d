"""Quantizing a model that is in memory already, in place."""

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
from ..models.decoder import quantizable
from .blocks import LiveBlocks
from .options import RunOptions
from .step import quantize_step, record_tuned
from .walk import walk
from .whole_model import resolve_method, rewrite_model, shared_copy, token_ids, tune


@reference()
def quantize_model(
    model: nn.Module,
    method: Method,
    data: Tensor | Pairs | None,
    *,
    offload: Path | None = None,
    progress: Progress | None = None,
    learned: dict[str, Tensor] | None = None,
) -> list[LinearRecord]:
    """Quantize the decoder's linears of a model in memory, in place. Records per linear, as in the
    report.

    data: token ids [N, S], or image-text pairs. learned: what came with `method` out of `resolve_method`;
    None: it is resolved here.
    """
    progress = progress or Progress()
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
        tuned = tune(shared_copy(model), teacher, method, token_ids(data), progress)
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                for key, tensor in module.packed().items():
                    tensor.copy_(tuned.get(f"{name}.{key}", tensor))
        for record in records:
            module = model.get_submodule(record["name"])
            assert isinstance(module, QuantLinear)
            record_tuned(
                record,
                teacher.get_parameter(record["name"] + ".weight").detach(),
                module.dequantized(),
            )
    progress.close()
    return records
