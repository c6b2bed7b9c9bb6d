"""Products of a run are computed in full precision, whatever the host program allows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    """One of torch's global settings, and what it is inside `full_precision`."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    inside: Any

    @classmethod
    def of(cls, owner: Any, name: str, inside: Any) -> Setting:
        return cls(partial(getattr, owner, name), partial(setattr, owner, name), inside)

    def kept(self) -> Any:
        """What it is now; None where torch refuses to say: the host used the newer settings, in a
        way that this older one cannot express.
        """
        try:
            return self.read()
        except RuntimeError:
            return None


def _settings() -> list[Setting]:
    """torch's settings, older ones first, because they change the newer ones too."""
    backends: Any = torch.backends
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    found = [
        Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        Setting.of(cudnn, "allow_tf32", False),
        Setting.of(matmul, "allow_fp16_reduced_precision_reduction", False),
        Setting.of(matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    if hasattr(matmul, "allow_fp16_accumulation"):  # since torch 2.7
        found.append(Setting.of(matmul, "allow_fp16_accumulation", False))
    if hasattr(cudnn, "fp32_precision"):  # since torch 2.9
        newer = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
        found += [Setting.of(owner, "fp32_precision", "ieee") for owner in newer]
    return found


class full_precision(ContextDecorator):
    """Inside, no product uses TF32 or bf16 in place of fp32, and none sums in less than fp32.

    What the host has set (`torch.set_float32_matmul_precision("high")` is common) would otherwise
    decide the bytes of a checkpoint, and spoil Hessians. It is restored at the end.
    """

    def __init__(self) -> None:
        self._kept: list[list[tuple[Setting, Any]]] = []

    def __enter__(self) -> None:
        kept = [(setting, setting.kept()) for setting in _settings()]
        self._kept.append(kept)
        for setting, _ in kept:
            setting.write(setting.inside)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for setting, before in self._kept.pop():
            if before is not None:
                setting.write(before)
