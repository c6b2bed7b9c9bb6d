"""The only code that runs a model to calibrate it.

Legend: N calibration sequences, S tokens each, D hidden size, B sequences per forward pass; T
tokens of all sequences.

`walk` yields one decoder block at a time with the statistics of its linears' inputs. While the
generator is suspended the caller puts quantized linears in their place, so the next block sees what
quantized blocks produce. Blocks come from a live model or, one at a time, from safetensors on disk;
activations lie in memory or in a mapped file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import PassListener
from ..data.pairs import Pairs
from ..layers.attention import install
from ..method import Flow, Method, State, Step
from ..models.decoder import block_linears, input_groups
from .blocks import Blocks
from .stream import Dense, Stream, StreamData
from .team import Team


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
    """Yield the steps of every block not `finished`; `on_block` is called when a block's last step
    was consumed.

    A finished block (of a resumed run) is only passed through: `restore` puts its packed linears in
    place. Without calibration no data is needed and nothing is run. shards, team: see
    `distributed`.
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
                _pass_through(
                    blocks.load(index), prefix, method, stream, beside, partial(restore, index)
                )
            continue
        block = blocks.load(index)
        original = (
            copy.deepcopy(block)
            if stream is not None and method.flow is not Flow.QUANTIZED
            else None
        )
        if stream is None:
            parts = [[list(block_linears(block))]]
        else:
            groups = input_groups(block, *stream.inputs(stream.batches()[0]))
            parts = [[group] for group in groups] if method.sequential else [groups]
        for number, part in enumerate(parts, start=1):
            dense = Dense(original, beside) if original is not None and beside is not None else None
            step = _step(prefix, block, part, stream, dense, method)
            if dense is not None and number == len(
                parts
            ):  # its inputs are not needed again: they become the targets
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
            stream.advance(
                original if method.flow is Flow.DENSE and original is not None else block, prefix
            )
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
    """The linears of `part`. In a function of its own, so that no name of the loop keeps a block or
    a Hessian alive.
    """
    observes = {
        name: method.for_linear(f"{prefix}.{name}").observes for group in part for name in group
    }
    stats = stream.observe(block, part, observes, dense) if stream is not None else {}
    for name, stat in stats.items():
        stat.check(f"{prefix}.{name}")
    linears = block_linears(block)
    data = (
        StreamData(stream, dense.stream if dense is not None else None)
        if stream is not None
        else None
    )
    return Step(
        prefix, block, {name: linears[name] for group in part for name in group}, stats, part, data
    )
