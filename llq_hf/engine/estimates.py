"""Estimates what a run needs, before the first block."""

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
from ..common.machine import gpu_free_bytes
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..layers.linear import checked_layout
from ..method import Flow, Method
from ..models.decoder import block_linears, block_prefixes, quantizable
from ..numerics.stats import Hessian
from .blocks import StreamedBlocks
from .entrance import Entrance
from .options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """Estimates of `output_bytes`, `peak_bytes` and `forward_seconds` (of all forward passes).

    out: the folder to write; None skips the check of its disk. LLQError where disk or memory are
    too small.
    """
    output = output_bytes(checkpoint, skeleton, method)
    if out is not None:
        _check_disk(out, output)
    peak = expected_peak_bytes(skeleton, method, data, dtype, run)
    check_memory(peak, _activation_bytes(skeleton, data, dtype, run), run)
    seconds = 0.0
    if data is not None:
        progress.stage("trial forward pass of one block")
        blocks = StreamedBlocks(checkpoint, skeleton, dtype, torch.device(run.device))
        seconds = _forward_seconds(blocks, data)
    return {
        "output_bytes": float(output),
        "peak_bytes": float(peak),
        "forward_seconds": seconds,
    }


def output_bytes(checkpoint: Checkpoint, skeleton: PreTrainedModel, method: Method) -> int:
    """Bytes of all tensors of the packed checkpoint."""
    return dense_bytes(checkpoint, skeleton) + packed_bytes(skeleton, method)


def dense_bytes(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> int:
    """Bytes of the tensors that stay dense."""
    linears = quantizable(skeleton)
    return sum(
        spec.nbytes
        for name, spec in checkpoint.specs.items()
        if name.removesuffix(".weight") not in linears
    )


def packed_bytes(skeleton: PreTrainedModel, method: Method) -> int:
    """Bytes of the packed linears. LLQError for one that the method cannot pack."""
    total = 0
    for name, linear in quantizable(skeleton).items():
        own = method.for_linear(name)
        layout = checked_layout(own, linear.out_features, linear.in_features)
        total += sum(spec.nbytes for spec in layout.values())
    return total


def _check_disk(out: Path, needed: int) -> None:
    """LLQError if the disk of `out` has no room for `needed` bytes."""
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    # An interrupted run has room for its tensors already.
    present = sum(file.stat().st_size for file in out.glob("*.safetensors*"))
    if needed - present > free:
        raise LLQError(
            f"{out} needs {needed / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; "
            "choose another folder"
        )


def check_memory(peak: int, activations: int, run: RunOptions) -> None:
    """LLQError if the device, or the machine, has less memory than the run's peak.

    activations: the bytes of the peak that a GPU leaves to the CPU's memory where they do not fit.
    """
    free = gpu_free_bytes(torch.device(run.device))
    if free is not None and peak - activations > free:
        raise LLQError(
            f"about {(peak - activations) / 2**30:.1f} GiB of memory are needed on {run.device} "
            f"and {free / 2**30:.1f} are free; free some, or run with device=cpu"
        )
    needed = peak if torch.device(run.device).type == "cpu" else activations
    total = psutil.virtual_memory().total
    if needed > total:
        raise LLQError(
            f"about {needed / 2**30:.1f} GiB of memory are needed and the machine has "
            f"{total / 2**30:.1f}; use offload, fewer or shorter calibration samples"
        )


def expected_peak_bytes(
    skeleton: PreTrainedModel,
    method: Method,
    data: Tensor | Pairs | None,
    dtype: torch.dtype,
    run: RunOptions,
) -> int:
    """A rough upper bound of the run's peak memory."""
    block = skeleton.get_submodule(block_prefixes(skeleton)[0])
    linears = block_linears(block).values()
    widths = [linear.in_features for linear in linears]
    largest = max(linear.weight.numel() for linear in linears)
    block_parameters = sum(p.numel() for p in block.parameters())
    embedding: int = skeleton.get_input_embeddings().weight.numel() * dtype.itemsize
    # 1 GiB for Python and its libraries, and five fp32 copies of the largest weight in the solver.
    total: int = 2**30 + block_parameters * dtype.itemsize + embedding + 5 * 4 * largest
    total += _hessian_bytes(skeleton, method, widths)
    total += _activation_bytes(skeleton, data, dtype, run)
    total += 4 * method.training_copies * block_parameters
    if method.learns or method.tunes:
        # The whole model, a changed copy, its gradients, and room to work in.
        parameters = sum(p.numel() for p in skeleton.parameters())
        total = max(total, 4 * parameters * dtype.itemsize + 2**30)
    return total


def _activation_bytes(
    skeleton: PreTrainedModel, data: Tensor | Pairs | None, dtype: torch.dtype, run: RunOptions
) -> int:
    """Bytes of a block's input for all calibration data, if they stay in memory."""
    if data is None or run.offload is not None:
        return 0
    block = skeleton.get_submodule(block_prefixes(skeleton)[0])
    tokens = sum(data.lengths) if isinstance(data, Pairs) else data.numel()
    return tokens * next(iter(block_linears(block).values())).in_features * dtype.itemsize


def _hessian_bytes(skeleton: PreTrainedModel, method: Method, widths: list[int]) -> int:
    """Bytes of the fp32 Hessians of one block, and of a solver's copies of the largest."""
    observed = {method.for_linear(name).observes for name in quantizable(skeleton)}
    if not any(kind is not None and issubclass(kind, Hessian) for kind in observed):
        return 0
    # Of the linear at work: the Hessian, its factor and an inverse.
    copies = 4 if method.flow is Flow.BOTH else 3
    return 4 * (sum(width**2 for width in set(widths)) + copies * max(widths) ** 2)


@torch.no_grad()
def _forward_seconds(blocks: StreamedBlocks, data: Tensor | Pairs) -> float:
    """Seconds of all forward passes, from one pass of the first block.

    It is also the run's first test of device, dtype and memory.
    """
    entrance = Entrance(blocks, data)
    entrance.shared_arguments()  # refuses a decoder that cannot be calibrated
    hidden_BSD, arguments = entrance.calls(entrance.batches()[0])
    block = blocks.load(0)
    started = time.perf_counter()
    block(hidden_BSD, **arguments.of(0))
    seconds = time.perf_counter() - started
    # Every block runs twice over all batches: for statistics and for outputs.
    return 2 * len(blocks.prefixes) * len(entrance.batches()) * seconds
