"""No damaged checkpoint crashes, hangs, or passes for a whole one: 200 cases of `fuzz`.

A crash of a kernel ends the test process. tests/bench/fuzz_checkpoints.py runs thousands of cases,
each in a process that may crash, and with kernels that report every stray read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from contract.fuzz import (
    CHANGED,
    NOT_FINITE,
    REFUSED,
    SIZES,
    VARIANTS,
    Variant,
    is_wrong,
    make_variants,
    run_case,
)

from llq_hf.methods import METHODS

CASES, AT_ONCE = 200, 25


@pytest.fixture(scope="module")
def variants(
    make_checkpoint: Callable[..., Path],
    calibration_npy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Variant]:
    base = make_checkpoint(**SIZES)
    return make_variants(base, calibration_npy, tmp_path_factory.mktemp("fuzz"))


def test_every_method_is_there() -> None:
    assert {name for name, _, _ in VARIANTS} == set(METHODS)


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
@pytest.mark.filterwarnings("ignore")
def test_nothing_crashes_and_nothing_passes_for_another(
    variants: list[Variant], tmp_path: Path, first: int
) -> None:
    transformers.logging.set_verbosity_error()
    found = [run_case(number, variants, tmp_path) for number in range(first, first + AT_ONCE)]
    assert [each for each in found if is_wrong(each)] == []
    # What passes unseen without a look at every tensor is numbers in their ranges, or a config
    # that came without hashes.
    unseen = [each for each in found if each.what in (CHANGED, NOT_FINITE)]
    assert all(
        each.change.startswith(("data", "crafted")) or each.mode == "no hashes" for each in unseen
    ), unseen
    assert any(each.what == REFUSED for each in found)
