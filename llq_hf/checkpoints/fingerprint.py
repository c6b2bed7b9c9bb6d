"""Hashes that identify a run: everything that decides the bytes of its result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hex digits of everything that decides the bytes of the result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Sentences naming every leaf that differs: "config.bits was 4, is 3"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            d
            for key in keys
            for d in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {_brief(old)}, is {_brief(new)}"]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "...'"
