"""What a run will need, and what in its input would stop it, found before the first block."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from ..checkpoints.dense import Checkpoint
from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..layers.linear import checked_layout
from ..method import Flow, Method
from ..models.decoder import block_linears, block_prefixes, quantizable
from ..numerics.stats import Hessian
from .blocks import StreamedBlocks
from .options import RunOptions
from .stream import Entrance

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
        sum(f.stat().st_size for f in out.glob("*.safetensors*")) if out.is_dir() else 0
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
