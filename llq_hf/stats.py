"""What calibration gathers about the input of a linear, and the factorization that solvers make of it.

Legend: T tokens, I in_features, H_II = (2 / sequences) * sum over tokens of x x^T (IST-DASLab/gptq `add_batch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .errors import LLQError


class Stat(ABC):
    """A statistic of the inputs of one linear (or of several that share their input)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features, self.device = in_features, device

    @abstractmethod
    def update(self, x_TI: Tensor, sequences: int) -> None:
        """Take in the tokens of `sequences` calibration sequences."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise LLQError, naming the linear, where the statistic cannot be used (nothing seen, not finite)."""


class Hessian(Stat):
    """Second moments of the inputs: the Hessian of the layer's squared output error, up to a constant."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.sum_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.sequences = 0

    def update(self, x_TI: Tensor, sequences: int) -> None:
        x_TI = x_TI.float()  # before squaring: LLaMA-3's massive activations overflow fp16 and blunt bf16
        self.sum_II.addmm_(x_TI.T, x_TI)
        self.sequences += sequences

    @property
    def H_II(self) -> Tensor:
        """A fresh copy, fp32: solvers change it in place."""
        return self.sum_II * (2.0 / self.sequences)

    def check(self, name: str) -> None:
        if self.sequences == 0:
            raise LLQError(f"{name} saw no calibration data")
        if not torch.isfinite(torch.diagonal(self.sum_II)).all():
            raise LLQError(
                f"the Hessian of {name} is not finite: the calibration activations overflow; use dtype float32"
            )


def revive_dead(H_II: Tensor) -> Tensor:
    """Set the diagonal of channels that never fired to 1, in place; returns their mask [I]."""
    dead_I = torch.diagonal(H_II) == 0
    H_II[dead_I, dead_I] = 1
    return dead_I


def factorize(H_II: Tensor, damp: float, notes: dict[str, Any], *, inverse: bool) -> Tensor | None:
    """Cholesky factor of the damped Hessian, with a ladder of remedies where it is not positive definite.

    inverse: the upper U with U^T U = H^-1 (GPTQ); else the lower L with L L^T = H (LDLQ). The damping starts at
    `damp` * mean(diag H); each rung tries fp32, then fp64, then doubles the damping up to 1.0, and at last a
    diagonal floor. What was used goes into `notes` ("damp", "fp64", "floor"). None when nothing helped: the caller then
    rounds to nearest and says so in its notes.
    """
    mean_diagonal = float(torch.diagonal(H_II).mean())
    rungs = [(damp * 2.0**k, 0.0) for k in range(12) if damp * 2.0**k <= 1.0] or [(damp, 0.0)]
    rungs += [(1.0, 10.0**k) for k in range(1, 4)]
    for rung, floor in rungs:
        for dtype in (torch.float32, torch.float64):
            damped_II = H_II.to(dtype, copy=True)
            torch.diagonal(damped_II).add_((rung + floor) * mean_diagonal)
            factor = _factor(damped_II, inverse)
            if factor is not None:
                notes["damp"] = rung
                notes.update({"fp64": True} if dtype == torch.float64 else {})
                notes.update({"floor": floor} if floor else {})
                return factor.float()
    return None


def _factor(H_II: Tensor, inverse: bool) -> Tensor | None:
    lower_II, info = torch.linalg.cholesky_ex(H_II)
    if int(info) != 0:
        return None
    if inverse:
        inverse_II = torch.cholesky_inverse(lower_II)
        lower_II, info = torch.linalg.cholesky_ex(inverse_II, upper=True)
        if int(info) != 0:
            return None
    return lower_II if bool(torch.isfinite(lower_II).all()) else None
