"""Safetensors files that are filled in place: one file, or shards of at most 5 GB.

Idea. A method's layout tells shape and dtype of every stored tensor before the first one exists.
So the files are made at the start, with complete headers and room for all data, and every block's
tensors are written to their places when the block is done. No file is written twice, a run needs
no more disk than its result, and no more memory than one tensor.

Files are called model.safetensors, or model-0000k-of-0000N.safetensors with an index, and have the
suffix .part until `finish`. The bytes are those of `safetensors.torch.save_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..common.errors import LLQError
from ..common.files import make_folder, remove, sync_folder, write_json
from ..common.spec import Spec
from .dense import DTYPES, INDEX, SINGLE, header

File = TypeVar("File", str, Path)
PART = ".part"  # suffix of an unfinished file
HASHED_AT_ONCE = 4  # tensors
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Place(NamedTuple):
    """Where a tensor lies: the file, and the first byte in it."""

    file: str
    start: int
    spec: Spec


@dataclass(frozen=True)
class Shards:
    """Files in `folder` for the tensors of `units`, which are kept together where they fit.

    units: names and specs, in the order in which they are written (all that is outside the blocks,
    then block by block).
    """

    folder: Path
    units: Sequence[Mapping[str, Spec]]
    limit_bytes: ClassVar[int] = 5 * 10**9  # of tensors in one file, as on the Hub

    @cached_property
    def files(self) -> dict[str, dict[str, Spec]]:
        """Tensors by the name of their finished file."""
        groups: list[dict[str, Spec]] = [{}]
        size = 0
        for unit in self.units:
            whole = sum(spec.nbytes for spec in unit.values())
            if groups[-1] and size + whole > self.limit_bytes and whole <= self.limit_bytes:
                groups.append({})
                size = 0
            for name, spec in unit.items():
                if groups[-1] and size + spec.nbytes > self.limit_bytes:
                    groups.append({})
                    size = 0
                groups[-1][name] = spec
                size += spec.nbytes
        if len(groups) == 1:
            return {SINGLE: groups[0]}
        total = len(groups)
        return {
            f"model-{number:05d}-of-{total:05d}.safetensors": group
            for number, group in enumerate(groups, start=1)
        }

    @cached_property
    def _heads(self) -> dict[str, bytes]:
        return {file: _head(tensors) for file, tensors in self.files.items()}

    @cached_property
    def _places(self) -> dict[str, _Place]:
        places = {}
        for file, tensors in self.files.items():
            start = len(self._heads[file])
            for name in _ordered(tensors):
                places[name] = _Place(file, start, tensors[name])
                start += tensors[name].nbytes
        return places

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for unit in self.units for spec in unit.values())

    def open(self, reserve: bool = True) -> None:
        """Make the files, or take up those of an interrupted run; strangers among them go.

        reserve: the room for all data, so that a full disk is an OSError now and not in the middle
        of a run.
        """
        make_folder(self.folder)
        for file, tensors in self.files.items():
            path, part = self.folder / file, self.folder / (file + PART)
            if path.is_file():  # of a finished run, some of whose blocks are done again
                os.replace(path, part)
            had_data = part.is_file()
            head = self._heads[file]
            size = len(head) + sum(spec.nbytes for spec in tensors.values())
            if not _begins_with(part, head):
                part.write_bytes(head)
                part.chmod(0o644)
            try:
                _resize(part, size, reserve)
            except OSError:
                if not had_data:
                    part.unlink()
                raise
        known = {file + PART for file in self.files}
        for stranger in self.folder.glob("model*.safetensors*"):
            if stranger.name not in known and stranger.is_file():
                stranger.unlink()
        sync_folder(self.folder)  # a line of the journal must find the files of its tensors

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        """Put tensors into their places, safely on disk on return; sha256 of each by name.

        tensors: names and values. Of a generator, one value at a time is in memory.
        """
        digests = {}
        handles: dict[str, BinaryIO] = {}
        with ExitStack() as stack:
            for name, tensor in tensors:
                file = self._places[name].file
                if file not in handles:
                    part = self.folder / (file + PART)
                    handles[file] = stack.enter_context(part.open("r+b"))
                digests[name] = self._put(handles[file], name, tensor)
            for handle in handles.values():
                handle.flush()
                os.fsync(handle.fileno())
        return digests

    def _put(self, handle: BinaryIO, name: str, tensor: Tensor) -> str:
        place = self._places[name]
        spec = Spec(tuple(tensor.shape), tensor.dtype)
        if spec != place.spec:
            raise AssertionError(f"{name} came out as {spec}, its layout says {place.spec}")
        handle.seek(place.start)
        handle.write(_bytes(tensor))
        return digest_of(tensor)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of tensors that were written."""
        tensors = {}
        for file, wanted in _grouped((name, self._places[name].file) for name in names).items():
            path = self.folder / (file + PART)
            with safe_open(path if path.is_file() else self.folder / file, framework="pt") as found:
                tensors.update({name: found.get_tensor(name).clone() for name in wanted})
        return tensors

    def finish(self) -> None:
        """Give the files their names, and write the index of several."""
        for file in self.files:
            os.replace(self.folder / (file + PART), self.folder / file)
        sync_folder(self.folder)
        if len(self.files) == 1:
            remove(self.folder / INDEX)
            return
        weight_map = {name: place.file for name, place in sorted(self._places.items())}
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)


