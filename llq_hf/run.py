"""A checkpoint run: from a folder of dense weights to a folder of packed ones, never holding the model.

Blocks are read, quantized and written one at a time. Files in OUT:
    model-00001-of-N.safetensors   everything outside the decoder blocks, bitwise as in the base
    model-0000k-of-N.safetensors   one decoder block each, written when it is done
    llq_report.json                per linear: bits, errors, what the method noted (the same bytes however often killed)
    index, tokenizer, config.json  last: without config.json nothing loads, so half a run never passes for a whole one
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import arch
from .checkpoint import INDEX, Checkpoint, header, read_json
from .data import Calibration, ids_sha256
from .errors import LLQError
from .journal import Journal, fingerprint, sha256_file
from .linear import QuantLinear
from .method import FORMAT_VERSION, Method
from .preflight import estimate, problems_of
from .quantize import Progress, RunOptions, quantize_step, steps
from .walk import StreamedBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "llq_report.json"
CARRIED = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "USE_POLICY*",
)  # small files that go along unchanged


@dataclass(frozen=True)
class Plan:
    """A checkpoint run that passed its checks."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    method: Method
    ids_NS: Tensor | None
    identity: dict[str, Any]
    run: RunOptions
    dtype: torch.dtype
    estimates: dict[str, float]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


