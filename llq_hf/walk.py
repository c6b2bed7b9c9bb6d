"""The only code that runs a model to calibrate it.

Legend: N calibration sequences, S tokens each, D hidden size, B sequences per forward pass.

`walk` yields one decoder block at a time with the statistics of its linears' inputs. While the generator is suspended
the caller puts quantized linears in their place, so the next block sees what quantized blocks produce. Blocks come
from a live model or, one at a time, from safetensors on disk; activations lie in memory or in a mapped file.
"""

from __future__ import annotations

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arch
from .attention import install
from .checkpoint import Checkpoint
from .distributed import Stats, Team, batches_of, edges_of
from .errors import LLQError
from .method import Flow, Method, PassListener, State, Step
from .stats import Stat

BATCH_TOKENS = 4096  # tokens per forward pass: enough to keep the cores busy, little enough to bound memory


class Blocks(ABC):
    """Decoder blocks, one at a time, and the decoder around them that turns token ids into the first block's input."""

    prefixes: list[str]
    device: torch.device

    @abstractmethod
    def load(self, index: int) -> nn.Module:
        """The block with real tensors, ready to run. The caller drops it before it asks for the next."""

    @abstractmethod
    def decoder(self) -> nn.Module:
        """The decoder with real embeddings and rotary tables; its blocks are not run."""


class LiveBlocks(Blocks):
    """The blocks of a model that is in memory already; they are changed in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.prefixes = model, arch.block_prefixes(model)
        self.device = next(model.parameters()).device

    def load(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.prefixes[index])

    def decoder(self) -> nn.Module:
        return arch.decoder_of(self.model)[1]


class StreamedBlocks(Blocks):
    """Blocks read from a checkpoint as they are asked for. `skeleton` is the whole model on the meta device."""

    def __init__(self, checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.skeleton, self.dtype, self.device = checkpoint, skeleton, dtype, device
        self.prefixes = arch.block_prefixes(skeleton)

    def load(self, index: int) -> nn.Module:
        prefix = self.prefixes[index]
        block = copy.deepcopy(self.skeleton.get_submodule(prefix))
        return self._filled(block, prefix)

    def decoder(self) -> nn.Module:
        name, skeleton = arch.decoder_of(self.skeleton)
        blocks, skeleton.layers = skeleton.layers, nn.ModuleList()
        try:
            decoder = copy.deepcopy(skeleton)
        finally:
            skeleton.layers = blocks
        decoder.layers = nn.ModuleList([nn.Identity() for _ in self.prefixes])
        for child, module in list(decoder.named_children()):
            if any(buffer.is_meta for buffer in module.buffers()):  # rotary tables are computed, not stored
                setattr(decoder, child, type(module)(config=decoder.config).to(self.device))
        return self._filled(decoder, name)

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module` with its meta parameters replaced by the checkpoint's tensors, cast to the run's dtype."""
        names = {f"{prefix}.{n}" if prefix else n: n for n, t in module.state_dict(keep_vars=True).items() if t.is_meta}
        tensors = self.checkpoint.read(names)
        own = {names[key]: tensor.to(self.device, self.dtype) for key, tensor in tensors.items()}
        module.load_state_dict(own, strict=False, assign=True)
        return module.requires_grad_(False).eval()


