"""Statistics of the inputs of a linear, gathered from the calibration data.

Legend: T tokens, I in_features, H_II = (2 / sequences) * sum over tokens of x x^T (IST-DASLab/gptq
`add_batch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..common.errors import LLQError

PANEL = 1024  # columns of a Hessian that are summed in one product


class Stat(ABC):
    """A statistic of the inputs of one linear, or of several that share their input.

    paired: under Flow.BOTH it also gets the inputs of the same linear in the full-precision model.
    """

    paired: ClassVar[bool] = False

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.device = device

    @abstractmethod
    def update(self, x_TI: Tensor, sequences: int) -> None:
        """Add the tokens of `sequences` calibration sequences."""

    def pair(self, x_TI: Tensor, dense_TI: Tensor) -> None:  # noqa: B027 (most need one stream)
        """Add the inputs in the quantized and in the full-precision model, of the same tokens as
        the `update` before.
        """

    @abstractmethod
    def merge(self, later: Self) -> None:
        """Add the statistic of the same input over the sequences that follow."""

    def fresh(self) -> Self:
        """A new, empty statistic of the same input."""
        return type(self)(self.in_features, self.device)

    def state(self) -> dict[str, Tensor]:
        """All its numbers as tensors, to be sent to another process."""
        held = {key: value for key, value in vars(self).items() if isinstance(value, Tensor | int)}
        return {key: torch.as_tensor(value) for key, value in held.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the numbers of another statistic's `state`."""
        for key, tensor in state.items():
            is_int = isinstance(getattr(self, key), int)
            setattr(self, key, int(tensor) if is_int else tensor.to(self.device))

    @abstractmethod
    def check(self, name: str) -> None:
        """LLQError, with the name of the linear, where the statistic is empty or not finite."""


class Hessian(Stat):
    """Second moments of the inputs: the Hessian of the layer's squared output error, up to a
    constant.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        # `update` sums only panels of columns down to the diagonal: half the work, because the
        # matrix is symmetric. `sum_II` mirrors them when it is needed.
        self.upper_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.mirrored = True
        self.sequences = 0

    def update(self, x_TI: Tensor, sequences: int) -> None:
        # Squares of LLaMA-3's massive activations overflow fp16, and bf16 is too coarse for them.
        x_TI = x_TI.float()
        for start in range(0, self.in_features, PANEL):
            stop = min(start + PANEL, self.in_features)
            self.upper_II[:stop, start:stop].addmm_(x_TI[:, :stop].T, x_TI[:, start:stop])
        self.mirrored = False
        self.sequences += sequences

    def merge(self, later: Self) -> None:
        self.upper_II += later.upper_II
        self.mirrored = False
        self.sequences += later.sequences

    @property
    def sum_II(self) -> Tensor:
        """Sum of x x^T over all tokens."""
        if not self.mirrored:
            for start in range(PANEL, self.in_features, PANEL):
                stop = min(start + PANEL, self.in_features)
                self.upper_II[start:stop, :start] = self.upper_II[:start, start:stop].T
            self.mirrored = True
        return self.upper_II

    @sum_II.setter
    def sum_II(self, sum_II: Tensor) -> None:
        self.upper_II = sum_II
        self.mirrored = True

    @property
    def H_II(self) -> Tensor:
        """fp32, a new copy each time, because solvers change it in place."""
        return self.sum_II * (2.0 / self.sequences)

    @property
    def diagonal_I(self) -> Tensor:
        """The diagonal of `H_II`, without a copy of the rest."""
        return torch.diagonal(self.sum_II) * (2.0 / self.sequences)

    def check(self, name: str) -> None:
        if self.sequences == 0:
            raise LLQError(f"{name} saw no calibration data")
        if not torch.isfinite(torch.diagonal(self.sum_II)).all():
            raise LLQError(
                f"the Hessian of {name} is not finite: the calibration activations overflow; "
                "use dtype float32"
            )


class PairedHessian(Hessian):
    """A Hessian, and cross_II = sum x x~^T, where x~ is the same input in the full-precision model.

    Without Flow.BOTH there is no x~, and it costs no more than a Hessian.
    """

    paired: ClassVar[bool] = True

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.cross_II: Tensor | None = None

    def pair(self, x_TI: Tensor, dense_TI: Tensor) -> None:
        if self.cross_II is None:
            self.cross_II = torch.zeros_like(self.upper_II)
        self.cross_II.addmm_(x_TI.float().T, dense_TI.float())

    def merge(self, later: Self) -> None:
        super().merge(later)
        if self.cross_II is not None and later.cross_II is not None:
            self.cross_II += later.cross_II

    @property
    def C_II(self) -> Tensor:
        """cross_II on the scale of H_II, a new copy each time; H_II where there is no x~."""
        return self.H_II if self.cross_II is None else self.cross_II * (2.0 / self.sequences)


class AbsMax(Stat):
    """The largest magnitude of each input channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.max_I = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.sequences = 0

    def merge(self, later: Self) -> None:
        self.max_I = torch.maximum(self.max_I, later.max_I)
        self.sequences += later.sequences

    def update(self, x_TI: Tensor, sequences: int) -> None:
        if len(x_TI):
            self.max_I = torch.maximum(self.max_I, x_TI.abs().amax(0).float())
        self.sequences += sequences

    def check(self, name: str) -> None:
        if self.sequences == 0:
            raise LLQError(f"{name} saw no calibration data")
        if not torch.isfinite(self.max_I).all():
            raise LLQError(
                f"the inputs of {name} are not finite: calibration overflows; use dtype float32"
            )


class Samples(Hessian):
    """A Hessian, mean magnitudes, and an evenly spaced sample of 512 to 1023 tokens (all tokens, if
    there are fewer).
    """

    LIMIT = 1024

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.abs_sum_I = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.stride = 1
        self.rows_TI = torch.empty(0, in_features, dtype=torch.float32, device=device)

    def update(self, x_TI: Tensor, sequences: int) -> None:
        super().update(x_TI, sequences)
        self.abs_sum_I += x_TI.float().abs().sum(0)
        first = -self.tokens % self.stride  # tokens 0, stride, 2 stride, ... of all
        self.rows_TI = torch.cat([self.rows_TI, x_TI[first :: self.stride].float()])
        self.tokens += len(x_TI)
        self._thin(1)

    def merge(self, later: Self) -> None:
        """See `Stat`. The sample stays evenly spaced, except where the two parts meet."""
        super().merge(later)
        self.abs_sum_I += later.abs_sum_I
        self.tokens += later.tokens
        self._thin(later.stride)
        self.rows_TI = torch.cat([self.rows_TI, later.rows_TI[:: self.stride // later.stride]])
        self._thin(1)

    def _thin(self, stride: int) -> None:
        """Drop every second row while there are too many or their stride is below `stride`."""
        while len(self.rows_TI) >= self.LIMIT or self.stride < stride:
            self.rows_TI = self.rows_TI[::2].clone()
            self.stride *= 2

    @property
    def mean_I(self) -> Tensor:
        """Mean |x| per channel, over all tokens."""
        return self.abs_sum_I / max(self.tokens, 1)
