"""Distributed runs (torchrun): processes share the calibration sequences and the linears.

Idea
    The sequences are cut into `shards`, each of which is a range of consecutive sequences. Each
    process runs the sequences of its own shards. A statistic is summed from zero over each shard,
    and the sums are added in the order of the shards, whichever process they come from. So a run of
    S shards gives the same bits in one process as in any number of processes that divides S, and
    another number can resume it. A run of one shard has the plain sum over all sequences, whose
    last bits differ. Matrix products must give the same bits too: the processes need the same kind
    of processor and the same number of threads.

Messages
    Partial sums go from rank to rank, and the last rank broadcasts the total. A solved linear is
    broadcast by the rank that solved it. A message is the content of a safetensors file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from ..common.errors import LLQError
from ..common.prefix import below
from ..numerics.stats import Stat

TIMEOUT = timedelta(days=1)  # a rank may wait for the longest solve of another
_JSON = " json"  # key of JSON in a message; no tensor of a method has a space in its name
Stats = dict[str, Stat]


@dataclass(frozen=True)
class Team:
    """The processes of a run. A single process (size 1) sends nothing.

    device: where the tensors of messages must be.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: torch.device) -> Team:
        """The team of the processes that torchrun started, or of this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(dist.get_rank(), size, str(device) if device.type == "cuda" else "cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def own_shards(self, edges: list[int]) -> list[int]:
        """Those of the edges of all shards that belong to the shards of this process.

        LLQError where the shards cannot be divided evenly.
        """
        shards = len(edges) - 1
        if shards % self.size:
            raise LLQError(
                f"shards={shards} cannot be shared by {self.size} processes; "
                "give a multiple of that"
            )
        each = shards // self.size
        return edges[self.rank * each : (self.rank + 1) * each + 1]

    def reduce(self, shares: Iterator[Stats]) -> Stats:
        """Statistics over all shards, merged in order.

        shares: those of this process's shards, computed when they are asked for.
        """
        # Ranks after the first compute all of theirs, and then wait for the rank before.
        waiting = shares if self.leads else iter(list(shares))
        total = next(waiting)
        if not self.leads:
            first = total
            total = {name: stat.fresh() for name, stat in first.items()}
            _load(total, self._receive(self.rank - 1))
            for name, stat in total.items():
                stat.merge(first[name])
        for share in waiting:
            for name, stat in share.items():
                total[name].merge(stat)
        if self.size == 1:
            return total
        if self.rank + 1 < self.size:
            self._send(_flat(total), self.rank + 1)
        _load(total, self.broadcast(_flat(total), self.size - 1))
        return total

    def broadcast(self, tensors: dict[str, Tensor], source: int) -> dict[str, Tensor]:
        """The tensors of rank `source`, on every rank. Those of other ranks are ignored."""
        if self.size == 1:
            return tensors
        content = self._bytes(tensors) if self.rank == source else None
        count = torch.tensor([0 if content is None else len(content)], device=self.device)
        dist.broadcast(count, source)
        if content is None:
            content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, source)
        return load(content.cpu().numpy().tobytes())

    def broadcast_json(self, message: Any) -> Any:
        """The JSON value of the first rank, on every rank."""
        return decode_json(self.broadcast(encode_json(message), 0))

    def _send(self, tensors: dict[str, Tensor], to: int) -> None:
        content = self._bytes(tensors)
        dist.send(torch.tensor([len(content)], device=self.device), to)
        dist.send(content, to)

    def _receive(self, source: int) -> dict[str, Tensor]:
        count = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(count, source)
        content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        dist.recv(content, source)
        return load(content.cpu().numpy().tobytes())

    def _bytes(self, tensors: dict[str, Tensor]) -> Tensor:
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)


def edges_of(count: int, shards: int) -> list[int]:
    """The first sequence of each of `shards` shards, and the end of the last one."""
    if not 1 <= shards <= count:
        raise LLQError(
            f"shards={shards} must be at least 1, and at most the {count} calibration sequences"
        )
    return [count * i // shards for i in range(shards + 1)]


def batches_of(edges: Iterable[int], size: int) -> list[list[slice]]:
    """For each shard its sequences, in batches of at most `size`."""
    return [
        [slice(start, min(start + size, stop)) for start in range(begin, stop, size)]
        for begin, stop in pairwise(edges)
    ]


def pack_message(packed: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Tensor]:
    """A solved linear as a message: its packed tensors and the notes of its record."""
    return {**packed, **encode_json(notes)}


def unpack_message(message: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a message made by `pack_message` into its tensors and notes."""
    notes = decode_json(message)
    return {name: tensor for name, tensor in message.items() if name != _JSON}, notes


def encode_json(message: Any) -> dict[str, Tensor]:
    """A JSON value as a message."""
    return {_JSON: torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)}


def decode_json(tensors: dict[str, Tensor]) -> Any:
    """The JSON value in a message."""
    return json.loads(tensors[_JSON].numpy().tobytes())


def _flat(stats: Stats) -> dict[str, Tensor]:
    """Statistics as a message."""
    return {
        f"{name}/{key}": tensor
        for name, stat in stats.items()
        for key, tensor in stat.state().items()
    }


def _load(stats: Stats, message: dict[str, Tensor]) -> None:
    """Give statistics the numbers of a message that `_flat` made."""
    for name, stat in stats.items():
        stat.load(below(f"{name}/", message))
