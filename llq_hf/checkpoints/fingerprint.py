"""Hashes that identify a run by everything that decides the bytes of its result."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(identity: dict[str, Any]) -> str:
    """The first 16 hex digits of the sha256 of `identity` as JSON with sorted keys."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A phrase for every value that differs: "config.bits was 4, is 3".

    name: where `old` and `new` stand in the whole.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            phrase
            for key in keys
            for phrase in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {_brief(old)}, is {_brief(new)}"]


def _brief(value: Any) -> str:
    """The value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "...'"
