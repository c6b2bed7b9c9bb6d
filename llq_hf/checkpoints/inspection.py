"""Describes a packed checkpoint without loading it: bits counted from the files, and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import torch

from ..common.errors import LLQError
from ..common.spec import Spec
from ..models.decoder import quantizable
from ..models.load import build_skeleton
from .dense import Checkpoint
from .format import REPORT, PackedConfig
from .hashes import Hashes, check_quickly
from .journal import Journal
from .packed import read_report
from .records import LinearRecord, Report


class Inspection(TypedDict):
    """What a packed checkpoint is. Bits are per quantized weight, except `whole_model_bits`."""

    path: str
    method: str
    config: dict[str, Any]  # options of the method
    nominal_bits: float
    stored_bits: float
    whole_model_bits: float | None  # per parameter of the model; None without a report
    bytes: int
    quantized_linears: int
    calibration: dict[str, Any] | None
    fingerprint: str | None
    content: str | None  # stands for every tensor, file and field (see `hashes`)
    identity: dict[str, Any] | None
    made_from: dict[str, Any] | None
    rewritten: bool
    linears: list[LinearRecord]


def inspect_checkpoint(path: Path) -> Inspection:
    """Inspect the packed checkpoint in a folder.

    LLQError where llq-hf did not write it, where its options were edited, or where a file is
    missing or damaged.
    """
    if not path.is_dir():
        raise LLQError(f"{path} is not a folder")
    checkpoint = Checkpoint.open(str(path))
    section = checkpoint.config.get("quantization_config")
    if section is None or not PackedConfig.is_ours(section):
        raise LLQError(f"{path} holds a checkpoint that llq did not quantize")
    config = PackedConfig.from_section(section)
    config.check()
    check_quickly(path)
    packed = _packed_modules(checkpoint)
    stored = sum(spec.nbytes for specs in packed.values() for spec in specs.values())
    # There is no report where save_pretrained wrote the folder.
    report = read_report(path) if (path / REPORT).is_file() else None
    hashes = Hashes.read(path)
    return {
        "path": str(path),
        "method": config.method.name,
        "config": config.method.to_dict(),
        "nominal_bits": config.method.nominal_bits,
        "stored_bits": stored * 8 / _weights(path, report),
        "whole_model_bits": report["bits"].get("whole_model") if report else None,
        "bytes": sum(spec.nbytes for spec in checkpoint.specs.values()),
        "quantized_linears": len(packed),
        "calibration": config.calibration,
        "fingerprint": config.run,
        "content": hashes.digest if hashes else None,
        "identity": report.get("identity") if report else None,
        "made_from": report.get("made_from") if report else None,
        "rewritten": report is not None and "rewrite" in report,
        "linears": _with_seconds(report["linears"] if report else [], path),
    }


def _weights(path: Path, report: Report | None) -> int:
    """How many weights are quantized, from the report or from the shapes of the model."""
    counted = sum(r["shape"][0] * r["shape"][1] for r in report["linears"]) if report else 0
    if counted:
        return counted
    return sum(linear.weight.numel() for linear in quantizable(build_skeleton(path)).values())


def _packed_modules(checkpoint: Checkpoint) -> dict[str, dict[str, Spec]]:
    """Stored tensors by module, for every module whose `weight` holds packed codes."""
    modules = {
        name.removesuffix(".weight")
        for name, spec in checkpoint.specs.items()
        if name.endswith(".weight") and spec.dtype == torch.int32
    }
    packed: dict[str, dict[str, Spec]] = {module: {} for module in modules}
    for name, spec in checkpoint.specs.items():
        module, _, key = name.rpartition(".")
        if module in packed and key != "bias":
            packed[module][key] = spec
    return packed


def _with_seconds(linears: list[LinearRecord], path: Path) -> list[LinearRecord]:
    """The records with the seconds of the journal, if there is still one beside the folder."""
    lines = Journal.read(Journal.beside(path))
    seconds = {r["name"]: r.get("seconds") for line in lines[1:] for r in line.get("linears", [])}
    timed: list[LinearRecord] = []
    for record in linears:
        taken = seconds.get(record["name"])
        timed.append(record if taken is None else {**record, "seconds": taken})
    return timed