class Activations:
    """What flows from block to block: [N, S, D], in memory or in a file of `offload`; batches are replaced in place."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, offload: Path | None) -> None:
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
            raise LLQError(f"{offload} has no room for {need:.0f} MiB of activations ({error.strerror})") from error
        self.tensor_NSD = torch.from_file(self._file.name, shared=True, size=count, dtype=dtype).view(shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor_NSD[rows]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self.tensor_NSD[rows] = value.to(self.tensor_NSD)


class Stream:
    """The calibration set on its way through the blocks: its activations and the keyword arguments every block gets."""

    def __init__(
        self,
        blocks: Blocks,
        ids_NS: Tensor,
        offload: Path | None,
        listener: PassListener,
        shards: int = 1,
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
        edges = self.team.own(edges_of(len(ids_NS), shards))
        ids_NS = ids_NS[edges[0] : edges[-1]]  # of several processes, each holds its own
        self.count, self.length = ids_NS.shape
        self.shards = batches_of([edge - edges[0] for edge in edges], max(1, BATCH_TOKENS // self.length))
        self.listener = listener
        self._kwargs: dict[int, dict[str, Any]] = {}  # by batch size: masks have a batch axis
        decoder = blocks.decoder()
        activations: Activations | None = None
        self._kwargs[1] = capture(decoder, ids_NS[:1].to(blocks.device))[1]  # for batches of any other size
        for rows in self.batches():
            hidden_BSD, kwargs = capture(decoder, ids_NS[rows].to(blocks.device))
            if activations is None:
                activations = Activations((self.count, *hidden_BSD.shape[1:]), hidden_BSD.dtype, offload)
            activations[rows] = hidden_BSD
            self._kwargs.setdefault(len(hidden_BSD), kwargs)
        assert activations is not None
        self.activations, self.device = activations, blocks.device

    def copy(self, offload: Path | None) -> Stream:
        """Another stream at the same place, with activations of its own."""
        twin = copy.copy(self)
        source = self.activations.tensor_NSD
        count, length, width = source.shape
        twin.activations = Activations((count, length, width), source.dtype, offload)
        twin.activations[slice(None)] = source
        return twin

    def batches(self) -> list[slice]:
        return [rows for batches in self.shards for rows in batches]

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        hidden_BSD = self.activations[rows].to(self.device)
        return hidden_BSD, self._kwargs.get(len(hidden_BSD), self._kwargs[1])  # of size 1, it broadcasts

    @torch.no_grad()
    def observe(
        self, block: nn.Module, groups: list[list[str]], observes: type[Stat], dense: Dense | None
    ) -> dict[str, Stat]:
        """Statistics of the input of every linear in `groups`; linears of a group share one object.

        dense: the full-precision block and its stream, which paired statistics look at beside this one.
        """
        self.listener.stage("statistics", self.count)
        shares = (self._observe(block, groups, observes, dense, batches) for batches in self.shards)
        found = self.team.reduced(shares)
        return {name: found[group[0]] for group in groups for name in group}

    def _observe(
        self,
        block: nn.Module,
        groups: list[list[str]],
        observes: type[Stat],
        dense: Dense | None,
        batches: list[slice],
    ) -> Stats:
        """Statistics of some batches, by the first linear of each group."""
        linears = arch.block_linears(block)
        stats: Stats = {}
        handles, sequences = [], 0
        beside = dense is not None and observes.paired
        dense_inputs: dict[str, Tensor] = {}
        for group in groups:
            stat = observes(linears[group[0]].in_features, self.device)
            stats[group[0]] = stat

            def hook(module: nn.Module, args: tuple[Tensor, ...], stat: Stat = stat, name: str = group[0]) -> None:
                stat.update(args[0].flatten(0, -2), sequences)
                if beside:
                    stat.pair(args[0].flatten(0, -2), dense_inputs.pop(name).flatten(0, -2))

            def dense_hook(module: nn.Module, args: tuple[Tensor, ...], name: str = group[0]) -> None:
                dense_inputs[name] = args[0]

            handles.append(linears[group[0]].register_forward_pre_hook(hook))
            if dense is not None and beside:
                handles.append(dense.block.get_submodule(group[0]).register_forward_pre_hook(dense_hook))
        try:
            for rows in batches:
                hidden_BSD, kwargs = self.inputs(rows)
                sequences = len(hidden_BSD)
                if dense is not None and beside:
                    dense.block(dense.stream.activations[rows].to(self.device), **kwargs)
                block(hidden_BSD, **kwargs)
                self.listener.advance(sequences)
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
            out_BSD = arch.first(block(hidden_BSD, **kwargs))
            if not torch.isfinite(out_BSD).all():
                raise LLQError(
                    f"the output of {name} is not finite in {out_BSD.dtype}; run with dtype float32 or bfloat16"
                )
            self.activations[rows] = out_BSD
            self.listener.advance(len(hidden_BSD))


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
        self.__dict__["original"] = original  # not a child: only lends its attributes to the decoder's loop
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


@torch.no_grad()
def capture(decoder: nn.Module, ids_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Input [B, S, D] of the first block and the keyword arguments the decoder passes to it (mask, rotary tables)."""
    blocks = decoder.layers
    assert isinstance(blocks, nn.ModuleList)
    catcher = _Catcher(blocks[0])
    decoder.layers = nn.ModuleList([catcher, *blocks[1:]])
    try:
        decoder(input_ids=ids_BS, use_cache=False)
    except _CaughtError:
        pass
    finally:
        decoder.layers = blocks
    assert catcher.hidden is not None
    return catcher.hidden, catcher.kwargs


