"""Dictionaries whose keys have prefixes, such as tensors by their full names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def below(prefix: str, items: Mapping[str, Value]) -> dict[str, Value]:
    """The items whose keys begin with `prefix`, by the rest of their keys.

    The prefix includes its separator: below("mlp.", {"mlp.up": 1}) is {"up": 1}.
    """
    return {
        key.removeprefix(prefix): value for key, value in items.items() if key.startswith(prefix)
    }
