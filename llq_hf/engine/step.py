"""Quantizes the linears of one step and puts packed linears in their place."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.records import LinearRecord
from ..common.errors import LLQError
from ..layers.linear import QuantLinear
from ..method import Job, Method, Packed, Step, stored_bits
from ..models.decoder import replace_module
from ..numerics.stats import Hessian, Stat
from .team import Team, pack_message, unpack_message


@torch.no_grad()
def quantize_step(step: Step, method: Method, team: Team | None = None) -> list[LinearRecord]:
    """Quantize the linears of a step and replace them in its block; a record per linear.

    team: processes that share the linears. LLQError where a linear comes out not finite.
    """
    started = time.perf_counter()
    if team is not None and team.size > 1:
        packed = quantize_shared(step, method, team)
    else:
        packed = method.quantize_block(step)
    seconds = (time.perf_counter() - started) / max(len(packed), 1)
    return [_replace(step, method, name, packed[name], seconds) for name in packed]


def _replace(step: Step, method: Method, name: str, packed: Packed, seconds: float) -> LinearRecord:
    """Put the packed linear in the place of the dense one; its record."""
    dense = step.linears[name]
    job = step.jobs[name]
    quantized = QuantLinear.from_packed(method.for_linear(job.name), dense, packed)
    weight_OI = dense.weight.detach().float()
    errors = _errors(weight_OI, quantized.dequantized(), step.stats.get(name))
    if not all(map(math.isfinite, errors.values())):
        raise LLQError(
            f"{job.name} came out not finite: its weights or its calibration inputs are not usable"
        )
    record: Any = {
        "name": job.name,
        "shape": [dense.out_features, dense.in_features],  # a list, as it comes back from JSON
        "stored_bits": stored_bits(quantized.layout, dense.out_features, dense.in_features),
        **errors,
        **job.notes,
        "seconds": seconds,
    }
    replace_module(step.block, name, quantized)
    typed: LinearRecord = record
    return typed


def quantize_shared(step: Step, method: Method, team: Team) -> dict[str, Packed]:
    """The packed linears of a step, each solved by one process of the team and sent to all."""
    owners = {name: i % team.size for i, name in enumerate(step.linears)}
    own = {name: linear for name, linear in step.linears.items() if owners[name] == team.rank}
    solved = method.quantize_block(replace(step, linears=own, jobs=step.jobs))
    packed = {}
    for name, owner in owners.items():
        message = pack_message(solved[name], step.jobs[name].notes) if name in own else {}
        tensors, notes = unpack_message(team.broadcast(message, owner))
        device = step.linears[name].weight.device
        packed[name] = {key: tensor.to(device) for key, tensor in tensors.items()}
        step.jobs[name] = Job(f"{step.prefix}.{name}", notes)
    return packed


def _errors(weight_OI: Tensor, restored_OI: Tensor, stat: Stat | None) -> dict[str, float]:
    """Relative squared errors of the weight and of the output on the calibration data.

    The output's is tr(dW H dW^T) / tr(W H W^T), and is given only if `stat` is a Hessian.
    """
    error_OI = weight_OI - restored_OI
    errors = {
        "weight_error": float(error_OI.square().sum() / weight_OI.square().sum().clamp_min(1e-30))
    }
    if isinstance(stat, Hessian):
        loss = (error_OI @ stat.sum_II).mul_(error_OI).sum()
        total = (weight_OI @ stat.sum_II).mul_(weight_OI).sum()
        errors["output_error"] = float(loss / total.clamp_min(1e-30))
    return errors


def record_tuned(record: LinearRecord, weight_OI: Tensor, restored_OI: Tensor) -> None:
    """Update a linear's record after tuning.

    The output error is removed, because the statistics that it came from are gone.
    """
    record.pop("output_error", None)
    record["weight_error"] = _errors(weight_OI.float(), restored_OI, None)["weight_error"]
    record["tuned"] = True
