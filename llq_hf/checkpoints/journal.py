"""The run journal beside an output folder: what was asked for, and which blocks are done.

`OUT.journal.jsonl` lies beside OUT, not in it: it records seconds and bytes of memory, and every
file *in* OUT is the same whether a run was unbroken or killed and resumed. The first line holds
the run's fingerprint and what went into it. Then follows one line per finished block, written only
after the block's tensors are safely on disk; a torn last line is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import LLQError
from ..common.files import (
    append,
    make_folder,
    remove,
    remove_draft,
    remove_drafts,
    save_tensors,
    sha256_file,
    write_text,
)
from ..method import State
from .fingerprint import differences, fingerprint
from .records import BlockLine, LinearRecord
from .shards import damaged_tensors, tensor_files


@dataclass
class Journal:
    """`blocks`: block index -> its line. Lines of an interrupted run are trusted after `verify`."""

    path: Path
    identity: dict[str, Any]
    blocks: dict[int, BlockLine] = field(default_factory=dict)

    @staticmethod
    def beside(out: Path) -> Path:
        return out.with_name(out.name + ".journal.jsonl")

    @classmethod
    def open(cls, out: Path, identity: dict[str, Any]) -> Journal:
        """Start a journal, or take up the one of an interrupted run.

        LLQError if OUT belongs to something else.
        """
        path = cls.beside(out)
        occupied = out.is_dir() and any(out.iterdir())
        if out.exists() and not out.is_dir():
            raise LLQError(f"{out} is a file; give a folder that does not exist yet")
        if not path.is_file():
            if occupied:
                raise LLQError(
                    f"{out} is not empty and no journal of an interrupted run lies beside it; "
                    "give another folder"
                )
            journal = cls(path, identity)
            make_folder(out)
            journal._append(journal._head())
            return journal
        lines = cls.read(path)
        if not lines:  # killed before the first line was whole
            remove(path)
            return cls.open(out, identity)
        differing = differences(lines[0]["identity"], identity)
        if differing:
            raise LLQError(
                f"{out} was begun with other inputs: {'; '.join(differing)}. "
                f"Give another folder, or delete {out} and {path.name} to start anew"
            )
        make_folder(out)
        # Lines of older versions name a file per block: those blocks are done again.
        whole: Any = {line["block"]: line for line in lines[1:] if "tensors" in line}
        return cls(path, identity, whole)

    def verify(self, out: Path, rewritten: Collection[str] = ()) -> None:
        """Forget blocks that are not as they were written, and all later ones.

        rewritten: names of tensors that are about to be written anew, whatever they hold now.
        """
        files = tensor_files(out)
        intact: dict[int, BlockLine] = {}
        for index in sorted(self.blocks):
            line = self.blocks[index]
            asked = {n: sha for n, sha in line["tensors"].items() if n not in rewritten}
            if damaged_tensors(files, asked):
                break
            intact[index] = line
        # After tuning, all: a block must see its predecessors as they were before it.
        tuned = [bool(line.get("tuned")) for line in self.blocks.values()]
        torn = len(intact) < len(self.blocks) or not (all(tuned) or rewritten)
        self.blocks = {} if any(tuned) and torn else intact
        self._rewrite()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The whole lines of a journal file; [] where there is none."""
        lines: list[dict[str, Any]] = []
        for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines

    @classmethod
    def damaged(cls, out: Path) -> list[str]:
        """Tensors of a finished folder that are not as they were written; [] without a journal.

        Journals of older versions name files, of which each holds one block.
        """
        damaged: list[str] = []
        files = tensor_files(out)
        for line in cls.read(cls.beside(out))[1:]:
            if "tensors" in line:
                damaged += damaged_tensors(files, line["tensors"])
            elif not _is_intact(out / str(line["file"]), line["sha256"]):
                damaged.append(line["file"])
        return damaged

    @classmethod
    def names_tensors(cls, out: Path) -> bool:
        """Whether a journal lies beside the folder whose lines hold hashes of tensors."""
        return any("tensors" in line for line in cls.read(cls.beside(out))[1:])

    def finish_block(self, line: BlockLine) -> None:
        self._append(line)
        self.blocks[line["block"]] = line

    def replace_block(self, line: BlockLine) -> None:
        """Replace the line of a finished block, some of whose tensors are about to be rewritten."""
        self.blocks[line["block"]] = line
        self._rewrite()

    def linears(self) -> list[LinearRecord]:
        """Records of all finished linears in order, without what differs from run to run."""
        records = [
            record for index in sorted(self.blocks) for record in self.blocks[index]["linears"]
        ]
        same: Any = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        found: list[LinearRecord] = same
        return found

    def _head(self) -> dict[str, Any]:
        return {"fingerprint": fingerprint(self.identity), "identity": self.identity}

    @property
    def is_tuned(self) -> bool:
        """Whether every finished block was tuned."""
        return bool(self.blocks) and all(line.get("tuned") for line in self.blocks.values())

    def _append(self, line: Any) -> None:
        append(self.path, json.dumps(line, sort_keys=True) + "\n")

    def _rewrite(self) -> None:
        """The file anew, atomically: without a torn last line and without forgotten blocks."""
        lines = [self._head(), *(self.blocks[index] for index in sorted(self.blocks))]
        write_text(self.path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


KINDS = ("training", "tuned", "learned")  # of states beside a folder


class FileState(State):
    """Progress of a long training inside one block (or of the model), in OUT.training.safetensors
    beside OUT.
    """

    def __init__(self, out: Path, run: str, block: int | str, kind: str = "training") -> None:
        self.path, self.key = self.beside(out, kind), f"{run}:{block}"

    def load(self) -> dict[str, Tensor] | None:
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return None  # of another block, or of another run
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, self.path, metadata={"key": self.key})

    @classmethod
    def clear(cls, out: Path, kind: str = "training") -> None:
        remove(cls.beside(out, kind))

    @staticmethod
    def beside(out: Path, kind: str = "training") -> Path:
        return out.with_name(f"{out.name}.{kind}.safetensors")


def clean(out: Path) -> None:
    """Delete what a finished run needs no more: the states of its training, and drafts of a run
    that was killed.
    """
    for kind in KINDS:
        FileState.clear(out, kind)
    clean_drafts(out)


def clean_drafts(out: Path) -> None:
    """Delete drafts of files in and beside the folder that a killed run left."""
    remove_drafts(out)
    for path in (Journal.beside(out), *(FileState.beside(out, kind) for kind in KINDS)):
        remove_draft(path)


def _is_intact(file: Path, sha256: str) -> bool:
    return file.is_file() and sha256_file(file) == sha256
