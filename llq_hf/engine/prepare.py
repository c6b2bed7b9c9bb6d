"""What can go wrong is found before the first block: shapes, tensors, disk, memory, and one real
forward pass.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ..checkpoints.dense import Checkpoint, Rewritten, provenance
from ..checkpoints.fingerprint import fingerprint
from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..data.pairs import Pairs, read_pairs
from ..data.windows import ids_sha256
from ..kernels import reference
from ..layers.linear import checked_layout
from ..method import FORMAT_VERSION, Flow, Method
from ..models.decoder import block_linears, block_prefixes, quantizable
from ..models.load import module_names, takes_images
from ..numerics.stats import Hessian
from .blocks import StreamedBlocks
from .stream import Entrance
from .team import edges_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from dataclasses import field

from ..common.machine import check_device
from ..models.load import build_skeleton, load_processor, load_tokenizer
from .team import Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def problems_of(checkpoint: Checkpoint, skeleton: PreTrainedModel, method: Method) -> list[str]:
    """Sentences about everything in the checkpoint's headers that would stop the run."""
    problems = []
    for name, linear in quantizable(skeleton).items():
        try:
            checked_layout(method.for_linear(name), linear.out_features, linear.in_features)
        except LLQError as error:
            problems.append(f"{name}: {error}")
    tied = set(getattr(skeleton, "_tied_weights_keys", None) or [])
    for name, tensor in skeleton.state_dict().items():
        spec = checkpoint.specs.get(name)
        if spec is None:
            if name not in tied:
                problems.append(f"the tensor {name} is missing")
        elif spec.shape != tuple(tensor.shape):
            problems.append(
                f"{name} has shape {list(spec.shape)}, its config says {list(tensor.shape)}"
            )
    return problems


def estimate(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    method: Method,
    data: Tensor | Pairs | None,
    dtype: torch.dtype,
    run: RunOptions,
    out: Path | None,
    progress: Progress,
) -> dict[str, float]:
    """Estimated output bytes, peak bytes, seconds of all forward passes; LLQError where disk or
    memory fall short.
    """
    linears = quantizable(skeleton)
    packed = sum(
        spec.nbytes
        for name, linear in linears.items()
        for spec in method.for_linear(name).layout(linear.out_features, linear.in_features).values()
    )
    untouched = sum(
        spec.nbytes
        for name, spec in checkpoint.specs.items()
        if name.removesuffix(".weight") not in linears
    )
    output_bytes = packed + untouched
    if out is not None:
        _check_disk(out, output_bytes)
    peak = _peak_bytes(skeleton, method, data, dtype, run)
    total = psutil.virtual_memory().total
    if run.device == "cpu" and peak > total:
        raise LLQError(
            f"about {peak / 2**30:.1f} GiB of memory are needed and the machine has {total / 2**30:.1f}; "
            "use offload, fewer or shorter calibration samples"
        )
    seconds = 0.0
    if data is not None:
        progress.stage("trial forward pass of one block")
        blocks = StreamedBlocks(checkpoint, skeleton, dtype, torch.device(run.device))
        entrance = Entrance(blocks, data)
        seconds = 2 * len(blocks.prefixes) * len(entrance.batches()) * _trial(entrance, blocks)
    return {
        "output_bytes": float(output_bytes),
        "peak_bytes": float(peak),
        "forward_seconds": seconds,
    }


def _check_disk(out: Path, needed: int) -> None:
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    present = (
        sum(f.stat().st_size for f in out.glob("*.safetensors")) if out.is_dir() else 0
    )  # of an interrupted run
    free = shutil.disk_usage(existing).free
    if needed - present > free:
        raise LLQError(
            f"{out} needs {needed / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; choose another folder"
        )


def _peak_bytes(
    skeleton: PreTrainedModel,
    method: Method,
    data: Tensor | Pairs | None,
    dtype: torch.dtype,
    run: RunOptions,
) -> int:
    """A block, its Hessians, a solver's copies of the largest, activations: a rough upper bound."""
    block = skeleton.get_submodule(block_prefixes(skeleton)[0])
    widths = [linear.in_features for linear in block_linears(block).values()]
    largest = max(linear.weight.numel() for linear in block_linears(block).values())
    block_bytes = sum(p.numel() for p in block.parameters()) * dtype.itemsize
    hessians = 0
    observed = {method.for_linear(name).observes for name in quantizable(skeleton)}
    if any(kind is not None and issubclass(kind, Hessian) for kind in observed):
        copies = (
            4 if method.flow is Flow.BOTH else 3
        )  # of the one being solved: itself, its factor, an inverse
        hessians = 4 * (sum(w * w for w in set(widths)) + copies * max(widths) ** 2)
    activations = 0
    if data is not None and run.offload is None:
        tokens = sum(data.lengths) if isinstance(data, Pairs) else data.numel()
        activations = tokens * widths[0] * dtype.itemsize
    embedding: int = skeleton.get_input_embeddings().weight.numel() * dtype.itemsize
    total: int = block_bytes + 5 * 4 * largest + hessians + activations + embedding + 2**30
    total += 4 * method.training_copies * block_bytes // dtype.itemsize
    if (
        method.learns or method.tunes
    ):  # the whole model, a changed copy, its gradients, and room to work in
        total = max(
            total, 4 * sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize + 2**30
        )
    return total


@torch.no_grad()
def _trial(entrance: Entrance, blocks: StreamedBlocks) -> float:
    """Seconds of one forward pass of the first block: the run's first real test of device, dtype
    and memory.
    """
    hidden, kwargs = entrance.capture(entrance.batches()[0])
    block = blocks.load(0)
    started = time.perf_counter()
    block(hidden, **kwargs)
    return time.perf_counter() - started


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


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to compute. dtype: of the calibration forward passes; None =
    the checkpoint's.
    """

    device: str = "cpu"
    dtype: str | None = None
    offload: Path | None = None
    revision: str | None = None
    shards: int = 1  # decides last bits of the statistics, unlike all else here: see `distributed`
    team: Team = field(default_factory=Team)
