"""Quantize the linears of one step, and put packed ones in their place."""

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
    """Quantize the linears of a step, put QuantLinears in their place; a record per linear."""
    started = time.perf_counter()
    packed = (
        shared_out(step, method, team)
        if team is not None and team.size > 1
        else method.quantize_block(step)
    )
    seconds = (time.perf_counter() - started) / max(len(packed), 1)
    records: list[LinearRecord] = []
    for name, tensors in packed.items():
        dense = step.linears[name]
        job = step.jobs[name]
        quantized = QuantLinear.from_packed(method.for_linear(job.name), dense, tensors)
        errors = _errors(
            dense.weight.detach().float(), quantized.dequantized(), step.stats.get(name)
        )
        if not all(map(math.isfinite, errors.values())):
            raise LLQError(
                f"{job.name} came out not finite: its weights or its calibration inputs are not usable"
            )
        shape = [dense.out_features, dense.in_features]  # a list, as it comes back from JSON
        bits = stored_bits(quantized.layout, dense.out_features, dense.in_features)
        record: Any = {
            "name": job.name,
            "shape": shape,
            "stored_bits": bits,
            **errors,
            **job.notes,
            "seconds": seconds,
        }
        records.append(record)
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
        message = pack_message(solved[name], step.jobs[name].notes) if name in own else {}
        packed[name], notes = unpack_message(team.broadcast(message, owner))
        packed[name] = {
            key: tensor.to(step.linears[name].weight.device) for key, tensor in packed[name].items()
        }
        step.jobs[name] = Job(f"{step.prefix}.{name}", notes)
    return packed


def _errors(weight_OI: Tensor, restored_OI: Tensor, stat: Stat | None) -> dict[str, float]:
    """Relative squared errors: of the weight, and of the calibration output, tr(dW H dW^T) / tr(W H
    W^T).
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
    """Bring a linear's record up to date: the statistics its output error came from are gone."""
    record.pop("output_error", None)
    record["weight_error"] = _errors(weight_OI.float(), restored_OI, None)["weight_error"]
    record["tuned"] = True
