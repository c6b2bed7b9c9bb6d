"""A disk whose power fails: what lies on it after a cut at any moment of a program.

`Disk` watches a folder while a program writes there, and keeps what is safe. The content of a file
is safe once it is synced, and a name (of a file that was made, renamed or deleted) once its folder
is. Everything else may be on the disk or not after a cut, in any order: names before data, data
before names, some names and not others, half of a file. `Cut.leave` makes one of these disks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

BLOCK = 512  # bytes that are written together
Node = int  # number of an inode; none is used twice, because all are held open
Names = dict[Node, dict[str, Node]]  # of every folder
# What is lost: everything that is not safe; data only; names only; nothing (as after a kill); or
# some names and some blocks of data.
MODES = ("all", "data", "names", "nothing", "some")


@dataclass(frozen=True)
class Change:
    """A name that is not safe yet: it appears as `node`, or goes. A renaming has two, which happen
    together.
    """

    parts: tuple[tuple[Node, str, Node | None], ...]  # folder, name, what it is now

    def apply(self, names: Names) -> None:
        for folder, name, node in self.parts:
            entries = names.setdefault(folder, {})
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node


@dataclass(frozen=True)
class Cut:
    """A moment. safe, synced: names and contents that are safe. pending: changes of names, in their
    order. current: all contents; None for a folder.
    """

    root: Node
    safe: Names
    pending: list[Change]
    synced: dict[Node, bytes]
    current: dict[Node, bytes | None]

    def leave(self, target: Path, mode: str, draw: random.Random) -> None:
        """Write what a power cut leaves to the folder `target`."""
        names = {folder: dict(entries) for folder, entries in self.safe.items()}
        for change in self.pending:
            if mode in ("data", "nothing") or (mode == "some" and draw.random() < 0.5):
                change.apply(names)
        self._write(self.root, target, names, mode, draw)

    def _write(
        self, node: Node, target: Path, names: Names, mode: str, draw: random.Random
    ) -> None:
        if self.current[node] is None:
            target.mkdir()
            for name, inner in names.get(node, {}).items():
                self._write(inner, target / name, names, mode, draw)
        else:
            target.write_bytes(self._content(node, mode, draw))

    def _content(self, node: Node, mode: str, draw: random.Random) -> bytes:
        synced, current = self.synced.get(node, b""), self.current[node] or b""
        if mode in ("names", "nothing"):
            return current
        if mode == "some" and synced != current:
            old = synced.ljust(len(current), b"\0")
            blocks = range(0, len(current), BLOCK)
            return b"".join(draw.choice((old, current))[i : i + BLOCK] for i in blocks)
        return synced


@dataclass
class Disk:
    """Watches the folder `root`, see above. cuts: a moment before each operation."""

    root: Path
    cuts: list[Cut] = field(default_factory=list)
    _safe: Names = field(default_factory=dict)
    _pending: list[Change] = field(default_factory=list)
    _synced: dict[Node, bytes] = field(default_factory=dict)
    _current: dict[Node, bytes | None] = field(default_factory=dict)  # also of what is deleted
    _held: dict[Node, int] = field(default_factory=dict)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is there at first is safe."""
        self._safe = self._look()
        self._synced = {node: text for node, text in self._current.items() if text is not None}
        with mock.patch.multiple(
            os,
            fsync=self._fsync,
            replace=self._before(os.replace, self._rename),
            rename=self._before(os.rename, self._rename),
            unlink=self._before(os.unlink),
            mkdir=self._before(os.mkdir),
            rmdir=self._before(os.rmdir),
        ):
            yield
        self._cut()
        for handle in self._held.values():
            os.close(handle)

    def _before(self, call: Callable[..., Any], note: Any = None) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            self._cut()
            if note is not None:
                note(*args)
            return call(*args, **kwargs)

        return replacement

    def _fsync(self, handle: int) -> None:
        self._cut()
        node = os.fstat(handle).st_ino
        content = self._current.get(node)
        if content is not None:
            self._synced[node] = content
        else:
            safe = [c for c in self._pending if any(folder == node for folder, _, _ in c.parts)]
            for change in safe:
                change.apply(self._safe)
                self._pending.remove(change)

    def _rename(self, old: Any, new: Any) -> None:
        old, new = Path(old), Path(new)
        if new.is_relative_to(self.root):
            node = old.stat().st_ino
            parts = ((old.parent.stat().st_ino, old.name, None),)
            parts += ((new.parent.stat().st_ino, new.name, node),)
            self._pending.append(Change(parts))

    def _cut(self) -> None:
        names = self._look()
        self._note(names)
        safe = {folder: dict(entries) for folder, entries in self._safe.items()}
        self.cuts.append(
            Cut(
                self.root.stat().st_ino,
                safe,
                list(self._pending),
                dict(self._synced),
                dict(self._current),
            )
        )

    def _note(self, names: Names) -> None:
        """Files that were made or deleted since the last look, by whomever."""
        view = {folder: dict(entries) for folder, entries in self._safe.items()}
        for change in self._pending:
            change.apply(view)
        for folder, entries in names.items():
            before = view.get(folder, {})
            for name in before.keys() | entries.keys():
                if before.get(name) != entries.get(name):
                    self._pending.append(Change(((folder, name, entries.get(name)),)))

    def _look(self) -> Names:
        """Names in every folder, as a program sees them; notes the contents of all files."""
        names: Names = {}
        for folder, _, files in os.walk(self.root):
            node = self._hold(Path(folder))
            self._current[node] = None
            names[node] = {each.name: self._hold(Path(each.path)) for each in os.scandir(folder)}
            for file in files:
                path = Path(folder, file)
                self._current[path.stat().st_ino] = path.read_bytes()
        return names

    def _hold(self, path: Path) -> Node:
        node = path.stat().st_ino
        if node not in self._held:
            self._held[node] = os.open(path, os.O_RDONLY)
        return node
