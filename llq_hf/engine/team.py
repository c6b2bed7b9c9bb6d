"""One run shared by several processes (torchrun): each takes its part of the calibration sequences
and of the linears.

The sequences are cut into `shards` runs of consecutive ones. A statistic is summed from zero over
each shard, and the shards' sums are added in their order, whoever made them: so a run of S shards
gives the same bits in one process as in any number that divides S, and may be resumed by another
number. One shard is the plain sum over all sequences, whose last bits are others. (Matrix products
must be the same too: the same kind of processor, as many threads in each.)

Sums go from rank to rank and the last one tells all; a solved linear comes from the rank that
solved it. What is sent is the bytes of a safetensors file.
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
from ..numerics.stats import Stat

PATIENCE = timedelta(days=1)  # a rank may wait for another's longest solve
Stats = dict[str, Stat]


@dataclass(frozen=True)
class Team:
    """The processes of a run. device: where messages must lie. Alone (size 1) it sends nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: torch.device) -> Team:
        """The team of torchrun's processes, or this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), size, str(device) if device.type == "cuda" else "cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def own_shards(self, edges: list[int]) -> list[int]:
        """Of the edges of all shards, those of this process's shards. LLQError where they cannot be
        shared out.
        """
        shards = len(edges) - 1
        if shards % self.size:
            raise LLQError(
                f"shards={shards} cannot be shared by {self.size} processes; give a multiple of that"
            )
        each = shards // self.size
        return edges[self.rank * each : (self.rank + 1) * each + 1]

    def reduced(self, shares: Iterator[Stats]) -> Stats:
        """Statistics of all shards, merged in order; `shares` are this process's."""
        waiting = (
            shares if self.leads else iter(list(shares))
        )  # work first, then wait for the ranks before
        total = next(waiting)
        if not self.leads:
            first, total = total, {name: stat.fresh() for name, stat in total.items()}
            sums = self._receive(self.rank - 1)
            for name, stat in total.items():
                stat.load(_under(name, sums))
                stat.merge(first[name])
        for share in waiting:
            for name, stat in share.items():
                total[name].merge(stat)
        if self.size == 1:
            return total
        if self.rank + 1 < self.size:
            self._send(_flat(total), self.rank + 1)
        sums = self.broadcast(_flat(total), self.size - 1)
        for name, stat in total.items():
            stat.load(_under(name, sums))
        return total

    def broadcast(self, tensors: dict[str, Tensor], source: int) -> dict[str, Tensor]:
        """What `source` gave, on every rank; the others' is not looked at."""
        if self.size == 1:
            return tensors
        content = self._bytes(tensors) if self.rank == source else None
        count = torch.tensor([0 if content is None else len(content)], device=self.device)
        dist.broadcast(count, source)
        if content is None:
            content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, source)
        return load(content.cpu().numpy().tobytes())

    def tell(self, message: Any) -> Any:
        """JSON of the leader's, on every rank."""
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
    """Where each of `shards` runs of consecutive sequences begins, and where the last one ends."""
    if not 1 <= shards <= count:
        raise LLQError(
            f"shards={shards} must be at least 1, and at most the {count} calibration sequences"
        )
    return [count * i // shards for i in range(shards + 1)]


def batches_of(edges: Iterable[int], size: int) -> list[list[slice]]:
    """Per shard: its sequences, at most `size` at a time."""
    return [
        [slice(start, min(start + size, stop)) for start in range(begin, stop, size)]
        for begin, stop in pairwise(edges)
    ]


def pack_message(packed: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Tensor]:
    """A solved linear as a message."""
    return {**packed, **encode_json(notes)}


def unpack_message(message: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse."""
    notes = decode_json(message)
    return {name: tensor for name, tensor in message.items() if name != _SAID}, notes


_SAID = " json"  # no tensor of a method has a space in its name


def encode_json(message: Any) -> dict[str, Tensor]:
    return {_SAID: torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)}


def decode_json(tensors: dict[str, Tensor]) -> Any:
    return json.loads(tensors[_SAID].numpy().tobytes())


def _flat(stats: Stats) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, stat in stats.items()
        for key, tensor in stat.state().items()
    }


def _under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")
    }
