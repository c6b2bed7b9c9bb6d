"""Check everything about a run that can be checked before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.dense import Checkpoint, Rewritten, provenance
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.format import FORMAT_VERSION
from ..common.errors import LLQError
from ..common.machine import check_device
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..data.pairs import Pairs, read_pairs
from ..data.windows import ids_sha256
from ..kernels import reference
from ..method import Method
from ..models.load import (
    build_skeleton,
    load_processor,
    load_tokenizer,
    module_names,
    takes_images,
)
from .estimates import estimate, problems_of
from .options import RunOptions
from .team import edges_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checkpoint run that passed its checks."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    method: Method
    data: Tensor | Pairs | None  # token ids [N, S], or image-text pairs
    identity: dict[str, Any]
    made_from: dict[str, Any]
    run: RunOptions
    dtype: torch.dtype
    estimates: dict[str, float]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


@reference()
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
    skeleton = build_skeleton(checkpoint.path)
    method = method.bound_to(skeleton)
    dtype = _dtype(run.dtype, skeleton)
    check_device(run.device)
    progress.stage("hashing the base model", len(checkpoint.files))
    base, not_finite = checkpoint.scan(lambda done, total: progress.advance())
    checkpoint = checkpoint.named(module_names(skeleton, checkpoint.files))
    problems = problems_of(checkpoint, skeleton, method)
    problems += [f"{name} holds NaN or infinity" for name in not_finite]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise LLQError(f"{model} cannot be quantized: " + "; ".join(problems[:8]) + more)
    if run.team.size > 1 and not method.shares_out:
        raise LLQError(
            f"{method.name} reads activations or trains while it quantizes, which processes cannot share; run it in one"
        )
    data, described = calibration_data(
        calibration, method, skeleton.config, checkpoint.path, progress
    )
    if isinstance(data, Pairs) and run.shards > 1:
        raise LLQError(
            f"shards={run.shards}: image-text pairs of different lengths are not shared out; give 1"
        )
    if data is not None:
        run.team.own_shards(edges_of(len(data), run.shards))
    identity = {
        "format_version": FORMAT_VERSION,
        "base_sha256": base,
        "method": method.name,
        "config": method.to_dict(),
        "calibration": described,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(run.device).type,
        **({"shards": run.shards} if described and run.shards > 1 else {}),
    }
    made_from = {
        **provenance(checkpoint.path),
        "calibration": calibration.described if described else None,
    }
    source = Rewritten.of(checkpoint, method.rewrite(skeleton, {}))
    estimates = estimate(source, skeleton, method, data, dtype, run, out, progress)
    progress.estimates(estimates)
    return Plan(checkpoint, skeleton, method, data, identity, made_from, run, dtype, estimates)


def calibration_data(
    calibration: Calibration,
    method: Method,
    config: Any,
    path: Path,
    progress: Progress,
    tokenizer: Any = None,
) -> tuple[Tensor | Pairs | None, dict[str, Any] | None]:
    """(token ids [N, S] or pairs, what a checkpoint says about them) for a method that reads any.

    config, path: the model's; tokenizer: another one than lies there. LLQError where data, model
    and method do not fit.
    """
    if not method.reads_data:
        return None, None
    text_config = config.get_text_config()
    if not calibration.has_images:
        progress.stage("tokenizing the calibration data")
        if tokenizer is None and calibration.needs_tokenizer:
            tokenizer = load_tokenizer(path)
        ids_NS = calibration.ids(tokenizer, text_config.vocab_size)
        return ids_NS, {
            "ids_sha256": ids_sha256(ids_NS),
            "samples": ids_NS.shape[0],
            "seqlen": ids_NS.shape[1],
        }
    if not takes_images(config):
        raise LLQError(
            f"{calibration.source} holds images and {path} takes none; calibrate on text"
        )
    if method.learns or method.tunes:
        raise LLQError(f"{method.name} trains the whole model, on token ids; calibrate it on text")
    pairs = read_pairs(
        calibration.source, load_processor(path), calibration.samples, calibration.seed
    )
    progress.stage("reading the calibration images", len(pairs))
    pairs = pairs.measured(text_config.max_position_embeddings, progress.advance)
    return pairs, pairs.described()


def _dtype(name: str | None, skeleton: PreTrainedModel) -> torch.dtype:
    if name in (None, "auto"):
        found = getattr(skeleton.config, "dtype", None) or getattr(
            skeleton.config.get_text_config(), "dtype", None
        )
        return found if isinstance(found, torch.dtype) else torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if str(dtype) == f"torch.{name}":
            return dtype
    raise LLQError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