def quantize_checkpoint(
    model: str,
    out: Path,
    method: Method,
    calibration: Calibration,
    run: RunOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `model` (folder or Hub id) into the folder `out`, or go on where an interrupted run stopped.

    Returns the report. LLQError for anything wrong with the input, before work starts where it can be known then.
    """
    progress = progress or Progress()
    try:
        return execute(prepare(model, method, calibration, run or RunOptions(), out, progress), out, progress)
    finally:
        progress.close()


def prepare(
    model: str,
    method: Method,
    calibration: Calibration,
    run: RunOptions,
    out: Path | None,
    progress: Progress,
) -> Plan:
    """Everything that can be checked before hours are spent; all problems in one error."""
    progress.stage("reading checkpoint headers")
    checkpoint = Checkpoint.open(model, run.revision)
    if checkpoint.is_quantized:
        kind = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise LLQError(f"{model} is quantized already ({kind}); give the full-precision model")
    skeleton = build_skeleton(checkpoint)
    dtype = _dtype(run.dtype, skeleton)
    _check_device(run.device)
    problems = problems_of(checkpoint, skeleton, method)
    progress.stage("hashing the base model", len(checkpoint.files))
    base, not_finite = checkpoint.scan(lambda done, total: progress.advance())
    problems += [f"{name} holds NaN or infinity" for name in not_finite]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise LLQError(f"{model} cannot be quantized: " + "; ".join(problems[:8]) + more)
    ids_NS, described = None, None
    if method.observes is not None:
        progress.stage("tokenizing the calibration data")
        tokenizer = load_tokenizer(checkpoint.path) if calibration.needs_tokenizer else None
        ids_NS = calibration.ids(tokenizer, skeleton.config.vocab_size)
        described = {"ids_sha256": ids_sha256(ids_NS), "samples": ids_NS.shape[0], "seqlen": ids_NS.shape[1]}
    identity = {
        "format_version": FORMAT_VERSION,
        "base_sha256": base,
        "method": method.name,
        "config": method.to_dict(),
        "calibration": described,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(run.device).type,
    }
    estimates = estimate(checkpoint, skeleton, method, ids_NS, dtype, run, out, progress)
    progress.estimates(estimates)
    return Plan(checkpoint, skeleton, method, ids_NS, identity, run, dtype, estimates)


def execute(plan: Plan, out: Path, progress: Progress) -> dict[str, Any]:
    """Run a plan into `out`; returns the report."""
    journal = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(out.name + ".lock")):  # a second process waits, then finds the work done
            if (out / "config.json").is_file() and finished_fingerprint(out) == plan.fingerprint:
                return read_report(out)
            journal = Journal.open(out, plan.identity)
            return _write(plan, out, journal, progress)
    except (OSError, SafetensorError) as error:
        if journal is None:
            raise LLQError(f"{out} cannot be written ({error}); give another folder, or free some space") from error
        for draft in out.glob("*.tmp"):
            draft.unlink(missing_ok=True)
        raise LLQError(
            f"writing to {out} failed ({error}); free some space and run the same command again: "
            f"{len(journal.blocks)} of {len(arch.block_prefixes(plan.skeleton))} blocks are kept"
        ) from error


def _write(plan: Plan, out: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    blocks = StreamedBlocks(plan.checkpoint, plan.skeleton, plan.dtype, torch.device(plan.run.device))
    total = len(blocks.prefixes)
    names = _names_by_file(plan, total)
    rest = out / _file_name(0, total)
    save(plan.checkpoint.read(names[rest.name]), rest)  # also on a resume: the journal has no digest of this file
    started = time.perf_counter()
    pending: list[dict[str, Any]] = []

    def on_block(index: int, block: nn.Module) -> None:
        nonlocal started
        file = out / _file_name(index + 1, total)
        save(_block_tensors(plan.checkpoint, block, blocks.prefixes[index], names[file.name]), file)
        journal.finish_block(
            {
                "block": index,
                "file": file.name,
                "sha256": sha256_file(file),
                "linears": list(pending),
                "seconds": time.perf_counter() - started,
                "peak_bytes": peak_bytes(),
            }
        )
        pending.clear()
        started = time.perf_counter()

    todo = steps(
        blocks,
        plan.method,
        plan.ids_NS,
        progress,
        done=len(journal.blocks),
        restore=lambda index, block: restore(
            block, out / _file_name(index + 1, total), plan.method, blocks.prefixes[index]
        ),
        finished=lambda index: index in journal.blocks,
        offload=plan.run.offload,
        on_block=on_block,
    )
    for step in todo:
        pending += quantize_step(step, plan.method)
    return _finish(plan, out, journal, names)


def _finish(plan: Plan, out: Path, journal: Journal, names: dict[str, list[str]]) -> dict[str, Any]:
    """Report, index, small files, and config.json as the last."""
    linears = [
        {k: v for k, v in r.items() if k != "seconds"}
        for i in sorted(journal.blocks)
        for r in journal.blocks[i]["linears"]
    ]
    expected = len(arch.quantizable(plan.skeleton))
    if len(linears) != expected:
        raise LLQError(
            f"{len(linears)} linears were quantized, {expected} should have been; delete {journal.path} and start anew"
        )
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file_name in names:
        for name, spec in header(out / file_name).items():
            weight_map[name] = file_name
            total_bytes += spec.nbytes
    report = {
        "fingerprint": plan.fingerprint,
        "identity": plan.identity,
        "linears": linears,
        "bits": summarize_bits(linears, plan.method, total_bytes, plan.checkpoint),
    }
    write_json(out / REPORT, report)
    write_json(out / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})
    for pattern in CARRIED:
        for file in plan.checkpoint.path.glob(pattern):
            if file.name not in ("config.json", INDEX, REPORT) and file.is_file():
                shutil.copyfile(file, out / file.name)
    section = config_section(plan.method, expected, plan.identity, plan.fingerprint)
    write_json(out / "config.json", {**plan.checkpoint.config, "quantization_config": section})
    return report


def config_section(
    method: Method, linears: int, identity: dict[str, Any] | None = None, run_fingerprint: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint. `digest` guards the options: edited ones are refused on loading."""
    return {
        "quant_method": f"llq_{method.name}",
        **method.to_dict(),
        "format_version": FORMAT_VERSION,
        "quantized_linears": linears,
        "digest": digest(method, linears),
        "calibration": (identity or {}).get("calibration"),
        "fingerprint": run_fingerprint,
    }


def digest(method: Method, linears: int) -> str:
    return fingerprint({"method": method.name, **method.to_dict(), "linears": linears, "format": FORMAT_VERSION})


def summarize_bits(
    linears: list[dict[str, Any]], method: Method, total_bytes: int, base: Checkpoint
) -> dict[str, float]:
    """Nominal bits, stored bits per quantized weight, and bits per parameter of the whole model."""
    weights = sum(r["shape"][0] * r["shape"][1] for r in linears)
    stored = sum(r["stored_bits"] * r["shape"][0] * r["shape"][1] for r in linears)
    parameters = sum(torch.Size(spec.shape).numel() for spec in base.specs.values())
    return {
        "nominal": method.nominal_bits,
        "stored": stored / weights,
        "whole_model": total_bytes * 8 / parameters,
        "bytes": total_bytes,
    }


# --- files ----------------------------------------------------------------------------------------------------


def _file_name(index: int, blocks: int) -> str:
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _names_by_file(plan: Plan, total: int) -> dict[str, list[str]]:
    """Output file -> the base's tensors that go there: file 1 everything outside the blocks, then a file per block."""
    prefixes = [prefix + "." for prefix in arch.block_prefixes(plan.skeleton)]
    names: dict[str, list[str]] = {_file_name(i, total): [] for i in range(total + 1)}
    owner = {prefix: i + 1 for i, prefix in enumerate(prefixes)}
    for name in sorted(plan.checkpoint.files):
        index = next((owner[p] for p in prefixes if name.startswith(p)), 0)
        names[_file_name(index, total)].append(name)
    return names


def _block_tensors(checkpoint: Checkpoint, block: nn.Module, prefix: str, base_names: list[str]) -> dict[str, Tensor]:
    """Packed tensors of the block's quantized linears, and the base's own bytes of everything else in it."""
    tensors: dict[str, Tensor] = {}
    replaced = set()
    for name, module in block.named_modules():
        if isinstance(module, QuantLinear):
            replaced.add(f"{prefix}.{name}.weight")
            tensors.update({f"{prefix}.{name}.{key}": t.cpu() for key, t in module.packed().items()})
    tensors.update(checkpoint.read(name for name in base_names if name not in replaced))
    return tensors


def restore(block: nn.Module, file: Path, method: Method, prefix: str) -> None:
    """Put the packed linears of a finished block's file into a freshly loaded block."""
    tensors = load_file(file)
    device = next(block.parameters()).device
    for name, linear in arch.block_linears(block).items():
        layout = method.layout(linear.out_features, linear.in_features)
        packed = {key: tensors[f"{prefix}.{name}.{key}"].clone().to(device) for key in layout}
        arch.replace_module(block, name, QuantLinear.from_packed(method, linear, packed))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all: draft, fsync, rename."""
    draft = path.with_name(path.name + ".tmp")
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, draft, metadata={"format": "pt"})
    draft.chmod(0o644)
    _settle(draft, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    _settle(draft, path)


def _settle(draft: Path, path: Path) -> None:
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(draft, path)


def read_report(out: Path) -> dict[str, Any]:
    return read_json(out / REPORT)


def finished_fingerprint(out: Path) -> str | None:
    section: dict[str, Any] = read_json(out / "config.json").get("quantization_config", {})
    return section.get("fingerprint")


def peak_bytes() -> int:
    """Peak resident memory of this process, or peak allocated GPU memory where a GPU is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- models ---------------------------------------------------------------------------------------------------


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of the checkpoint's config on the meta device: shapes, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # transformers and the Hub client validate with a dozen types
        raise LLQError(f"{checkpoint.path / 'config.json'} describes no model: {one_line(error)}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a missing file, a missing package, a broken JSON: each raises its own
        raise LLQError(
            f"{path} has no tokenizer that can be loaded ({one_line(error)}); put the model's there, or calibrate on a "
            ".npy file of token ids"
        ) from error


def one_line(error: Exception) -> str:
    """The first line of other people's many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_device(name: str) -> None:
    """LLQError unless a tensor can be put there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LLQError(f"device={name!r} cannot be used here ({one_line(error)}); give cpu, or auto") from error


def _dtype(name: str | None, skeleton: PreTrainedModel) -> torch.dtype:
    if name in (None, "auto"):
        found = getattr(skeleton.config, "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if str(dtype) == f"torch.{name}":
            return dtype
    raise LLQError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
