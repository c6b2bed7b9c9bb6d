"""Receivers of progress reports. The classes here ignore them; `terminal` draws them."""

from __future__ import annotations


class PassListener:
    """Receives progress events of single passes. This base class ignores them."""

    def stage(self, text: str, total: int = 0) -> None: ...
    def advance(self, count: int = 1) -> None: ...


class Progress(PassListener):
    """Receives progress events of a whole run. This one ignores them; `terminal.RichProgress` draws
    them.
    """

    def estimates(self, found: dict[str, float]) -> None: ...
    def blocks(self, done: int, total: int) -> None: ...
    def linear(self, name: str) -> None: ...
    def close(self) -> None: ...
