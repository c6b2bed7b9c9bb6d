"""The compiled libraries of every instruction set that tests of CPU kernels use."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from llq_hf.kernels import build as building
from llq_hf.kernels import native
from llq_hf.numerics.rotations import rotation

ISAS = ["avx512vbmi2", "avx512", "avx2"]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compiled libraries by instruction set: those of this checkout, or built now."""
    found = {isa: building.library(building.PACKAGED, isa) for isa in building.ISAS}
    if all(path.is_file() for path in found.values()):
        return found
    if building.compiler() is None:
        pytest.skip("no C++ compiler here: torch's operations serve, which the other tests look at")
    folder = tmp_path_factory.mktemp("kernels")
    building.build(folder)
    return {isa: building.library(folder, isa) for isa in building.ISAS}


@pytest.fixture(params=ISAS)
def isa(
    request: pytest.FixtureRequest, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> str:
    """One test for each instruction set of this processor, with its library in use."""
    name: str = request.param
    if name not in native.supported():
        pytest.skip(f"this processor has no {name}")
    found = native.Backend(name, libraries[name], ctypes.CDLL(str(libraries[name])))
    monkeypatch.setattr(native, "backend", lambda: found)
    rotation.cache_clear()  # rotations remember which kernel was chosen for them
    return name
