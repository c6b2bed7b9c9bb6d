"""The walk: a model's decoder blocks in order, each with what a method may know about it.

`walk` yields blocks; the caller writes the loop. A block yields steps: some or all of its linears,
with statistics of their inputs. The caller replaces the linears by packed ones before it asks for
the next step, so later linears and later blocks see what quantized ones produce:

    for block in walk(blocks, data, method, progress, run):
        for step in block.steps():
            quantize_step(step, method)

A block that an earlier run finished needs no steps: the caller restores its packed linears in
`block.module` where `block.feeds_next` says that they are needed, and goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.pairs import Pairs
from ..layers.attention import install
from ..method import Flow, Method, State, Step
from ..models.decoder import block_linears, input_groups
from .blocks import Blocks
from .options import RunOptions
from .stream import Dense, Stream, StreamData


@dataclass
class Passage:
    """The streams of activations that go through the blocks with the walk.

    stream: what the method is calibrated on; None where it asks for no calibration. beside: the
    activations of the full-precision model, where the method compares with them (`Flow.BOTH`).
    """

    method: Method
    progress: Progress
    stream: Stream | None = None
    beside: Stream | None = None

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        data: Tensor | Pairs | None,
        method: Method,
        progress: Progress,
        run: RunOptions,
    ) -> Passage:
        if not method.calibrated:
            return cls(method, progress)
        if data is None:
            raise LLQError("this method needs calibration data")
        stream = Stream(blocks, data, run.offload, progress, run.shards, run.team)
        beside = stream.copy(run.offload) if method.flow is Flow.BOTH else None
        return cls(method, progress, stream, beside)


@dataclass
class Block:
    """One decoder block on the walk. It is loaded when `module` or `steps` are first asked for."""

    index: int
    prefix: str  # module name, "model.layers.3"
    is_last: bool
    _blocks: Blocks
    _passage: Passage
    # The block in full precision, as long as a stream has to go through it.
    _dense: nn.Module | None = field(default=None, init=False)

    @cached_property
    def module(self) -> nn.Module:
        """The block. The caller replaces linears in it."""
        loaded = self._blocks.load(self.index)
        for stream in (self._passage.stream, self._passage.beside):
            if stream is not None:
                stream.enter(self.index, loaded)
        if self._passage.stream is not None and self._passage.method.flow is not Flow.QUANTIZED:
            self._dense = copy.deepcopy(loaded)
        return loaded

    @property
    def feeds_next(self) -> bool:
        """Whether the next block is calibrated on what this one's packed linears produce."""
        calibrated = self._passage.stream is not None and not self.is_last
        return calibrated and self._passage.method.flow is not Flow.DENSE

    def steps(self, state: State | None = None) -> Iterator[Step]:
        """The parts of the block, each to be quantized before the next is asked for.

        state: where a long training keeps its progress.
        """
        parts = self._parts()
        for number, part in enumerate(parts, start=1):
            step = self._step(part)
            step.state = state or State()
            if number == len(parts):  # the dense inputs have served: outputs become the targets
                self._take_beside_through()
            yield step
            step.release()

    def _parts(self) -> list[list[list[str]]]:
        """Groups of linears that share an input: all at once, or group by group if sequential."""
        stream, method = self._passage.stream, self._passage.method
        if stream is None:
            return [[list(block_linears(self.module))]]
        groups = input_groups(self.module, *stream.inputs(stream.batches()[0]))
        return [[group] for group in groups] if method.sequential else [groups]

    def _step(self, part: list[list[str]]) -> Step:
        """The linears of `part` with their statistics.

        In a function of its own, so that no name of a loop keeps a block or a Hessian alive.
        """
        passage, method, module = self._passage, self._passage.method, self.module
        stream, beside = passage.stream, passage.beside
        dense = None
        if self._dense is not None and beside is not None:
            dense = Dense(self._dense, beside)
        names = [name for group in part for name in group]
        observes = {name: method.for_linear(f"{self.prefix}.{name}").observes for name in names}
        stats = stream.observe(module, part, observes, dense) if stream is not None else {}
        for name, stat in stats.items():
            stat.check(f"{self.prefix}.{name}")
        linears = block_linears(module)
        step = Step(self.prefix, module, {name: linears[name] for name in names}, stats, part)
        step.on_linear = passage.progress.linear
        step.listener = passage.progress
        if stream is not None:
            step.data = StreamData(stream, beside if dense is not None else None)
        if method.attention is not None:
            step.attend = partial(install, attention=method.attention)
        return step

    def _take_beside_through(self) -> None:
        beside = self._passage.beside
        if beside is not None and self._dense is not None:
            beside.advance(self._dense, self.prefix)
            self._dense = None

    def _take_stream_through(self) -> None:
        """Replace the streams' activations by this block's outputs, and let go of the block."""
        method, stream = self._passage.method, self._passage.stream
        goes_on = stream is not None and not self.is_last
        if method.attention is not None and (goes_on or "module" in self.__dict__):
            install(self.module, method.attention)
        if stream is not None and goes_on:
            module = self.module
            self._take_beside_through()
            dense = self._dense if method.flow is Flow.DENSE else None
            stream.advance(module if dense is None else dense, self.prefix)
        self.__dict__.pop("module", None)
        self._dense = None


def walk(
    blocks: Blocks,
    data: Tensor | Pairs | None,
    method: Method,
    progress: Progress | None = None,
    run: RunOptions | None = None,
) -> Iterator[Block]:
    """Yield every decoder block in order; see the head of the file.

    data: token ids [N, S] or image-text pairs; a method that is not calibrated reads none, and
    nothing is run for it. LLQError where a calibrated method gets none.
    """
    progress = progress or Progress()
    passage = Passage.of(blocks, data, method, progress, run or RunOptions())
    last = len(blocks.prefixes) - 1
    for index, prefix in enumerate(blocks.prefixes):
        block = Block(index, prefix, index == last, blocks, passage)
        yield block
        block._take_stream_through()
