"""Write files whole or not at all, and read JSON with clear errors.

All writers of the package go through here. What they return from is on the disk, even if the power
fails in the next moment: the content is synced before the file gets its name, and the folder that
holds the name after that. A draft lies in a folder of its own, NAME.tmp beside the file, together
with whatever a library leaves there. That folder is gone before the file gets its name: whoever
finds the file finds nothing beside it. A killed writer leaves a draft, the next one deletes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from .errors import LLQError

DRAFTS = ".tmp"  # suffix of the folder of a draft
READY = ".ready" + DRAFTS  # of a draft that is whole
# What file systems answer that cannot sync a folder.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write a draft to; the draft takes the place of `path` when the block ends.

    If the block raises, `path` stays what it was.
    """
    remove_draft(path)
    folder = _drafts(path)
    folder.mkdir()
    try:
        draft = folder / path.name
        yield draft
        sync(draft)
        os.replace(draft, _ready(path))
        shutil.rmtree(folder)
        rename(_ready(path), path)
    finally:
        remove_draft(path)


def remove_draft(path: Path) -> None:
    """Delete what a killed writer of this file left."""
    for draft in (_drafts(path), _ready(path)):
        _remove_any(draft)


def remove_drafts(folder: Path) -> None:
    """Delete what killed writers of files in this folder, and in those inside it, left."""
    for draft in list(folder.rglob("*" + DRAFTS)):
        if draft.is_dir() or draft.name.endswith(READY):
            _remove_any(draft)


def _remove_any(draft: Path) -> None:
    if draft.is_file():
        draft.unlink()
    shutil.rmtree(draft, ignore_errors=True)


def _drafts(path: Path) -> Path:
    return path.with_name(path.name + DRAFTS)


def _ready(path: Path) -> Path:
    return path.with_name(path.name + READY)


def rename(old: Path, new: Path) -> None:
    """Give a file whose content is synced, or a folder, another name in the same file system."""
    if old.is_dir():
        sync_all(old)
    os.replace(old, new)
    sync_folder(new.parent)


def remove(path: Path) -> None:
    """Delete a file, if it is there, and what a killed writer of it left."""
    remove_draft(path)
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def copy(source: Path, target: Path) -> None:
    """Copy the content of a file."""
    with replaced(target) as draft:
        shutil.copyfile(source, draft)


def append(path: Path, text: str) -> None:
    """Write behind the end of a file, which is made if there is none. A kill may tear the text."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    if is_new:
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, if they are not there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; nothing where the system cannot do that."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Wait until all files in a folder, and in those inside it, are on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync(path)
    sync_folder(folder)


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, which is deleted in the end.

    timeout: seconds; -1 waits as long as it takes. Timeout (of `filelock`) where another process
    holds it longer. Whoever waits opens the file anew at each try, and lets go of one that was
    deleted meanwhile.
    """
    with FileLock(path, timeout=timeout):
        try:
            yield
        finally:
            with suppress(OSError):  # on Windows, where an open file cannot be deleted
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object whole or not at all, with sorted keys, so that equal content gives equal
    bytes.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all. metadata: default {"format": "pt"}."""
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    with replaced(path) as draft:
        save_file(ordered, draft, metadata=metadata or {"format": "pt"})
        draft.chmod(0o644)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; LLQError where it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LLQError(
            f"{path} is missing: {path.parent} is not a Hugging Face checkpoint, or an unfinished"
            " one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LLQError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise LLQError(f"{path} should hold a JSON object")
    return content


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
