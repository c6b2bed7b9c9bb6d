"""What is computed once for a linear, and kept as long as its stored tensors are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor

Made = TypeVar("Made")


class CachedTensors(dict[str, Tensor]):
    """The stored tensors of a linear by name, with everything that `once` has computed from
    them.
    """

    def __init__(self, packed: Mapping[str, Tensor]) -> None:
        super().__init__(packed)
        self.computed: dict[str, Any] = {}


class _CacheEntry(NamedTuple):
    """CachedTensors, and what must be unchanged for them to be reused: the tensors themselves and
    `state`, the address and the version counter of each.
    """

    first: ReferenceType[Tensor]
    others: list[Tensor]
    state: list[tuple[int, int]]
    tensors: CachedTensors


# By the id of a linear's first tensor; an entry is removed when that tensor is freed.
_CACHE: dict[int, _CacheEntry] = {}


def cached_tensors(names: Iterable[str], tensors: Sequence[Tensor]) -> CachedTensors:
    """The CachedTensors of a linear: the same object until a tensor is replaced, moved or written.

    The key is the tensors alone. An operator in a torch.compile graph receives nothing else, and
    finds the same object by them.
    """
    first, *others = tensors
    if any(map(Tensor.is_inference, tensors)):  # such tensors have no version counter
        return CachedTensors(dict(zip(names, tensors, strict=True)))
    state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    key = id(first)
    entry = _CACHE.get(key)
    if (
        entry is not None
        and entry.first() is first
        and entry.state == state
        and all(map(is_, entry.others, others))
    ):
        return entry.tensors
    found = CachedTensors(dict(zip(names, (tensor.data for tensor in tensors), strict=True)))
    # `ref` calls this with the dead reference, which `pop` takes as its default.
    ending = partial(_CACHE.pop, key)
    _CACHE[key] = _CacheEntry(ref(first, ending), others, state, found)
    return found


def once(packed: dict[str, Tensor], make: Callable[[], Made], name: str = "stored") -> Made:
    """The result of `make`: computed once for CachedTensors, at each call for a plain dict.

    Values that Python reads from a tensor belong in here too: on a GPU each such read waits for the
    device, and a CUDA graph may not contain one.
    """
    if not isinstance(packed, CachedTensors):
        return make()
    if name not in packed.computed:
        packed.computed[name] = make()
    made: Made = packed.computed[name]
    return made
