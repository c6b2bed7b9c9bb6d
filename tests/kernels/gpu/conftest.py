"""GPU kernels without a GPU."""

from __future__ import annotations

import importlib

import pytest

GLUON = ("uniform_few", "levels_few", "table_few")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few-token kernels run on numpy."""
    pytest.importorskip("triton.experimental.gluon", reason="Triton >= 3.6 is not installed")
    from emulator import Emulated

    for name in GLUON:
        module = importlib.import_module(f"llq_hf.kernels.gpu.{name}")
        monkeypatch.setattr(module, name, Emulated(getattr(module, name)))
