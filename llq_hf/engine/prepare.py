"""Checks everything about a run that can be checked before it starts, and makes its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.as_model import problems_of, with_own_heads
from ..checkpoints.carried import carried
from ..checkpoints.dense import Checkpoint, Rewritten, provenance
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.format import FORMAT_VERSION
from ..common.errors import LLQError
from ..common.machine import check_device, gpu_name
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..data.pairs import Pairs, read_pairs
from ..data.windows import ids_sha256
from ..kernels import reference
from ..method import Method
from ..models.decoder import check_covered
from ..models.load import (
    build_skeleton,
    load_processor,
    load_tokenizer,
    module_names,
    takes_images,
)
from .base import file_digests
from .estimates import estimate
from .options import RunOptions
from .precision import full_precision
from .team import edges_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checkpoint run that passed its checks.

    identity: everything that decides the bytes of the result. made_from: names of the base and of
    the calibration data, which decide no byte.
    """

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
        """Hash of `identity`."""
        return fingerprint(self.identity)


@reference()
@full_precision()
def prepare(
    model: str,
    method: Method,
    calibration: Calibration,
    run: RunOptions,
    out: Path | None,
    progress: Progress,
) -> Plan:
    """Check the base model, the method, the calibration data, disk and memory; run one block.

    out: the folder that the run will write; None skips the check of its disk. LLQError with all
    problems of the base model in one text, or with the first problem of anything else.
    """
    checkpoint = open_dense(model, run.revision, progress)
    skeleton = build_skeleton(checkpoint.path)
    check_covered(skeleton)
    method = method.bound_to(skeleton)
    dtype = _dtype(run.dtype, skeleton)
    check_device(run.device)
    checkpoint, base_sha256 = _check_tensors(checkpoint, skeleton, method, model, progress)
    if run.team.size > 1 and not method.shares_out:
        raise LLQError(
            f"{method.name} reads activations or trains while it quantizes, "
            "which processes cannot share; run it in one"
        )
    data, described = calibration_data(
        calibration, method, skeleton.config, checkpoint.path, progress
    )
    _check_shards(data, run)
    made_from = {
        **provenance(checkpoint.path),
        "calibration": calibration.described if described else None,
    }
    source = Rewritten.of(checkpoint, method.rewrite(skeleton, {}))
    estimates = estimate(source, skeleton, method, data, dtype, run, out, progress)
    progress.estimates(estimates)
    base = {"base_sha256": base_sha256, "base_files": file_digests(checkpoint.path)}
    identity = _identity(base, method, described, dtype, run)
    return Plan(checkpoint, skeleton, method, data, identity, made_from, run, dtype, estimates)


def open_dense(model: str, revision: str | None, progress: Progress) -> Checkpoint:
    """The headers of a dense checkpoint. LLQError for one that is quantized already."""
    progress.stage("reading checkpoint headers")
    checkpoint = Checkpoint.open(model, revision)
    if checkpoint.is_quantized:
        kind = checkpoint.config["quantization_config"].get("quant_method") or "unknown"
        raise LLQError(f"{model} is quantized already ({kind}); give the full-precision model")
    carried(checkpoint.path)  # refuses a link that leads out of the folder
    return checkpoint


def _check_tensors(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    method: Method,
    model: str,
    progress: Progress,
) -> tuple[Checkpoint, str]:
    """The checkpoint with the model's tensor names, and the sha256 of its tensors.

    LLQError with everything that is wrong with the tensors.
    """
    progress.stage("hashing the base model", len(checkpoint.files))
    sha256, not_finite = checkpoint.scan(lambda done, total: progress.advance())
    checkpoint = checkpoint.named(module_names(skeleton, checkpoint.files))
    checkpoint = with_own_heads(checkpoint, skeleton)
    problems = problems_of(checkpoint, skeleton, method)
    problems += [f"{name} holds NaN or infinity" for name in not_finite]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise LLQError(f"{model} cannot be quantized: " + "; ".join(problems[:8]) + more)
    return checkpoint, sha256


def _check_shards(data: Tensor | Pairs | None, run: RunOptions) -> None:
    """LLQError if the calibration sequences cannot be divided into the run's shards."""
    if isinstance(data, Pairs) and run.shards > 1:
        raise LLQError(
            f"shards={run.shards}: image-text pairs of different lengths are not shared out; give 1"
        )
    if data is not None:
        run.team.own_shards(edges_of(len(data), run.shards))


def _identity(
    base: dict[str, Any],
    method: Method,
    calibration: dict[str, Any] | None,
    dtype: torch.dtype,
    run: RunOptions,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    return {
        "format_version": FORMAT_VERSION,
        **base,
        "method": method.name,
        "config": method.to_dict(),
        "calibration": calibration,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(run.device).type,
        # Another GPU has other last bits. Processors have, too, but too many names.
        **({"gpu": name} if (name := gpu_name(torch.device(run.device))) else {}),
        **({"shards": run.shards} if calibration and run.shards > 1 else {}),
    }


def calibration_data(
    calibration: Calibration,
    method: Method,
    config: Any,
    path: Path,
    progress: Progress,
    tokenizer: Any = None,
) -> tuple[Tensor | Pairs | None, dict[str, Any] | None]:
    """The calibration data (token ids [N, S] or pairs) and their description in the checkpoint.

    Both are None for a method that reads no data. config, path: the model's. tokenizer: None takes
    the one at `path`. LLQError where data, model and method do not fit.
    """
    if not method.reads_data:
        return None, None
    text_config = config.get_text_config()
    if not calibration.has_images:
        ids_NS = token_windows(calibration, config, path, progress, tokenizer)
        return ids_NS, {
            "ids_sha256": ids_sha256(ids_NS),
            "samples": ids_NS.shape[0],
            "seqlen": ids_NS.shape[1],
        }
    if not takes_images(config):
        raise LLQError(
            f"{calibration.source} holds images and {path} takes none; calibrate on text"
        )
    if method.needs_text:
        raise LLQError(f"{method.name} with these options needs token ids; calibrate it on text")
    pairs = read_pairs(
        calibration.source, load_processor(path), calibration.samples, calibration.seed
    )
    progress.stage("reading the calibration images", len(pairs))
    pairs = pairs.measured(text_config.max_position_embeddings, progress.advance)
    if method.learns or method.tunes:
        pairs.check_answers()
    return pairs, pairs.described()


def token_windows(
    calibration: Calibration, config: Any, path: Path, progress: Progress, tokenizer: Any = None
) -> Tensor:
    """Token ids [N, S] of a calibration on text; see `calibration_data`.

    LLQError where windows are longer than the model's context.
    """
    progress.stage("tokenizing the calibration data")
    if tokenizer is None and calibration.needs_tokenizer:
        tokenizer = load_tokenizer(path)
    text_config = config.get_text_config()
    ids_NS = calibration.ids(tokenizer, text_config.vocab_size)
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and ids_NS.shape[1] > longest:
        raise LLQError(
            f"calibration windows of {ids_NS.shape[1]} tokens are longer than the model's context; "
            f"give calibration_seqlen={longest} or less"
        )
    return ids_NS


def _dtype(name: str | None, skeleton: PreTrainedModel) -> torch.dtype:
    """The dtype of this name; the model's own for None and "auto"."""
    if name in (None, "auto"):
        config = skeleton.config
        own = getattr(config, "dtype", None)
        own = own or getattr(config.get_text_config(), "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if str(dtype) == f"torch.{name}":
            return dtype
    raise LLQError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
