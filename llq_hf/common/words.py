"""Pieces of error messages: lists of words, near misses, the first line of an exception."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the known word that is most like `word`, or nothing."""
    match = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_line(error: Exception) -> str:
    """First line of an exception's message; errors of other libraries often span many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def either(words: Sequence[str]) -> str:
    """The words as "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def listed(names: Any) -> str:
    """The names, joined by commas; "none" where there are none."""
    return ", ".join(str(name) for name in names) or "none"
