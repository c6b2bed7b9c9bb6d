"""Checks of options that several methods have, so that errors read alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..common.errors import LLQError
from ..method import Method


def check_range(method: Method, option: str, low: float, high: float, what: str = "") -> None:
    """LLQError unless low <= value <= high. what: the end of the sentence, ", a share of ..."."""
    value = _value(method, option)
    if not low <= value <= high:
        raise LLQError(f"{option}={value} must lie in {low}..{high}{what}")


def check_damp(method: Method) -> None:
    """LLQError unless `damp` is a share of the Hessian's mean diagonal."""
    check_range(method, "damp", 0, 1, ", a share of the Hessian's mean diagonal")


def check_aim(method: Method) -> None:
    """LLQError unless `aim` is a share."""
    check_range(method, "aim", 0, 1, ", the share of the way to the full-precision model's outputs")


def check_gptaq(method: Method) -> None:
    """LLQError unless `gptaq` and `aim` are shares, of which one at most is used."""
    check_range(method, "gptaq", 0, 1, ", the share of GPTAQ's correction")
    check_aim(method)
    if _value(method, "gptaq") and _value(method, "aim"):
        raise LLQError("gptaq and aim are two ways to the same outputs; give one of them")


def check_refine(method: Method) -> None:
    """LLQError unless `refine` is a sensible number of rounds."""
    check_range(method, "refine", 0, 100, " rounds")


def check_least(method: Method, least: float, *options: str) -> None:
    """LLQError unless each of the options is a finite number of at least `least`."""
    for option in options:
        value = _value(method, option)
        if not least <= value < math.inf:
            raise LLQError(f"{option}={value} must be a number of at least {least}")


def check_positive(method: Method, *options: str) -> None:
    """LLQError unless each of the options is a finite number above zero."""
    for option in options:
        value = _value(method, option)
        if not 0 < value < math.inf:
            raise LLQError(f"{option}={value} must be positive")


def check_choice(method: Method, option: str, choices: Sequence[str]) -> None:
    """LLQError unless the option is one of `choices`."""
    value = _value(method, option)
    if value not in choices:
        raise LLQError(f"{option}={value!r} must be one of {', '.join(choices)}")


def _value(method: Method, option: str) -> Any:
    return getattr(method, option)
