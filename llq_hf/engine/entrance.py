"""What the blocks of a decoder get: the input of the first, and the arguments of each.

The model's own forward pass runs, with its real embeddings, while each block hands its input on and
notes what it is called with. No block is computed. Masks and rotary tables may differ from block to
block: sliding windows, layers without positions.

Legend: B sequences per forward pass, S tokens each, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..data.pairs import Pairs
from ..models.decoder import decoder_of, forwards_replaced
from .blocks import Blocks

# Tokens per forward pass: enough to keep the cores busy, few enough to bound memory.
BATCH_TOKENS = 4096

Arguments = dict[str, Any]  # of a block, by name, but for the hidden states


@dataclass
class BlockArguments:
    """The arguments of every block for one batch.

    kinds: different ones, each kept once. kind_of: for each block, its number among `kinds`.
    """

    kinds: list[Arguments] = field(default_factory=list)
    kind_of: list[int] = field(default_factory=list)

    def append(self, arguments: Arguments) -> None:
        """Add those of the next block."""
        for number, known in enumerate(self.kinds):
            if _are_the_same(known, arguments):
                self.kind_of.append(number)
                return
        self.kind_of.append(len(self.kinds))
        self.kinds.append(arguments)

    def of(self, index: int) -> Arguments:
        return self.kinds[self.kind_of[index]]

    def to(self, device: torch.device) -> BlockArguments:
        return BlockArguments([moved(kind, device) for kind in self.kinds], self.kind_of)


def _are_the_same(one: Arguments, other: Arguments) -> bool:
    """Whether two blocks got the same objects, or equal plain values."""
    return one.keys() == other.keys() and all(
        value is other[name] or (_is_plain(value) and value == other[name])
        for name, value in one.items()
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(part, device) for part in value)
    return value


# --- the model's own forward pass, without its blocks ---------------------------------------------


class Call(NamedTuple):
    """How a decoder called one of its blocks."""

    number: int  # of the block
    hidden_BSD: Tensor
    arguments: Arguments


class _LastBlockReachedError(Exception):
    """Ends a forward pass at the last block."""


@torch.no_grad()
def block_calls(decoder: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, BlockArguments]:
    """The input [B, S, D] of the first block when `run` is called, and the arguments of each block.

    LLQError where a decoder does more than to take its hidden states from block to block: then one
    block at a time is not the model.
    """
    assert isinstance(decoder.layers, nn.ModuleList)
    blocks, last = list(decoder.layers), len(decoder.layers) - 1
    # Blocks return a tensor, but in some architectures a tuple, whose first element is taken. Of a
    # tensor that would be its first sequence.
    for answer in (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None)):
        calls: list[Call] = []
        standing_in = [
            partial(_hand_on, calls, answer, number, number == last, _parameters(block))
            for number, block in enumerate(blocks)
        ]
        with forwards_replaced(blocks, standing_in):
            failed = _until_the_last_block(run)
        if failed is None and _is_one_stream(calls, len(blocks)):
            arguments = BlockArguments()
            for call in calls:
                arguments.append(call.arguments)
            return calls[0].hidden_BSD, arguments
    if failed is not None and not calls:  # it has nothing to do with blocks
        raise failed
    raise LLQError(
        f"{type(decoder).__name__} does more between its blocks than to hand on hidden states"
        f"{f' ({failed})' if failed else ''}: it cannot be calibrated block by block; "
        "a method without calibration, such as rtn, needs no such pass"
    )


def _until_the_last_block(run: Callable[[], Any]) -> Exception | None:
    """Call `run`; the error that ended it before the last block, if one did."""
    try:
        with suppress(_LastBlockReachedError):
            run()
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        return error
    return None


def _is_one_stream(calls: Sequence[Call], blocks: int) -> bool:
    """Whether every block was called once, in order, with what the one before it handed on."""
    if [call.number for call in calls] != list(range(blocks)):
        return False
    first = calls[0].hidden_BSD
    return all(
        call.hidden_BSD.ndim == 3
        and (call.hidden_BSD is first or torch.equal(call.hidden_BSD, first))
        for call in calls
    )


def _parameters(block: nn.Module) -> list[str]:
    """Names of the arguments of a block, hidden states first."""
    return list(inspect.signature(block.forward).parameters)


def _hand_on(
    calls: list[Call],
    answer: Callable[[Tensor], Any],
    number: int,
    last: bool,
    parameters: list[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for the forward pass of a block."""
    arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
    hidden_BSD = arguments.pop(parameters[0])
    calls.append(Call(number, hidden_BSD, arguments))
    if last:
        raise _LastBlockReachedError
    return answer(hidden_BSD)


# --- of calibration data --------------------------------------------------------------------------


class Entrance:
    """Turns calibration data (token ids or image-text pairs) into the input of the first block.

    Images go through the model's own vision tower and projector, so that visual tokens are in the
    sequence as they are at inference.
    """

    def __init__(self, blocks: Blocks, data: Tensor | Pairs) -> None:
        self.data = data
        self.device = blocks.device
        self.is_pairs = isinstance(data, Pairs)
        self.runner = blocks.around() if self.is_pairs else blocks.decoder()
        self.lengths = data.lengths if isinstance(data, Pairs) else [data.shape[1]] * len(data)
        # Sequences per forward pass.
        self.size = 1 if self.is_pairs else max(1, BATCH_TOKENS // self.lengths[0])

    def batches(self) -> list[slice]:
        count = len(self.lengths)
        return [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def calls(self, rows: slice) -> tuple[Tensor, BlockArguments]:
        """Input [B, S, D] of the first block, and the arguments of each block."""
        if not isinstance(self.data, Pairs):
            return self._calls_of(self.data[rows].to(self.device))
        dtype = next(self.runner.parameters()).dtype
        inputs = self.data.inputs_on(rows.start, self.device, dtype)
        decoder = decoder_of(self.runner)[1]
        return block_calls(decoder, lambda: self.runner(**inputs, use_cache=False))

    def _calls_of(self, ids_BS: Tensor) -> tuple[Tensor, BlockArguments]:
        return block_calls(self.runner, lambda: self.runner(input_ids=ids_BS, use_cache=False))

    def shared_arguments(self) -> BlockArguments | None:
        """The arguments of each block for any sequence of token ids; None for pairs, which have
        their own.

        LLQError where they depend on the tokens and not only on their number.
        """
        if isinstance(self.data, Pairs):
            return None
        ids_1S = self.data[:1].to(self.device)
        _, own = self._calls_of(ids_1S)
        _, others = self._calls_of(ids_1S.flip(1))
        if not _are_equal((own.kind_of, own.kinds), (others.kind_of, others.kinds)):
            raise LLQError(
                f"{type(self.runner).__name__} gives its blocks arguments that depend on the "
                "tokens: it cannot be calibrated block by block; a method without calibration, "
                "such as rtn, needs no such pass"
            )
        return own


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two structures hold equal tensors and equal plain values; other objects only count by
    their type. A GPU is asked once.
    """
    equal: list[Tensor] = []
    return _match(one, other, equal) and (not equal or bool(torch.stack(equal).all()))


def _match(one: Any, other: Any, equal: list[Tensor]) -> bool:
    """Whether all but the values of tensors is equal, whose comparisons go to `equal`."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.shape == other.shape:
            equal.append((one == other).all())
        return bool(one.shape == other.shape)
    if isinstance(one, dict):
        same = one.keys() == other.keys()
        return same and all(_match(value, other[key], equal) for key, value in one.items())
    if isinstance(one, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_match(*pair, equal) for pair in pairs)
    return not _is_plain(one) or bool(one == other)
