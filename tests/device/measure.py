"""Prints the table of `ceilings.py` anew, with what is measured here and now.

    PYTHONPATH=.:tests python tests/device/measure.py [method ...]

A ceiling is the measured number and 10 % more, or less where one launch more must be noticed: a
column gets about half a launch, and a token that is decoded none.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TypeVar

from device import checks
from device.ceilings import DECODERS, SOLVERS, Decoder, Solver

Row = TypeVar("Row", Solver, Decoder)


def ceiling(name: str, measured: float) -> float:
    """What `measured` may grow to without a test that fails."""
    if name == "column":
        measured = max(measured, 0)
        more = min(0.1 * measured, 0.5 + 0.01 * measured)
        return math.ceil((measured + max(0.1, more)) * 100) / 100
    if name == "launches":
        return int(measured)
    if name == "moved":
        return math.ceil(measured * 110) / 100
    return math.floor(measured * 1.1)


def with_ceilings(row: Row, measured: dict[str, float]) -> Row:
    """The row with the ceilings that belong to what was measured."""
    return replace(row, **{name: ceiling(name, value) for name, value in measured.items()})


def text(row: Solver | Decoder, measured: dict[str, float]) -> str:
    """The row with new ceilings, as it stands in the table."""
    row = with_ceilings(row, measured)
    words = [f'"{row.method}"', f"{row.bits:g}", *(f"{getattr(row, name):g}" for name in measured)]
    if row.preset != "study":
        words.append(f'preset="{row.preset}"')
    if row.kernels:
        words.append("kernels=True")
    start = f"    {type(row).__name__}({', '.join(words)}"
    if not row.options:
        return f"{start}),"
    options = f"options={row.options}),".replace("'", '"')
    parted = f"{start},\n        {options}"
    return parted if len(start) + len(options) + 2 > 100 else f"{start}, {options}"


def found(measured: dict[str, float]) -> str:
    """What was measured, as a comment below the row."""
    return "    # " + ", ".join(f"{name} {value:.5g}" for name, value in measured.items())


def main(names: list[str]) -> None:
    for row in (*SOLVERS, *DECODERS):
        if names and row.method not in names:
            continue
        try:
            if isinstance(row, Solver):
                measured = checks.solver_costs(row)[0]
            else:
                measured = checks.decoder_costs(checks.decoding(row)[0])
        except RuntimeError as error:
            print(f"    # {row} fails: {error}", flush=True)
        else:
            print(text(row, measured), found(measured), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
