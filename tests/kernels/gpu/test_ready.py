"""Whether GPU kernels may serve, and what people are told."""

from __future__ import annotations

import sys

import pytest
import torch

from llq_hf.common.errors import LLQError
from llq_hf.kernels import TokenGrid
from llq_hf.kernels.gpu import ready, rows


@pytest.fixture(autouse=True)
def _anew() -> None:
    for cached in (ready.problem, ready.triton_version, ready._say_once):
        cached.cache_clear()


def test_a_wrong_choice_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLQ_GPU", "fast")
    with pytest.raises(LLQError, match="LLQ_GPU=fast is not one of all, dense, none"):
        ready.dense()


def test_without_a_gpu_nothing_is_said(recwarn: pytest.WarningsRecorder):
    assert torch.cuda.is_available() or not ready.dense()
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    ("capability", "triton", "said", "decodes", "multiplies"),
    [
        ((7, 5), "3.7.1", "compute capability 7.5 is older than 8.0", False, False),
        ((8, 0), None, "Triton is not installed", False, False),
        ((8, 6), "3.5.1", "Triton 3.5 is older than 3.6", True, False),
        ((9, 0), "3.6.0", None, True, True),
    ],
)
def test_what_is_missing_is_named_once(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: str | None,
    said: str | None,
    decodes: bool,
    multiplies: bool,
):
    monkeypatch.delenv("LLQ_GPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    version = None if triton is None else tuple(map(int, triton.split(".")[:2]))
    monkeypatch.setattr(ready, "triton_version", lambda: version)
    with pytest.warns() if said else _silence() as told:
        assert ready.dense() is decodes
        assert ready.few() is multiplies
        assert ready.few() is multiplies
    if said:
        assert len(told) == 1
        assert said in str(told[0].message)


class _silence:
    def __enter__(self) -> list[object]:
        return []

    def __exit__(self, *rest: object) -> None: ...


def test_dense_kernels_can_be_had_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ready, "problem", lambda: None)
    for choice, expected in (
        ("all", (True, True)),
        ("dense", (True, False)),
        ("none", (False,) * 2),
    ):
        monkeypatch.setenv("LLQ_GPU", choice)
        monkeypatch.setattr(ready, "triton_version", lambda: (3, 7))
        assert (ready.dense(), ready.few()) == expected


def test_kernels_are_launched_where_their_tensors_lie(monkeypatch: pytest.MonkeyPatch):
    entered = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *rest: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.empty(3, device="meta")
    for several in (False, True):
        monkeypatch.setattr(ready, "several", lambda several=several: several)
        with ready.device_of(x):
            pass
    assert entered == [x.device]
    anything = (TokenGrid, range(1, 2), (torch.float32,), lambda: True, lambda view: True)
    assert rows._row(*anything, lambda x: x).kernel(x) is x
    assert len(entered) == 2


def test_the_package_does_not_import_triton():
    import subprocess

    code = "import llq_hf.kernels, sys; raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
