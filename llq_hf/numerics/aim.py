"""Aims a linear at its outputs in the full-precision model.

Legend: O out_features, I in_features.

In the quantized model a linear with the weight w gets the inputs X, in the full-precision model X~.
On X the outputs X~ w are best met by w* = (X^T X)^-1 X^T X~ w, which makes up for the errors of all
linears before. But w* is a regression on a few tokens for each input, most of whose sum comes from
a handful of large ones: it fits those tokens, and more so than it helps others. So it is a ridge
regression that pulls towards w, and only a share of the way is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stats import PairedHessian, Stat

RIDGE = 0.1  # of the mean diagonal of H


def aimed(weight_OI: Tensor, stat: Stat | None, share: float) -> Tensor:
    """The weight to begin with, fp32 [O, I]. share 0: itself; else `stat` is a PairedHessian."""
    if not share:
        return weight_OI
    assert isinstance(stat, PairedHessian)
    return pulled(weight_OI, stat.H_II, stat.C_II, share)


def pulled(weight_OI: Tensor, H_II: Tensor, C_II: Tensor, share: float) -> Tensor:
    """weight + share * weight (C^T - H) (H + RIDGE mean(diag H))^-1, as fp32 [O, I].

    H_II: X^T X, C_II: X^T X~, on one scale (`stats.PairedHessian`); H_II is overwritten. The weight
    itself where the system cannot be solved.
    """
    drift_OI = weight_OI @ (C_II.T - H_II)
    diagonal_I = torch.diagonal(H_II)
    diagonal_I.add_((RIDGE * diagonal_I.mean()).clamp_min(1e-30))
    factor_II, info = torch.linalg.cholesky_ex(H_II)
    moved_OI = torch.cholesky_solve(drift_OI.T, factor_II).T
    found_OI = torch.add(weight_OI, moved_OI, alpha=share)
    # Selected on the device: reading a flag would make a GPU wait.
    sound = (info == 0) & torch.isfinite(found_OI).all()
    return torch.where(sound, found_OI, weight_OI)
