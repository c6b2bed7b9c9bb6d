"""Calibration data on its way from block to block, and the statistics that linears leave behind.

Legend: N calibration sequences, S tokens each, D hidden size, B sequences per forward pass; T
tokens of all sequences.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import PassListener
from ..data.pairs import Pairs
from ..models.decoder import block_linears, decoder_of, hidden_of
from ..numerics.stats import Stat
from .blocks import Blocks
from .team import Stats, Team, batches_of, edges_of

BATCH_TOKENS = (
    4096  # tokens per forward pass: enough to keep the cores busy, little enough to bound memory
)


class Activations:
    """What flows from block to block: [N, S, D], in memory or in a file of `offload`; batches are
    replaced in place.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, offload: Path | None
    ) -> None:
        self._file = None
        if offload is None:
            self.tensor_NSD = torch.empty(shape, dtype=dtype)
            return
        offload.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.NamedTemporaryFile(dir=offload, prefix="activations-", suffix=".bin")  # noqa: SIM115 (lives as long as the tensor)
        count = shape[0] * shape[1] * shape[2]
        try:  # a full disk is an error here; under a mapping it is a bus error at the first touch
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, count * dtype.itemsize)
        except OSError as error:
            self._file.close()
            need = count * dtype.itemsize / 2**20
            raise LLQError(
                f"{offload} has no room for {need:.0f} MiB of activations ({error.strerror})"
            ) from error
        self.tensor_NSD = torch.from_file(
            self._file.name, shared=True, size=count, dtype=dtype
        ).view(shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor_NSD[rows]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self.tensor_NSD[rows] = value.to(self.tensor_NSD)

    def copy(self, offload: Path | None) -> Activations:
        """The same values in a place of their own."""
        twin = copy.copy(self)
        count, length, width = self.tensor_NSD.shape
        Activations.__init__(twin, (count, length, width), self.tensor_NSD.dtype, offload)
        twin.tensor_NSD.copy_(self.tensor_NSD)
        return twin


class Ragged(Activations):
    """Sequences of different lengths, one behind the other in [1, T, D]; they come and go one at a
    time.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, offload: Path | None
    ) -> None:
        super().__init__((1, sum(lengths), width), dtype, offload)
        self.ends = [0, *accumulate(lengths)]

    def __getitem__(self, rows: slice) -> Tensor:
        several = len(range(*rows.indices(len(self.ends) - 1)))
        if several != 1:
            raise LLQError(
                f"{several} sequences of different lengths do not make a batch; train with a batch of 1"
            )
        return self.tensor_NSD[:, self.ends[rows.start] : self.ends[rows.start + 1]]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self[rows].copy_(value)


class Entrance:
    """What calibration data becomes where it enters the first block: windows of token ids, or
    image-text pairs.

    Images go through the model's own tower and projector: visual tokens are in the sequence as they
    are in use.
    """

    def __init__(self, blocks: Blocks, data: Tensor | Pairs) -> None:
        self.data, self.device = data, blocks.device
        self.pairs = isinstance(data, Pairs)
        self.runner = blocks.around() if self.pairs else blocks.decoder()
        self.lengths = data.lengths if isinstance(data, Pairs) else [data.shape[1]] * len(data)
        self.size = (
            1 if self.pairs else max(1, BATCH_TOKENS // self.lengths[0])
        )  # sequences per forward pass

    def batches(self) -> list[slice]:
        count = len(self.lengths)
        return [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def capture(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        """Input [B, S, D] of the first block and the keyword arguments that it gets."""
        if not isinstance(self.data, Pairs):
            return capture(self.runner, self.data[rows].to(self.device))
        dtype = next(self.runner.parameters()).dtype
        inputs = {
            name: t.to(self.device, dtype if t.is_floating_point() else None)
            for name, t in self._pair(rows)
        }
        return _caught(decoder_of(self.runner)[1], lambda: self.runner(**inputs, use_cache=False))

    def _pair(self, rows: slice) -> Iterable[tuple[str, Tensor]]:
        assert isinstance(self.data, Pairs)
        return self.data.inputs(rows.start).items()

    def room(self, width: int, dtype: torch.dtype, offload: Path | None) -> Activations:
        if self.pairs:
            return Ragged(self.lengths, width, dtype, offload)
        return Activations((len(self.lengths), self.lengths[0], width), dtype, offload)


class Stream:
    """The calibration set on its way through the blocks: its activations and the keyword arguments
    every block gets.
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
        edges = self.team.own_shards(edges_of(len(data), shards))
        if isinstance(data, Tensor):
            data = data[edges[0] : edges[-1]]  # of several processes, each holds its own
        entrance = Entrance(blocks, data)
        self.count, self.pairs = len(entrance.lengths), entrance.pairs
        self.length = -(-sum(entrance.lengths) // self.count)
        self.shards = batches_of([edge - edges[0] for edge in edges], entrance.size)
        self.listener = listener
        # Keyword arguments of pairs by number: masks may depend on where the image is. Else by
        # batch size: masks have a batch axis, and those of size 1 serve any other.
        self._kwargs: dict[int, dict[str, Any]] = (
            {} if self.pairs else {1: entrance.capture(slice(0, 1))[1]}
        )
        activations: Activations | None = None
        listener.stage("embedding the calibration data", self.count)
        for rows in self.batches():
            hidden_BSD, kwargs = entrance.capture(rows)
            if activations is None:
                activations = entrance.room(hidden_BSD.shape[-1], hidden_BSD.dtype, offload)
            activations[rows] = hidden_BSD
            self._kwargs.setdefault(rows.start if self.pairs else len(hidden_BSD), kwargs)
            listener.advance(len(hidden_BSD))
        assert activations is not None
        self.activations, self.device = activations, blocks.device

    def copy(self, offload: Path | None) -> Stream:
        """Another stream at the same place, with activations of its own."""
        twin = copy.copy(self)
        twin.activations = self.activations.copy(offload)
        return twin

    def batches(self) -> list[slice]:
        return [rows for batches in self.shards for rows in batches]

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        hidden_BSD = self.activations[rows].to(self.device)
        if self.pairs:
            return hidden_BSD, self._kwargs[rows.start]
        return hidden_BSD, self._kwargs.get(
            len(hidden_BSD), self._kwargs[1]
        )  # of size 1, it broadcasts

    @torch.no_grad()
    def observe(
        self,
        block: nn.Module,
        groups: list[list[str]],
        observes: Mapping[str, type[Stat] | None],
        dense: Dense | None,
    ) -> dict[str, Stat]:
        """Statistics of the input of every linear in `groups`, of the kind that it `observes`.

        Linears of a group share one object of a kind. dense: the full-precision block and its
        stream, which paired statistics look at beside this one.
        """
        if not any(observes[name] for group in groups for name in group):
            return {}
        self.listener.stage("statistics", self.count)
        shares = (self._observe(block, groups, observes, dense, batches) for batches in self.shards)
        found = self.team.reduced(shares)
        asked = ((group[0], name, observes[name]) for group in groups for name in group)
        return {
            name: found[f"{first}/{kind.__name__}"]
            for first, name, kind in asked
            if kind is not None
        }

    def _observe(
        self,
        block: nn.Module,
        groups: list[list[str]],
        observes: Mapping[str, type[Stat] | None],
        dense: Dense | None,
        batches: list[slice],
    ) -> Stats:
        """Statistics of some batches, by "first linear of the group/kind"."""
        linears = block_linears(block)
        stats: Stats = {}
        watches: list[_Watch] = []
        for group in groups:
            kinds = {kind for name in group if (kind := observes[name]) is not None}
            shared = {kind: kind(linears[group[0]].in_features, self.device) for kind in kinds}
            stats |= {f"{group[0]}/{kind.__name__}": stat for kind, stat in shared.items()}
            watches += [_Watch(group[0], tuple(shared.values()))] if shared else []
        beside = dense is not None and any(stat.paired for stat in stats.values())
        handles = [
            handle for watch in watches for handle in watch.hooks(block, dense if beside else None)
        ]
        try:
            for rows in batches:
                hidden_BSD, kwargs = self.inputs(rows)
                for watch in watches:
                    watch.sequences = len(hidden_BSD)
                if dense is not None and beside:
                    dense.block(dense.stream.activations[rows].to(self.device), **kwargs)
                block(hidden_BSD, **kwargs)
                self.listener.advance(len(hidden_BSD))
        finally:
            for handle in handles:
                handle.remove()
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
                    f"the output of {name} is not finite in {out_BSD.dtype}; run with dtype float32 or bfloat16"
                )
            self.activations[rows] = out_BSD
            self.listener.advance(len(hidden_BSD))


@dataclass
class _Watch:
    """Shows the input of linear `name` to statistics: here, and, to paired ones, the full-precision
    model's beside.
    """

    name: str
    stats: tuple[Stat, ...]
    sequences: int = 0
    dense_TI: Tensor | None = None

    def hooks(self, block: nn.Module, dense: Dense | None) -> list[Any]:
        found = [block.get_submodule(self.name).register_forward_pre_hook(self.see)]
        if dense is not None and any(stat.paired for stat in self.stats):
            found.append(
                dense.block.get_submodule(self.name).register_forward_pre_hook(self.see_dense)
            )
        return found

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TI = args[0].flatten(0, -2)
        for stat in self.stats:
            stat.update(x_TI, self.sequences)
            if stat.paired and self.dense_TI is not None:
                stat.pair(x_TI, self.dense_TI)
        self.dense_TI = None

    def see_dense(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.dense_TI = args[0].flatten(0, -2)


class Dense(NamedTuple):
    """The full-precision model beside the quantized one: its block, and its own activations."""

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


class _CaughtError(Exception):
    """Raised on purpose, to stop a forward pass at the first block."""


class _Catcher(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = (
            original  # not a child: only lends its attributes to the decoder's loop
        )
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden, kwargs
        raise _CaughtError


def capture(decoder: nn.Module, ids_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Input [B, S, D] of the first block and the keyword arguments the decoder passes to it (mask,
    rotary tables).
    """
    return _caught(decoder, lambda: decoder(input_ids=ids_BS, use_cache=False))


@torch.no_grad()
def _caught(decoder: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, dict[str, Any]]:
    """What the first block of `decoder` is given when `run` is called, which ends there."""
    blocks = decoder.layers
    assert isinstance(blocks, nn.ModuleList)
    catcher = _Catcher(blocks[0])
    decoder.layers = nn.ModuleList([catcher, *blocks[1:]])
    try:
        run()
    except _CaughtError:
        pass
    finally:
        decoder.layers = blocks
    assert catcher.hidden is not None
    return catcher.hidden, catcher.kwargs
