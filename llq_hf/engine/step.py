"""The one loop that joins walk, method and swap. `run.py` adds files and a journal around it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..data.pairs import Pairs
from ..kernels import reference
from ..layers.attention import install
from ..layers.linear import QuantLinear
from ..method import Job, Method, Packed, PassListener, Rewrite, State, Step, stored_bits
from ..models.decoder import quantizable, replace_module
from ..numerics.stats import Hessian, Stat
from .team import Team, and_notes, with_notes
from .walk import Blocks, LiveBlocks, walk


class Progress(PassListener):
    """What a run tells while it goes on; this one is silent. `progress.RichProgress` draws it."""

    def estimates(self, found: dict[str, float]) -> None: ...
    def blocks(self, done: int, total: int) -> None: ...
    def linear(self, name: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to compute. dtype: of the calibration forward passes; None = the checkpoint's."""

    device: str = "cpu"
    dtype: str | None = None
    offload: Path | None = None
    revision: str | None = None
    shards: int = 1  # decides last bits of the statistics, unlike all else here: see `distributed`
    team: Team = field(default_factory=Team)


@torch.no_grad()
def quantize_step(step: Step, method: Method, team: Team | None = None) -> list[dict[str, Any]]:
    """Quantize the linears of a step, put QuantLinears in their place; a record per linear."""
    started = time.perf_counter()
    packed = shared_out(step, method, team) if team is not None and team.size > 1 else method.quantize_block(step)
    seconds = (time.perf_counter() - started) / max(len(packed), 1)
    records = []
    for name, tensors in packed.items():
        dense = step.linears[name]
        job = step.jobs[name]
        quantized = QuantLinear.from_packed(method.at(job.name), dense, tensors)
        errors = _errors(dense.weight.detach().float(), quantized.dequantized(), step.stats.get(name))
        if not all(map(math.isfinite, errors.values())):
            raise LLQError(f"{job.name} came out not finite: its weights or its calibration inputs are not usable")
        shape = [dense.out_features, dense.in_features]  # a list, as it comes back from JSON
        bits = stored_bits(quantized.layout, dense.out_features, dense.in_features)
        records.append(
            {"name": job.name, "shape": shape, "stored_bits": bits, **errors, **job.notes, "seconds": seconds}
        )
        replace_module(step.block, name, quantized)
    return records


def shared_out(step: Step, method: Method, team: Team) -> dict[str, Packed]:
    """The linears of a step, each solved by one process of the team and told to all."""
    owners = {name: i % team.size for i, name in enumerate(step.linears)}
    own = {name: linear for name, linear in step.linears.items() if owners[name] == team.rank}
    mine = replace(step, linears=own, jobs=step.jobs)
    solved = method.quantize_block(mine)
    packed = {}
    for name, owner in owners.items():
        message = with_notes(solved[name], step.jobs[name].notes) if name in own else {}
        packed[name], notes = and_notes(team.broadcast(message, owner))
        packed[name] = {key: tensor.to(step.linears[name].weight.device) for key, tensor in packed[name].items()}
        step.jobs[name] = Job(f"{step.prefix}.{name}", notes)
    return packed


def _errors(weight_OI: Tensor, restored_OI: Tensor, stat: Stat | None) -> dict[str, float]:
    """Relative squared errors: of the weight, and of the calibration output, tr(dW H dW^T) / tr(W H W^T)."""
    error_OI = weight_OI - restored_OI
    errors = {"weight_error": float(error_OI.square().sum() / weight_OI.square().sum().clamp_min(1e-30))}
    if isinstance(stat, Hessian):
        loss = (error_OI @ stat.sum_II).mul_(error_OI).sum()
        total = (weight_OI @ stat.sum_II).mul_(weight_OI).sum()
        errors["output_error"] = float(loss / total.clamp_min(1e-30))
    return errors


@reference()
def quantize_model(
    model: nn.Module,
    method: Method,
    data: Tensor | Pairs | None,
    *,
    offload: Path | None = None,
    progress: Progress | None = None,
    learned: dict[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Quantize the decoder's linears of a model in memory, in place. Records per linear, as in the report.

    data: token ids [N, S], or image-text pairs. learned: what came with `method` out of `settled`; None: it is settled
    here.
    """
    progress = progress or Progress()
    if learned is None:
        method, learned = settled(model, method, data, progress)
    rewrite = method.rewrite(model, learned)
    if rewrite is not None:
        rewrite_model(model, rewrite)
    expected = len(quantizable(model))
    teacher = copy.deepcopy(model) if method.tunes else None
    records: list[dict[str, Any]] = []
    blocks = LiveBlocks(model)
    for step in steps(blocks, method, data, progress, offload=offload):
        records += quantize_step(step, method)
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
            record_tuned(record, teacher.get_parameter(record["name"] + ".weight").detach(), module.dequantized())
    progress.close()
    return records


def settled(
    model: nn.Module, method: Method, data: Tensor | Pairs | None, progress: Progress | None = None
) -> tuple[Method, dict[str, Tensor]]:
    """The method as it is for this model, and what it learned on a copy of it."""
    method = method.fitted(model)
    learned = learn(copy.deepcopy(model), method, token_ids(data), progress or Progress()) if method.learns else {}
    return method.taught(learned), learned


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


def record_tuned(record: dict[str, Any], weight_OI: Tensor, restored_OI: Tensor) -> None:
    """Bring a linear's record up to date: the statistics its output error came from are gone."""
    record.pop("output_error", None)
    record.update(_errors(weight_OI.float(), restored_OI, None), tuned=True)


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of its own that shares every parameter and buffer: what is replaced in one stays in the other."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def learn(model: nn.Module, method: Method, ids_NS: Tensor | None, progress: Progress) -> dict[str, Tensor]:
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
        setattr(model.get_submodule(owner), attribute, nn.Parameter(model.get_parameter(source).detach().clone()))
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


def steps(
    blocks: Blocks, method: Method, data: Tensor | Pairs | None, progress: Progress, **options: Any
) -> Iterator[Step]:
    total, done_before = len(blocks.prefixes), options.pop("done", 0)
    inner: Callable[[int, nn.Module], None] = options.pop("on_block", lambda index, block: None)

    def on_block(index: int, block: nn.Module) -> None:
        inner(index, block)
        progress.blocks(index + 1, total)

    progress.blocks(done_before, total)
    return walk(
        blocks,
        data,
        method,
        on_block=on_block,
        listener=progress,
        on_linear=progress.linear,
        **options,
    )
