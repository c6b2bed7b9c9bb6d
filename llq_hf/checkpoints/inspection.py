"""Looking into a packed checkpoint without loading it: bits counted from the files, records of the
run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import LLQError
from ..methods import method_type
from ..models.decoder import quantizable
from ..models.load import build_skeleton
from .dense import Checkpoint
from .format import REPORT, digest
from .journal import Journal
from .packed import read_report


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Method, options, nominal and stored bits, sizes, fingerprint, records. LLQError where the
    folder is not ours.
    """
    if not path.is_dir():
        raise LLQError(f"{path} is not a folder")
    checkpoint = Checkpoint.open(str(path))
    section = checkpoint.config.get("quantization_config")
    if section is None or not str(section.get("quant_method", "")).startswith("llq_"):
        raise LLQError(f"{path} holds a checkpoint that llq did not quantize")
    kind = method_type(str(section["quant_method"]).removeprefix("llq_"))
    method = kind.build(**{name: section[name] for name in kind.field_names() if name in section})
    if section.get("digest") != digest(method, section.get("quantized_linears", 0)):
        raise LLQError(
            f"the quantization_config of {path} was edited: its options do not match its digest"
        )
    packed = _packed_modules(checkpoint)
    stored = sum(spec.nbytes for specs in packed.values() for spec in specs.values())
    total = sum(spec.nbytes for spec in checkpoint.specs.values())
    report = read_report(path) if (path / REPORT).is_file() else {"linears": [], "bits": {}}
    weights = sum(record["shape"][0] * record["shape"][1] for record in report["linears"])
    if not weights:  # saved by save_pretrained, which writes no report
        weights = sum(
            linear.weight.numel() for linear in quantizable(build_skeleton(path)).values()
        )
    return {
        "path": str(path),
        "method": method.name,
        "config": method.to_dict(),
        "nominal_bits": method.nominal_bits,
        "stored_bits": stored * 8 / weights,
        "whole_model_bits": report["bits"].get("whole_model"),
        "bytes": total,
        "quantized_linears": len(packed),
        "calibration": section.get("calibration"),
        "fingerprint": section.get("fingerprint"),
        "identity": report.get("identity"),
        "made_from": report.get("made_from"),
        "rewritten": "rewrite" in report,
        "linears": _with_seconds(report["linears"], path),
    }


def _packed_modules(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Module -> its stored tensors, for every module whose `weight` holds packed codes."""
    import torch

    modules = {
        name.removesuffix(".weight")
        for name, spec in checkpoint.specs.items()
        if name.endswith(".weight") and spec.dtype == torch.int32
    }
    packed: dict[str, dict[str, Any]] = {module: {} for module in modules}
    for name, spec in checkpoint.specs.items():
        module, _, key = name.rpartition(".")
        if module in packed and key != "bias":
            packed[module][key] = spec
    return packed


def _with_seconds(linears: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Records with the seconds of the journal, where it still lies beside the folder."""
    lines = Journal.read(Journal.beside(path))
    seconds = {r["name"]: r.get("seconds") for line in lines[1:] for r in line.get("linears", [])}
    return [
        {**r, **({"seconds": seconds[r["name"]]} if r["name"] in seconds else {})} for r in linears
    ]
