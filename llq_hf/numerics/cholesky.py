"""Cholesky factors of damped Hessians, in fp32 with a ladder of dampings, and of their inverses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows or columns of a triangular matrix that are multiplied at once, without the zeros beside them.
# MKL's fp32 kernels for AVX-512 sum 192 products at a time: leaving out multiples of that, and no
# fewer than 384 in, changes no bit.
STRIP = 384


class PreparedHessian(NamedTuple):
    """A Hessian and its factor, columns in the order of solving."""

    H_II: Tensor  # undamped, dead channels revived
    factor_II: Tensor | None  # of the damped H: U, or L; None: nothing made it positive definite
    order_I: Tensor  # the input channel of each column
    dead_I: Tensor  # mask of the channels that never fired, in the model's order


def prepare_hessian(
    H_II: Tensor,
    damp: float,
    notes: dict[str, Any],
    order: Callable[[Tensor], Tensor] | None = None,
    *,
    inverse: bool = True,
    quick: bool = False,
    ridge: float = 0.0,
    fallback: str = "rtn",
) -> PreparedHessian:
    """Revive dead channels, put the columns in the order of solving, and factorize.

    `H_II` is changed in place. order(diagonal [I]) gives the order [I]; None: as they are. damp,
    inverse, quick: see `factorize`. ridge: added to the diagonal first. Notes "dead_columns", and
    `fallback` as "fallback" where there is no factor; what that means is up to the caller.
    """
    dead_I = revive_dead(H_II)
    notes["dead_columns"] = int(dead_I.sum())
    if ridge:
        torch.diagonal(H_II).add_(ridge)
    order_I = torch.arange(len(H_II), device=H_II.device)
    if order is not None:
        order_I = order(torch.diagonal(H_II))
        H_II = H_II[order_I][:, order_I]
    factor_II = factorize(H_II, damp, notes, inverse=inverse, quick=quick)
    if factor_II is None:
        notes["fallback"] = fallback
    return PreparedHessian(H_II, factor_II, order_I, dead_I)


def largest_first(diagonal_I: Tensor) -> Tensor:
    """Columns [I] by falling H_ii: an `order` of `prepare_hessian`."""
    return torch.argsort(diagonal_I, descending=True, stable=True)


def revive_dead(H_II: Tensor) -> Tensor:
    """Set the diagonal of channels that never fired to 1, in place; returns their mask [I]."""
    dead_I = torch.diagonal(H_II) == 0
    H_II[dead_I, dead_I] = 1
    return dead_I


def factorize(
    H_II: Tensor, damp: float, notes: dict[str, Any], *, inverse: bool, quick: bool = False
) -> Tensor | None:
    """Cholesky factor of the damped Hessian, with a ladder of remedies where it is not positive
    definite.

    inverse: the upper U with U^T U = H^-1 (GPTQ); else the lower L with L L^T = H (LDLQ). quick: U
    without ever forming H^-1, in less time and with less error, but not bit for bit what the
    authors' three steps give.

    The damping starts at `damp` * mean(diag H); each rung tries fp32, then fp64, then doubles the
    damping up to 1.0, and at last a diagonal floor. What was used goes into `notes` ("damp",
    "fp64", "floor"). None when nothing helped: the caller then rounds to nearest and says so in its
    notes.
    """
    mean_diagonal = float(torch.diagonal(H_II).mean())
    rungs = [(damp * 2.0**k, 0.0) for k in range(12) if damp * 2.0**k <= 1.0] or [(damp, 0.0)]
    rungs += [(1.0, 10.0**k) for k in range(1, 4)]
    for rung, floor in rungs:
        for dtype in (torch.float32, torch.float64):
            damped_II = (H_II.flip(0, 1) if inverse and quick else H_II.clone()).to(dtype)
            torch.diagonal(damped_II).add_((rung + floor) * mean_diagonal)
            factor = _factor(damped_II, inverse, quick)
            if factor is not None:
                notes["damp"] = rung
                notes.update({"fp64": True} if dtype == torch.float64 else {})
                notes.update({"floor": floor} if floor else {})
                return factor.float()
    return None


def _factor(H_II: Tensor, inverse: bool, quick: bool) -> Tensor | None:
    """Overwrites `H_II` (with quick: its columns and rows reversed): of a 70B model's down
    projection it has 3.3 GB.
    """
    factor_II = _cholesky(H_II)
    if factor_II is None:
        return None
    if (
        inverse and quick
    ):  # reversed, the lower factor becomes an upper R with R R^T = H, and U = R^-1
        _reverse(factor_II.mT)
        _invert_upper(factor_II)
    elif inverse:
        factor_II = _cholesky(torch.cholesky_inverse(factor_II), upper=True)
    if factor_II is None:
        return None
    ends = torch.stack(
        torch.aminmax(factor_II)
    )  # isfinite of all would take as much memory as two more
    return factor_II if bool(torch.isfinite(ends).all()) else None


def _cholesky(H_II: Tensor, upper: bool = False) -> Tensor | None:
    """The factor, in the memory of the symmetric `H_II`: its transpose lies as LAPACK wants it.
    None: there is none.
    """
    turned_II, info = H_II.mT, torch.empty((), dtype=torch.int32, device=H_II.device)
    factor_II, info = torch.linalg.cholesky_ex(
        turned_II, upper=upper, out=(turned_II, info)
    )  # one object: no copy
    return factor_II if int(info) == 0 else None


def _reverse(M_II: Tensor, rows: int = 64) -> None:
    """The last row and column first, in place."""
    size = len(M_II)
    for start in range(0, size // 2, rows):
        stop = min(start + rows, size // 2)
        top, bottom = M_II[start:stop].flip(0, 1), M_II[size - stop : size - start].flip(0, 1)
        M_II[start:stop], M_II[size - stop : size - start] = bottom, top
    if size % 2:
        M_II[size // 2] = M_II[size // 2].flip(0)


def _invert_upper(R_II: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves: matrix products, three times as fast
    as LAPACK's.
    """
    size = len(R_II)
    if size <= 256:
        eye_II = torch.eye(size, dtype=R_II.dtype, device=R_II.device)
        R_II.copy_(torch.linalg.solve_triangular(R_II, eye_II, upper=True))
        return
    half = size // 2
    first_HH, second_HH = R_II[:half, :half], R_II[half:, half:]
    _invert_upper(first_HH)
    _invert_upper(second_HH)
    corner_HH = R_II[:half, half:]
    left_HH = torch.empty_like(corner_HH)
    for start, stop in _strips(half):
        torch.mm(first_HH[start:stop, start:], corner_HH[start:], out=left_HH[start:stop])
    left_HH.neg_()
    for start, stop in _strips(size - half):
        torch.mm(left_HH[:, :stop], second_HH[:stop, start:stop], out=corner_HH[:, start:stop])


def _strips(size: int) -> Iterator[tuple[int, int]]:
    """0..size in pieces of STRIP, the last one up to twice as long."""
    return pairwise([*range(0, max(size - STRIP, 0) + 1, STRIP), size])
