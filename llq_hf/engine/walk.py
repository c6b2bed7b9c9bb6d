"""The only code that runs a model to calibrate it.

Legend: N calibration sequences, S tokens each, D hidden size, B sequences per forward pass; T tokens of all sequences.

`walk` yields one decoder block at a time with the statistics of its linears' inputs. While the generator is suspended
the caller puts quantized linears in their place, so the next block sees what quantized blocks produce. Blocks come
from a live model or, one at a time, from safetensors on disk; activations lie in memory or in a mapped file.
"""

from __future__ import annotations

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.dense import Checkpoint
from ..common.errors import LLQError
from ..data.pairs import Pairs
from ..layers.attention import install
from ..method import Flow, Method, PassListener, State, Step
from ..models.decoder import block_linears, block_prefixes, decoder_of, hidden_of, input_groups
from ..numerics.stats import Stat
from .team import Stats, Team, batches_of, edges_of

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

    @abstractmethod
    def around(self) -> nn.Module:
        """The whole model, but for its blocks and its head: what turns images and text into the first block's input."""


class LiveBlocks(Blocks):
    """The blocks of a model that is in memory already; they are changed in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.prefixes = model, block_prefixes(model)
        self.device = next(model.parameters()).device

    def load(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.prefixes[index])

    def decoder(self) -> nn.Module:
        return decoder_of(self.model)[1]

    def around(self) -> nn.Module:
        return self.model


class StreamedBlocks(Blocks):
    """Blocks read from a checkpoint as they are asked for. `skeleton` is the whole model on the meta device."""

    def __init__(self, checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.skeleton, self.dtype, self.device = checkpoint, skeleton, dtype, device
        self.prefixes = block_prefixes(skeleton)

    def load(self, index: int) -> nn.Module:
        prefix = self.prefixes[index]
        block = copy.deepcopy(self.skeleton.get_submodule(prefix))
        return self._filled(block, prefix)

    def decoder(self) -> nn.Module:
        name, skeleton = decoder_of(self.skeleton)
        return with_computed(self._filled(self._hollow(skeleton), name), self.device)

    def around(self) -> nn.Module:
        model: Any = self._hollow(self.skeleton)
        model.set_output_embeddings(nn.Identity())  # never reached, and as large as the embeddings
        return with_computed(self._filled(model, ""), self.device)

    def _hollow(self, module: nn.Module) -> nn.Module:
        """A copy of the skeleton, or of its decoder, without the blocks."""
        decoder = decoder_of(self.skeleton)[1]
        blocks, decoder.layers = decoder.layers, nn.ModuleList([nn.Identity() for _ in self.prefixes])
        try:
            return copy.deepcopy(module)
        finally:
            decoder.layers = blocks

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module` with its meta parameters replaced by the checkpoint's tensors, cast to the run's dtype."""
        names = {f"{prefix}.{n}" if prefix else n: n for n, t in module.state_dict(keep_vars=True).items() if t.is_meta}
        tensors = self.checkpoint.read(names)
        own = {names[key]: tensor.to(self.device, self.dtype) for key, tensor in tensors.items()}
        module.load_state_dict(own, strict=False, assign=True)
        return module.requires_grad_(False).eval()


def with_computed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with the buffers that no file holds (rotary tables, position ids), as from_pretrained computes them."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
            elif buffer is not None:
                setattr(buffer, "_is_hf_initialized", True)  # noqa: B010 (transformers' mark: leave it as it is)
    for parameter in model.parameters():
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010
    initialize: Any = model.initialize_weights
    initialize()
    return model


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

    def copy(self, offload: Path | None) -> Activations:
        """The same values in a place of their own."""
        twin = copy.copy(self)
        count, length, width = self.tensor_NSD.shape
        Activations.__init__(twin, (count, length, width), self.tensor_NSD.dtype, offload)
        twin.tensor_NSD.copy_(self.tensor_NSD)
        return twin


class Ragged(Activations):
    """Sequences of different lengths, one behind the other in [1, T, D]; they come and go one at a time."""

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, offload: Path | None) -> None:
        super().__init__((1, sum(lengths), width), dtype, offload)
        self.ends = [0, *accumulate(lengths)]

    def __getitem__(self, rows: slice) -> Tensor:
        several = len(range(*rows.indices(len(self.ends) - 1)))
        if several != 1:
            raise LLQError(f"{several} sequences of different lengths do not make a batch; train with a batch of 1")
        return self.tensor_NSD[:, self.ends[rows.start] : self.ends[rows.start + 1]]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self[rows].copy_(value)


