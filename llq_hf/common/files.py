"""Write files whole or not at all (draft, fsync, rename), and read JSON with clear errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .errors import LLQError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write a draft to; the draft takes the place of `path` when the block ends.

    If the block raises, `path` stays what it was, and the draft stays for a look at it.
    """
    draft = path.with_name(path.name + ".tmp")
    yield draft
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(draft, path)


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