def walk(
    blocks: Blocks,
    ids_NS: Tensor | None,
    method: Method,
    *,
    restore: Callable[[int, nn.Module], None] = lambda index, block: None,
    finished: Callable[[int], bool] = lambda index: False,
    offload: Path | None = None,
    on_block: Callable[[int, nn.Module], None] = lambda index, block: None,
    listener: PassListener | None = None,
    on_linear: Callable[[str], None] = lambda name: None,
    state_of: Callable[[int], State] = lambda index: State(),
    shards: int = 1,
    team: Team | None = None,
) -> Iterator[Step]:
    """Yield the steps of every block not `finished`; `on_block` is called when a block's last step was consumed.

    A finished block (of a resumed run) is only passed through: `restore` puts its packed linears in place. Without
    calibration no data is needed and nothing is run. shards, team: see `distributed`.
    """
    if method.calibrated and ids_NS is None:
        raise LLQError("this method needs calibration data")
    listener = listener or PassListener()
    stream = None
    if method.calibrated and ids_NS is not None:
        stream = Stream(blocks, ids_NS, offload, listener, shards, team)
    beside = stream.copy(offload) if stream is not None and method.flow is Flow.BOTH else None
    last = len(blocks.prefixes) - 1
    for index, prefix in enumerate(blocks.prefixes):
        if finished(index):
            if stream is not None and index < last:
                _pass_through(blocks.load(index), prefix, method, stream, beside, partial(restore, index))
            continue
        block = blocks.load(index)
        original = copy.deepcopy(block) if stream is not None and method.flow is not Flow.QUANTIZED else None
        if stream is None:
            parts = [[list(arch.block_linears(block))]]
        else:
            groups = arch.input_groups(block, *stream.inputs(stream.batches()[0]))
            parts = [[group] for group in groups] if method.sequential else [groups]
        for number, part in enumerate(parts, start=1):
            dense = Dense(original, beside) if original is not None and beside is not None else None
            step = _step(prefix, block, part, stream, dense, method.observes)
            if dense is not None and number == len(parts):  # its inputs are not needed again: they become the targets
                dense.stream.advance(dense.block, prefix)
            step.on_linear, step.listener, step.state = on_linear, listener, state_of(index)
            if method.attention is not None:
                step.attend = partial(install, attention=method.attention)
            yield step
            step.release()
        if method.attention is not None:
            install(block, method.attention)
        on_block(index, block)
        if stream is not None and index < last:
            stream.advance(original if method.flow is Flow.DENSE and original is not None else block, prefix)
        del block, original


def _pass_through(
    block: nn.Module,
    prefix: str,
    method: Method,
    stream: Stream,
    beside: Stream | None,
    restore: Callable[[nn.Module], None],
) -> None:
    """Take the streams through a block that an earlier run finished."""
    if beside is not None:
        beside.advance(block, prefix)
    if method.flow is not Flow.DENSE:
        restore(block)
        if method.attention is not None:
            install(block, method.attention)
    stream.advance(block, prefix)


def _step(
    prefix: str,
    block: nn.Module,
    part: list[list[str]],
    stream: Stream | None,
    dense: Dense | None,
    observes: type[Stat] | None,
) -> Step:
    """The linears of `part`. In a function of its own, so that no name of the loop keeps a block or a Hessian alive."""
    stats = stream.observe(block, part, observes, dense) if stream is not None and observes is not None else {}
    for name, stat in stats.items():
        stat.check(f"{prefix}.{name}")
    linears = arch.block_linears(block)
    data = StreamData(stream, dense.stream if dense is not None else None) if stream is not None else None
    return Step(prefix, block, {name: linears[name] for group in part for name in group}, stats, part, data)