class Entrance:
    """What calibration data becomes where it enters the first block: windows of token ids, or image-text pairs.

    Images go through the model's own tower and projector: visual tokens are in the sequence as they are in use.
    """

    def __init__(self, blocks: Blocks, data: Tensor | Pairs) -> None:
        self.data, self.device = data, blocks.device
        self.pairs = isinstance(data, Pairs)
        self.runner = blocks.around() if self.pairs else blocks.decoder()
        self.lengths = data.lengths if isinstance(data, Pairs) else [data.shape[1]] * len(data)
        self.size = 1 if self.pairs else max(1, BATCH_TOKENS // self.lengths[0])  # sequences per forward pass

    def batches(self) -> list[slice]:
        count = len(self.lengths)
        return [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def capture(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        """Input [B, S, D] of the first block and the keyword arguments that it gets."""
        if not isinstance(self.data, Pairs):
            return capture(self.runner, self.data[rows].to(self.device))
        dtype = next(self.runner.parameters()).dtype
        inputs = {name: t.to(self.device, dtype if t.is_floating_point() else None) for name, t in self._pair(rows)}
        return _caught(decoder_of(self.runner)[1], lambda: self.runner(**inputs, use_cache=False))

    def _pair(self, rows: slice) -> Iterable[tuple[str, Tensor]]:
        assert isinstance(self.data, Pairs)
        return self.data.inputs(rows.start).items()

    def room(self, width: int, dtype: torch.dtype, offload: Path | None) -> Activations:
        if self.pairs:
            return Ragged(self.lengths, width, dtype, offload)
        return Activations((len(self.lengths), self.lengths[0], width), dtype, offload)


class Stream:
    """The calibration set on its way through the blocks: its activations and the keyword arguments every block gets."""

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
        edges = self.team.own(edges_of(len(data), shards))
        if isinstance(data, Tensor):
            data = data[edges[0] : edges[-1]]  # of several processes, each holds its own
        entrance = Entrance(blocks, data)
        self.count, self.pairs = len(entrance.lengths), entrance.pairs
        self.length = -(-sum(entrance.lengths) // self.count)
        self.shards = batches_of([edge - edges[0] for edge in edges], entrance.size)
        self.listener = listener
        # Keyword arguments of pairs by number: masks may depend on where the image is. Else by batch size: masks have a
        # batch axis, and those of size 1 serve any other.
        self._kwargs: dict[int, dict[str, Any]] = {} if self.pairs else {1: entrance.capture(slice(0, 1))[1]}
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
        return hidden_BSD, self._kwargs.get(len(hidden_BSD), self._kwargs[1])  # of size 1, it broadcasts

    @torch.no_grad()
    def observe(
        self, block: nn.Module, groups: list[list[str]], observes: Mapping[str, type[Stat] | None], dense: Dense | None
    ) -> dict[str, Stat]:
        """Statistics of the input of every linear in `groups`, of the kind that it `observes`.

        Linears of a group share one object of a kind. dense: the full-precision block and its stream, which paired
        statistics look at beside this one.
        """
        if not any(observes[name] for group in groups for name in group):
            return {}
        self.listener.stage("statistics", self.count)
        shares = (self._observe(block, groups, observes, dense, batches) for batches in self.shards)
        found = self.team.reduced(shares)
        asked = ((group[0], name, observes[name]) for group in groups for name in group)
        return {name: found[f"{first}/{kind.__name__}"] for first, name, kind in asked if kind is not None}

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
        handles = [handle for watch in watches for handle in watch.hooks(block, dense if beside else None)]
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
    """Shows the input of linear `name` to statistics: here, and, to paired ones, the full-precision model's beside."""

    name: str
    stats: tuple[Stat, ...]
    sequences: int = 0
    dense_TI: Tensor | None = None

    def hooks(self, block: nn.Module, dense: Dense | None) -> list[Any]:
        found = [block.get_submodule(self.name).register_forward_pre_hook(self.see)]
        if dense is not None and any(stat.paired for stat in self.stats):
            found.append(dense.block.get_submodule(self.name).register_forward_pre_hook(self.see_dense))
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


def capture(decoder: nn.Module, ids_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Input [B, S, D] of the first block and the keyword arguments the decoder passes to it (mask, rotary tables)."""
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


def walk(
    blocks: Blocks,
    calibration: Tensor | Pairs | None,
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
    if method.calibrated and calibration is None:
        raise LLQError("this method needs calibration data")
    listener = listener or PassListener()
    stream = None
    if method.calibrated and calibration is not None:
        stream = Stream(blocks, calibration, offload, listener, shards, team)
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
            parts = [[list(block_linears(block))]]
        else:
            groups = input_groups(block, *stream.inputs(stream.batches()[0]))
            parts = [[group] for group in groups] if method.sequential else [groups]
        for number, part in enumerate(parts, start=1):
            dense = Dense(original, beside) if original is not None and beside is not None else None
            step = _step(prefix, block, part, stream, dense, method)
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
    method: Method,
) -> Step:
    """The linears of `part`. In a function of its own, so that no name of the loop keeps a block or a Hessian alive."""
    observes = {name: method.at(f"{prefix}.{name}").observes for group in part for name in group}
    stats = stream.observe(block, part, observes, dense) if stream is not None else {}
    for name, stat in stats.items():
        stat.check(f"{prefix}.{name}")
    linears = block_linears(block)
    data = StreamData(stream, dense.stream if dense is not None else None) if stream is not None else None
    return Step(prefix, block, {name: linears[name] for group in part for name in group}, stats, part, data)
