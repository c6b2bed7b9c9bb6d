"""The calibration data's activations from block to block, and statistics of linears' inputs.

Legend: N calibration sequences, S tokens each, D hidden size, B sequences per forward pass, T
tokens of all sequences.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.machine import gpu_free_bytes
from ..common.progress import PassListener
from ..data.pairs import Pairs
from ..models.decoder import InputsOf, block_linears, hidden_of
from ..numerics.stats import Stat
from .blocks import Blocks
from .entrance import BlockArguments, Entrance
from .team import Stats, Team, batches_of, edges_of

CPU = torch.device("cpu")
UNLINKS = os.name != "nt"  # whether a file that is in use can be deleted

# --- activations ----------------------------------------------------------------------------------


# Of the free memory of a GPU, the part that activations may take. The rest is for a block, its
# statistics and the solver.
GPU_SHARE = 0.25


class Activations:
    """The input [N, S, D] of a block: on the GPU `device` where it fits, else in the CPU's memory;
    or in a file of the folder `offload`.

    It is read and replaced in batches: activations[rows].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        offload: Path | None,
        device: torch.device = CPU,
    ) -> None:
        self._file = None
        self._device = device
        if offload is None:
            free = gpu_free_bytes(device)
            fits = free is not None and math.prod(shape) * dtype.itemsize <= GPU_SHARE * free
            self.tensor_NSD = torch.empty(shape, dtype=dtype, device=device if fits else CPU)
            return
        offload.mkdir(parents=True, exist_ok=True)
        # The file must live as long as the tensor.
        self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=offload, prefix="activations-", suffix=".bin", delete=not UNLINKS
        )
        count = shape[0] * shape[1] * shape[2]
        # Reserved now, so that a full disk is an error and not a bus error at the first write.
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, count * dtype.itemsize)
        except OSError as error:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            need = count * dtype.itemsize / 2**20
            raise LLQError(
                f"{offload} has no room for {need:.0f} MiB of activations ({error.strerror})"
            ) from error
        self.tensor_NSD = torch.from_file(
            self._file.name, shared=True, size=count, dtype=dtype
        ).view(shape)
        if UNLINKS:  # the mapping keeps the data, and a kill leaves nothing
            Path(self._file.name).unlink()

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor_NSD[rows]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self.tensor_NSD[rows] = value.to(self.tensor_NSD)

    def copy(self, offload: Path | None) -> Activations:
        """A copy that has its own memory or its own file."""
        twin = copy.copy(self)
        count, length, width = self.tensor_NSD.shape
        shape, dtype = (count, length, width), self.tensor_NSD.dtype
        Activations.__init__(twin, shape, dtype, offload, self._device)
        twin.tensor_NSD.copy_(self.tensor_NSD)
        return twin


