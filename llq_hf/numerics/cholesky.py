"""Cholesky factors of damped Hessians and of their inverses.

Legend: I in_features. Factors are found in fp32; where that fails, in fp64 or with more damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows or columns of a triangular matrix that are multiplied at once; the zeros beside them are left
# out. MKL's fp32 kernels for AVX-512 sum 192 products at a time. So no bit changes as long as
# multiples of 192 are left out and at least 384 remain.
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
    fallback: str,
    inverse: bool = True,
    quick: bool = False,
    ridge: float = 0.0,
) -> PreparedHessian:
    """Revive dead channels, put the columns in the order of solving, and factorize.

    H_II is changed in place. order: gives the columns [I] in the order of solving from the
    diagonal [I]; None: unchanged. damp, inverse, quick: see `factorize`. ridge: is added to the
    diagonal after dead channels are revived.

    Notes: "dead_columns", what `factorize` notes, and `fallback` as "fallback" where there is no
    factor; the caller then rounds without error feedback.
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
    """Columns [I] with the largest H_ii first: an `order` for `prepare_hessian`."""
    return torch.argsort(diagonal_I, descending=True, stable=True)


def revive_dead(H_II: Tensor) -> Tensor:
    """Set the diagonal of channels that never fired to 1, in place. Returns their mask [I]."""
    dead_I = torch.diagonal(H_II) == 0
    H_II[dead_I, dead_I] = 1
    return dead_I


def factorize(
    H_II: Tensor, damp: float, notes: dict[str, Any], *, inverse: bool, quick: bool = False
) -> Tensor | None:
    """Cholesky factor of the damped Hessian, damped more where it is not positive definite.

    inverse: the upper U with U^T U = H^-1 (GPTQ); else the lower L with L L^T = H (LDLQ). quick:
    find U without forming H^-1, which is faster and more accurate, but not bit for bit the result
    of the authors' three steps.

    The damping starts at `damp` * mean(diag H). Each attempt is made in fp32, then in fp64. Then
    the damping is doubled, up to 1.0, and at last a floor is added to the diagonal. `notes` says
    what was used ("damp", "fp64", "floor"). None: nothing helped.
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
    """Factorize in the memory of `H_II`, which takes 3.3 GB for a 70B model's down projection.

    With `inverse` and `quick`, rows and columns of `H_II` come in reverse order.
    """
    factor_II = _cholesky(H_II)
    if factor_II is None:
        return None
    if inverse and quick:
        # Reversed, the lower factor becomes an upper R with R R^T = H, and U = R^-1.
        _reverse(factor_II.mT)
        _invert_upper(factor_II)
    elif inverse:
        factor_II = _cholesky(torch.cholesky_inverse(factor_II), upper=True)
    if factor_II is None:
        return None
    # isfinite of all entries would take the memory of two more matrices.
    ends = torch.stack(torch.aminmax(factor_II))
    return factor_II if bool(torch.isfinite(ends).all()) else None


def _cholesky(H_II: Tensor, upper: bool = False) -> Tensor | None:
    """The factor, in the memory of the symmetric `H_II`. None: it is not positive definite."""
    by_columns_II = H_II.mT  # as LAPACK wants it
    info = torch.empty((), dtype=torch.int32, device=H_II.device)
    # Input and output are one object, so that nothing is copied.
    factor_II, info = torch.linalg.cholesky_ex(
        by_columns_II, upper=upper, out=(by_columns_II, info)
    )
    return factor_II if int(info) == 0 else None


def _reverse(M_II: Tensor, rows: int = 64) -> None:
    """Reverse the order of rows and columns, in place."""
    size = len(M_II)
    for start in range(0, size // 2, rows):
        stop = min(start + rows, size // 2)
        top = M_II[start:stop].flip(0, 1)
        bottom = M_II[size - stop : size - start].flip(0, 1)
        M_II[start:stop] = bottom
        M_II[size - stop : size - start] = top
    if size % 2:
        M_II[size // 2] = M_II[size // 2].flip(0)


def _invert_upper(R_II: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves.

    Most of the work is matrix products, which makes it three times as fast as LAPACK's routine.
    """
    size = len(R_II)
    if size <= 256:
        eye_II = torch.eye(size, dtype=R_II.dtype, device=R_II.device)
        R_II.copy_(torch.linalg.solve_triangular(R_II, eye_II, upper=True))
        return
    half = size // 2
    first_HH = R_II[:half, :half]
    second_HH = R_II[half:, half:]
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
    """(start, stop) of pieces of 0..size of STRIP each; the last one is up to twice as long."""
    return pairwise([*range(0, max(size - STRIP, 0) + 1, STRIP), size])
