"""One launch for a block of columns of a solver: where it serves, and what the kernels of solve.py
are given.

Legend: O out_features, I in_features, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.errors import LLQError
from .ready import dense, device_of

OVERFLOW = "error feedback overflows fp32: the weights or the calibration inputs are not usable"
ROWS = 4  # of a program; few, as each program walks through its columns one after the other


def block_rounder(
    W_OI: Tensor, U_II: Tensor, bits: int, block: int, drift_II: Tensor | None
) -> BlockRounder | None:
    """What rounds blocks of columns of W_OI with error feedback, one launch a block; None where no
    kernel can. It serves inside `reference` too: codes that a GPU finds differ from another GPU's
    anyway, and from torch's on the same one only where two codes are equally near.
    """
    return BlockRounder(W_OI, U_II, bits, block, drift_II) if _fits(W_OI) else None


def backward_rounder(codes_OI: Tensor) -> Callable[..., None] | None:
    """What rounds a block of columns from last to first in one launch, `round_backwards`; None
    where no kernel can. It serves inside `reference` too, as `block_rounder` does.
    """
    return round_backwards if _fits(codes_OI) else None


def descender(values_IO: Tensor) -> Callable[..., None] | None:
    """What makes a pass of coordinate descent on uniform grids, one launch a block of columns,
    `descend`; None where no kernel can. It serves inside `reference` too.
    """
    return descend if _fits(values_IO) else None


def _fits(matrix: Tensor) -> bool:
    there = matrix.is_cuda and matrix.dtype == torch.float32 and matrix.is_contiguous()
    return there and dense()


class BlockRounder:
    """Rounds blocks of at most `block` columns of W_OI, fp32 and contiguous, on uniform grids."""

    def __init__(
        self, W_OI: Tensor, U_II: Tensor, bits: int, block: int, drift_II: Tensor | None
    ) -> None:
        self.W_OI, self.U_II, self.drift_II, self.bits = W_OI, U_II, drift_II, bits
        self.block = block
        self.width = max(16, 1 << (block - 1).bit_length())
        self.codes_IO = W_OI.new_empty(W_OI.shape[::-1], dtype=torch.uint8)
        self.errors_OB = W_OI.new_empty(len(W_OI), self.width)
        self.before_OB = torch.empty_like(self.errors_OB)

    def __call__(
        self,
        start: int,
        stop: int,
        scale_BO: Tensor,
        zero_BO: Tensor,
        halves: bool,
        mean_BO: Tensor | None = None,
        bits: int | None = None,
    ) -> None:
        """Round the columns from `start` up to `stop`, each on its own grids, and compensate their
        errors in all later columns. mean_BO: added to all values; zeros then lie anywhere. bits: of
        these columns, if they are not those of all.
        """
        from .solve import uniform_block

        rows, columns = self.W_OI.shape
        drift_II = self.drift_II
        with device_of(self.W_OI):
            uniform_block[(-(-rows // ROWS),)](
                self.W_OI,
                self.U_II,
                self.U_II if drift_II is None else drift_II,
                scale_BO.contiguous(),
                zero_BO.contiguous(),
                scale_BO if mean_BO is None else mean_BO.contiguous(),
                self.codes_IO,
                self.errors_OB,
                self.before_OB,
                start,
                stop - start,
                rows,
                columns,
                *self.U_II.stride(),
                0 if drift_II is None else drift_II.stride(0),
                float(2 ** (bits or self.bits) - 1),
                HALVES=halves,
                MEANS=mean_BO is not None,
                DRIFT=drift_II is not None,
                B=self.width,
                BR=ROWS,
                num_warps=4,
            )
        later_OI, size = self.W_OI[:, stop:], stop - start
        later_OI.addmm_(self.errors_OB[:, :size], self.U_II[start:stop, stop:], alpha=-1)
        if drift_II is not None:
            later_OI.addmm_(self.before_OB[:, :size], drift_II[start:stop, stop:])

    def check(self) -> None:
        """LLQError where the compensation overflowed, after the last block."""
        # NaN spreads to all later columns, so the last error shows it.
        last = (self.W_OI.shape[1] - 1) % self.block
        if bool(self.errors_OB[:, last].isnan().any()):
            raise LLQError(OVERFLOW)


def round_backwards(
    sums_OB: Tensor,
    target_OI: Tensor,
    matrix_II: Tensor,
    codes_OI: Tensor,
    error_OI: Tensor,
    start: int,
    top: int,
    greedy: bool,
) -> None:
    """Round the columns of a block from last to first, one launch; see `backward_block`."""
    from .solve import backward_block

    rows, columns = codes_OI.shape
    size = sums_OB.shape[1]
    with device_of(codes_OI):
        backward_block[(-(-rows // ROWS),)](
            sums_OB.contiguous(),
            target_OI,
            matrix_II,
            codes_OI,
            error_OI,
            start,
            size,
            rows,
            columns,
            *matrix_II.stride(),
            float(top),
            GREEDY=greedy,
            B=max(16, 1 << (size - 1).bit_length()),
            BR=ROWS,
            num_warps=4,
        )


def descend(
    gradient_IO: Tensor,
    values_IO: Tensor,
    H_II: Tensor,
    scale_IO: Tensor,
    zero_IO: Tensor,
    codes_IO: Tensor,
    block: int,
    bits: int,
    halves: bool,
) -> None:
    """Coordinate descent over all columns on uniform grids, one launch a block; see
    `descend_block`. All but H_II are contiguous.
    """
    from .solve import descend_block

    columns, rows = values_IO.shape
    moved_BO = torch.empty_like(values_IO[:block])
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        with device_of(values_IO):
            descend_block[(-(-rows // ROWS),)](
                gradient_IO,
                values_IO,
                H_II,
                scale_IO,
                zero_IO,
                codes_IO,
                moved_BO,
                start,
                stop - start,
                rows,
                *H_II.stride(),
                float(2**bits - 1),
                HALVES=halves,
                B=max(16, 1 << (block - 1).bit_length()),
                BR=ROWS,
                num_warps=4,
            )
        gradient_IO[stop:].addmm_(H_II[stop:, start:stop], moved_BO[: stop - start])