class Ragged(Activations):
    """Activations of sequences of different lengths, one after the other in [1, T, D].

    They are read and replaced one sequence at a time.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        offload: Path | None,
        device: torch.device = CPU,
    ) -> None:
        super().__init__((1, sum(lengths), width), dtype, offload, device)
        self.ends = [0, *accumulate(lengths)]

    def __getitem__(self, rows: slice) -> Tensor:
        several = len(range(*rows.indices(len(self.ends) - 1)))
        if several != 1:
            raise LLQError(
                f"{several} sequences of different lengths do not make a batch; "
                "train with a batch of 1"
            )
        return self.tensor_NSD[:, self.ends[rows.start] : self.ends[rows.start + 1]]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self[rows].copy_(value)


def new_activations(
    entrance: Entrance, width: int, dtype: torch.dtype, offload: Path | None
) -> Activations:
    """Room for the activations of all sequences that come in."""
    if entrance.is_pairs:
        return Ragged(entrance.lengths, width, dtype, offload, entrance.device)
    shape = (len(entrance.lengths), entrance.lengths[0], width)
    return Activations(shape, dtype, offload, entrance.device)


# --- from block to block --------------------------------------------------------------------------


class Stream:
    """The input of the current block for all calibration sequences.

    It holds the activations, and the arguments that each block gets beside them. In a distributed
    run each process has the sequences of its own shards.
    """

    def __init__(
        self,
        blocks: Blocks,
        data: Tensor | Pairs,
        offload: Path | None,
        listener: PassListener,
        shards: int = 1,
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
        self.listener = listener
        self.device = blocks.device
        edges = self.team.own_shards(edges_of(len(data), shards))
        if isinstance(data, Tensor):
            data = data[edges[0] : edges[-1]]
        entrance = Entrance(blocks, data)
        self.is_pairs = entrance.is_pairs
        self.count = len(entrance.lengths)
        self.length = -(-sum(entrance.lengths) // self.count)
        self.shards = batches_of([edge - edges[0] for edge in edges], entrance.size)
        self.block = 0  # the current one
        # Of pairs by number, because masks may depend on where the image is. Otherwise by batch
        # size: masks have a batch axis, and one of size 1 fits every batch.
        shared = entrance.shared_arguments()
        self._arguments: dict[int, BlockArguments] = {} if shared is None else {1: shared}
        self.activations = self._embed(entrance, offload)

    def _embed(self, entrance: Entrance, offload: Path | None) -> Activations:
        """The input of the first block. Arguments of blocks are kept in `_arguments`."""
        activations: Activations | None = None
        self.listener.stage("embedding the calibration data", self.count)
        for rows in self.batches():
            hidden_BSD, arguments = entrance.calls(rows)
            if activations is None:
                width, dtype = hidden_BSD.shape[-1], hidden_BSD.dtype
                activations = new_activations(entrance, width, dtype, offload)
            activations[rows] = hidden_BSD
            self._arguments.setdefault(rows.start if self.is_pairs else len(hidden_BSD), arguments)
            self.listener.advance(len(hidden_BSD))
        assert activations is not None
        return activations

    def copy(self, offload: Path | None) -> Stream:
        """Another stream before the same block, with its own copy of the activations."""
        twin = copy.copy(self)
        twin.activations = self.activations.copy(offload)
        return twin

    def enter(self, index: int, block: nn.Module) -> None:
        """Give the inputs of block number `index` from now on, on its own device: a model may lie
        on several GPUs.
        """
        self.block = index
        device = next(block.parameters()).device
        if device != self.device:
            self.device = device
            self._arguments = {key: each.to(device) for key, each in self._arguments.items()}

    def batches(self) -> list[slice]:
        return [rows for batches in self.shards for rows in batches]

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states [B, S, D] and keyword arguments of the current block."""
        hidden_BSD = self.activations[rows].to(self.device)
        key = rows.start if self.is_pairs else len(hidden_BSD)
        arguments = self._arguments.get(key) or self._arguments[1]
        return hidden_BSD, arguments.of(self.block)

    @torch.no_grad()
    def observe(
        self,
        block: nn.Module,
        groups: list[list[str]],
        observes: Mapping[str, type[Stat] | None],
        dense: Dense | None,
    ) -> dict[str, Stat]:
        """Statistics of the input of every linear in `groups`, by its name inside the block.

        groups: linears that share their input; those of one kind of statistic share the object.
        observes: the kind of each linear's statistic. dense: the full-precision model, whose
        inputs paired statistics need too.
        """
        if not any(observes[name] for group in groups for name in group):
            return {}
        self.listener.stage("statistics", self.count)
        shares = (self._observe(block, groups, observes, dense, batches) for batches in self.shards)
        total = self.team.reduce(shares)
        stats = {}
        for group in groups:
            for name in group:
                kind = observes[name]
                if kind is not None:
                    stats[name] = total[_key(group, kind)]
        return stats

    def _observe(
        self,
        block: nn.Module,
        groups: list[list[str]],
        observes: Mapping[str, type[Stat] | None],
        dense: Dense | None,
        batches: list[slice],
    ) -> Stats:
        """Statistics over some batches, by `_key`."""
        linears = block_linears(block)
        stats: Stats = {}
        observer = _Observer({})
        for group in groups:
            kinds = {kind for name in group if (kind := observes[name]) is not None}
            first = linears[group[0]]
            own = {kind: kind(first.in_features, first.weight.device) for kind in kinds}
            stats |= {_key(group, kind): stat for kind, stat in own.items()}
            if own:
                observer.stats[group[0]] = list(own.values())
        firsts = {name: linears[name] for name in observer.stats}
        run = InputsOf(block, firsts, observer.add)
        run_dense: InputsOf | None = None
        if dense is not None and (paired := observer.paired()):
            dense_firsts = {name: dense.block.get_submodule(name) for name in paired}
            run_dense = InputsOf(dense.block, dense_firsts, observer.keep_dense)
        for rows in batches:
            hidden_BSD, kwargs = self.inputs(rows)
            observer.sequences = len(hidden_BSD)
            if dense is not None and run_dense is not None:
                run_dense(dense.stream.activations[rows].to(self.device), **kwargs)
            run(hidden_BSD, **kwargs)
            self.listener.advance(len(hidden_BSD))
        return stats

    @torch.no_grad()
    def advance(self, block: nn.Module, name: str) -> None:
        """Replace the activations by the block's outputs. LLQError where they overflow."""
        self.listener.stage("outputs", self.count)
        for rows in self.batches():
            hidden_BSD, kwargs = self.inputs(rows)
            out_BSD = hidden_of(block(hidden_BSD, **kwargs))
            if not torch.isfinite(out_BSD).all():
                raise LLQError(
                    f"the output of {name} is not finite in {out_BSD.dtype}; "
                    "run with dtype float32 or bfloat16"
                )
            self.activations[rows] = out_BSD
            self.listener.advance(len(hidden_BSD))


