"""The run journal beside an output folder: what was asked for, which blocks are done, how each
linear went.

`OUT.journal.jsonl` lies beside OUT, not in it: it records seconds and bytes of memory, and every
file *in* OUT is the same whether a run was unbroken or killed and resumed. First line: the run's
fingerprint and what went into it. Then one line per finished block, written only after the block's
file is safely on disk; a torn last line is ignored.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import LLQError
from ..method import State
from .fingerprint import differences, fingerprint, sha256_file


@dataclass
class Journal:
    """`blocks`: block index -> its line ({"block", "file", "sha256", "linears", "seconds",
    "peak_bytes"}).
    """

    path: Path
    identity: dict[str, Any]
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def beside(out: Path) -> Path:
        return out.with_name(out.name + ".journal.jsonl")

    @classmethod
    def open(cls, out: Path, identity: dict[str, Any]) -> Journal:
        """Start a journal, or take up the one of an interrupted run. LLQError if OUT belongs to
        something else.
        """
        path = cls.beside(out)
        occupied = out.is_dir() and any(out.iterdir())
        if out.exists() and not out.is_dir():
            raise LLQError(f"{out} is a file; give a folder that does not exist yet")
        if not path.is_file():
            if occupied:
                raise LLQError(
                    f"{out} is not empty and no journal of an interrupted run lies beside it; give another folder"
                )
            journal = cls(path, identity)
            out.mkdir(parents=True, exist_ok=True)
            journal._append(
                {"fingerprint": fingerprint(identity), "identity": identity}, create=True
            )
            return journal
        lines = cls.read(path)
        if not lines:  # killed before the first line was whole
            path.unlink()
            return cls.open(out, identity)
        differing = differences(lines[0]["identity"], identity)
        if differing:
            raise LLQError(
                f"{out} was begun with other inputs: {'; '.join(differing)}. "
                f"Give another folder, or delete {out} and {path.name} to start anew"
            )
        out.mkdir(parents=True, exist_ok=True)
        journal = cls(path, identity)
        for line in lines[1:]:
            if not _as_written(out, line):  # this block and all later ones are done again
                if any(done.get("tuned") for done in journal.blocks.values()):
                    # no: all; a block must see its predecessors as they were before tuning
                    journal.blocks.clear()
                break
            journal.blocks[line["block"]] = line
        journal._rewrite()
        return journal

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The whole lines of a journal file; [] where there is none."""
        lines: list[dict[str, Any]] = []
        for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    @classmethod
    def damaged(cls, out: Path) -> list[str]:
        """Names of block files in a finished folder that are not as they were written; [] also
        without a journal.
        """
        blocks = cls.read(cls.beside(out))[1:]
        return [line["file"] for line in blocks if not _as_written(out, line)]

    def finish_block(self, line: dict[str, Any]) -> None:
        self.blocks[line["block"]] = line
        self._append(line)

    def tuned_block(self, line: dict[str, Any]) -> None:
        """Replace the line of a finished block whose file is about to be replaced by its tuned one."""
        self.blocks[line["block"]] = line
        self._rewrite()

    def linears(self) -> list[dict[str, Any]]:
        """Records of all finished linears in order, without what differs from run to run (seconds)."""
        records = [
            record for index in sorted(self.blocks) for record in self.blocks[index]["linears"]
        ]
        return [
            {key: value for key, value in record.items() if key != "seconds"} for record in records
        ]

    def _append(self, line: dict[str, Any], create: bool = False) -> None:
        with self.path.open("w" if create else "a") as handle:
            handle.write(json.dumps(line, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _rewrite(self) -> None:
        """The file anew, atomically: without a torn last line, without lines of blocks whose files
        are gone.
        """
        head = {"fingerprint": fingerprint(self.identity), "identity": self.identity}
        draft = self.path.with_name(self.path.name + ".tmp")
        lines = [head, *(self.blocks[index] for index in sorted(self.blocks))]
        draft.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
        os.replace(draft, self.path)


class FileState(State):
    """Progress of a long training inside one block (or of the model), in OUT.training.safetensors
    beside OUT.
    """

    def __init__(self, out: Path, run: str, block: int | str, kind: str = "training") -> None:
        self.path, self.key = self._beside(out, kind), f"{run}:{block}"

    def load(self) -> dict[str, Tensor] | None:
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return None  # of another block, or of another run
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None

    def save(self, tensors: dict[str, Tensor]) -> None:
        draft = self.path.with_name(self.path.name + ".tmp")
        save_file(
            {name: t.contiguous() for name, t in tensors.items()}, draft, metadata={"key": self.key}
        )
        os.replace(draft, self.path)

    @classmethod
    def clear(cls, out: Path, kind: str = "training") -> None:
        cls._beside(out, kind).unlink(missing_ok=True)

    @staticmethod
    def _beside(out: Path, kind: str = "training") -> Path:
        return out.with_name(f"{out.name}.{kind}.safetensors")


def _as_written(out: Path, line: dict[str, Any]) -> bool:
    file = out / str(line["file"])
    # A line of a tuned block is written before its file: until then the untuned one is as good.
    return file.is_file() and sha256_file(file) in (line["sha256"], line.get("untuned_sha256"))
