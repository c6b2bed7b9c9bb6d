"""Files are written whole or not at all: a draft, fsync, then a rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .errors import LLQError


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all: draft, fsync, rename."""
    commit_draft(write_draft(tensors, path), path)


def write_draft(tensors: dict[str, Tensor], path: Path) -> Path:
    draft = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensors[name].contiguous() for name in sorted(tensors)},
        draft,
        metadata={"format": "pt"},
    )
    draft.chmod(0o644)
    return draft


def write_json(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    commit_draft(draft, path)


def commit_draft(draft: Path, path: Path) -> None:
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(draft, path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise LLQError(
            f"{path} is missing: {path.parent} is not a Hugging Face checkpoint, or an unfinished one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LLQError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise LLQError(f"{path} should hold a JSON object")
    return content