def _key(group: list[str], kind: type[Stat]) -> str:
    """Name of a statistic that the linears of a group share."""
    return f"{group[0]}/{kind.__name__}"


class _Observer:
    """Adds the inputs of linears to their statistics while a block runs.

    stats: statistics by name of the linear. Paired statistics also need the input of the linear in
    the full-precision block, which runs first on the same sequences.
    """

    def __init__(self, stats: dict[str, list[Stat]]) -> None:
        self.stats = stats
        self.sequences = 0  # in the current batch
        self._dense_TI: dict[str, Tensor] = {}

    def paired(self) -> list[str]:
        """Linears that have a paired statistic."""
        return [name for name, stats in self.stats.items() if any(stat.paired for stat in stats)]

    def add(self, name: str, x: Tensor) -> None:
        x_TI = x.flatten(0, -2)
        dense_TI = self._dense_TI.pop(name, None)
        for stat in self.stats[name]:
            stat.update(x_TI, self.sequences)
            if stat.paired and dense_TI is not None:
                stat.pair(x_TI, dense_TI)

    def keep_dense(self, name: str, x: Tensor) -> None:
        self._dense_TI[name] = x.flatten(0, -2)


class Dense(NamedTuple):
    """The block in full precision, and the activations of the full-precision model."""

    block: nn.Module
    stream: Stream


@dataclass
class StreamData:
    """What a step may read of the streams (`method.BlockData`)."""

    stream: Stream
    dense: Stream | None

    @property
    def count(self) -> int:
        return self.stream.count

    @property
    def length(self) -> int:
        return self.stream.length

    def batches(self) -> list[slice]:
        return self.stream.batches()

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        return self.stream.inputs(rows)

    def targets(self, rows: slice) -> Tensor:
        assert self.dense is not None, "targets need Flow.BOTH"
        return self.dense.activations[rows].to(self.dense.device)