def gathered(parts: Sequence[Path], folder: Path) -> Shards:
    """One file, or shards, in `folder` of the tensors of several files, which are deleted."""
    shards = Shards(folder, [header(part) for part in parts])
    shards.open(reserve=False)  # parts go as their tensors come: no second copy of all
    for part in parts:
        shards.write(load_file(part).items())
        part.unlink()
    shards.finish()
    return shards


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in `folder`, finished or not."""
    files: dict[str, Path] = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors" + PART)]:
        with suppress(LLQError):  # of a file that cannot be read, every tensor is missing
            files.update(dict.fromkeys(header(file), file))
    return files


def damaged_tensors(files: Mapping[str, Path], digests: Mapping[str, str]) -> list[str]:
    """Names of tensors that are missing or not as they were written.

    files: see `tensor_files`. digests: sha256 by name, as `write` returned them.
    """
    found = tensor_digests({name: file for name, file in files.items() if name in digests})
    return [name for name, digest in digests.items() if found.get(name) != digest]


def tensor_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of each tensor by name, but of none that cannot be read.

    files: see `tensor_files`. Several are hashed at once: a file is read faster than it is hashed.
    """
    digests: dict[str, str] = {}
    for file, names in _grouped(files.items()).items():
        with (
            suppress(SafetensorError, OSError),
            safe_open(file, framework="pt") as found,
            ThreadPoolExecutor(HASHED_AT_ONCE) as pool,
        ):
            there = set(found.keys())
            held = [name for name in names if name in there]
            each = pool.map(lambda name, found=found: digest_of(found.get_tensor(name)), held)
            digests.update(zip(held, each, strict=True))
    return digests


def digest_of(tensor: Tensor) -> str:
    """sha256 of a tensor's shape, dtype and bytes, 64 hex digits."""
    digest = hashlib.sha256(f"{list(tensor.shape)} {_NAMES.get(tensor.dtype)}\n".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _grouped(pairs: Iterable[tuple[str, File]]) -> dict[File, list[str]]:
    """Names by their file, so that each file is opened once."""
    groups: dict[File, list[str]] = {}
    for name, file in pairs:
        groups.setdefault(file, []).append(name)
    return groups


def _ordered(tensors: Mapping[str, Spec]) -> list[str]:
    """The order of save_file: by dtype, larger elements first, which aligns all, then by name."""
    rank = {dtype: place for place, dtype in enumerate(DTYPES.values())}
    return sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))


def _head(tensors: Mapping[str, Spec]) -> bytes:
    """The first bytes of a safetensors file: length, JSON, padding to a multiple of 8."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _ordered(tensors):
        spec = tensors[name]
        start, end = end, end + spec.nbytes
        content[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _begins_with(path: Path, head: bytes) -> bool:
    """Whether the file is there with this header."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return handle.read(len(head)) == head


def _resize(path: Path, size: int, reserve: bool) -> None:
    """Give the file its length; what is new in it is zero."""
    with path.open("r+b") as handle:
        handle.truncate(size)
        if reserve and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)


def names_by_block(names: Iterable[str], prefixes: Sequence[str]) -> Iterator[list[str]]:
    """Sorted tensor names outside all blocks, then those of each block."""
    known = sorted(names)
    inside = tuple(prefix + "." for prefix in prefixes)
    yield [name for name in known if not name.startswith(inside)]
    for prefix in inside:
        yield [name for name in known if name.startswith(prefix)]
