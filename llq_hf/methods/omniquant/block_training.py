"""OmniQuant's training of one block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...method import Step
from ...models.decoder import hidden_of as first_output
from ..training import Trained, train_block
from .equivalence import run_sequence, usable
from .rounding import TrainedLinear

if TYPE_CHECKING:
    from . import OmniQuant


class BlockTraining:
    """Trains clips and s by AdamW, and drifts (of the rounding) by the signs of their gradients."""

    def __init__(
        self,
        method: OmniQuant,
        step: Step,
        twin: nn.Module,
        parts: list[TrainedLinear],
        scales: list[nn.Parameter],
    ) -> None:
        assert step.data is not None
        self.method = method
        self.step = step
        self.data = step.data
        self.twin = twin
        self.scales = scales
        clips = [part.clip_2OG for part in parts]
        self.drifts = [part.drift_OGg for part in parts if part.drift_OGg is not None]
        self.parameters = clips + scales + self.drifts
        self.rates = method.lwc_lr, method.let_lr
        groups = [
            {"params": clips, "lr": method.lwc_lr},
            {"params": scales, "lr": method.let_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def run(self) -> list[float]:
        """Train, or resume an interrupted training. Returns the mean loss of each epoch."""
        dense = _dense_outputs(self.step) if self.method.aug_loss and self.method.epochs else []

        def descend(rows: slice, done: float) -> Tensor:
            return self._descend(rows.start, dense[rows.start] if dense else None, 1 - done)

        trained = Trained(self.parameters, self.optimizer)
        return train_block(
            self.step,
            trained,
            self.method.epochs,
            1,
            descend,
            "lower lwc_lr or let_lr, or run in float32",
        )

    def _descend(self, i: int, dense_BSD: Tensor | None, left: float) -> Tensor:
        """Make one step on sequence i. Returns the loss before it. left: the share of the training
        that is left, from 1 to 0.
        """
        with torch.enable_grad():
            out_BSD = run_sequence(self.twin, self.data, i)
            loss = F.mse_loss(out_BSD, self.data.targets(slice(i, i + 1)).to(out_BSD))
            if dense_BSD is not None:
                loss = loss + F.mse_loss(out_BSD, dense_BSD.to(out_BSD))
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
        if self.method.decay:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * left
        self.optimizer.step()
        for s in self.scales:
            s.copy_(usable(s))
        for drift in self.drifts:
            assert drift.grad is not None
            drift.sub_(drift.grad.sign_(), alpha=self.method.rounding_lr * left).clamp_(-0.5, 0.5)
        return loss.detach()


def _dense_outputs(step: Step) -> list[Tensor]:
    """Outputs of the full-precision block on the quantized inputs, [1, S, D] per sequence, on the
    CPU.
    """
    assert step.data is not None
    found: list[Tensor] = []
    for rows in step.data.batches():
        hidden_BSD, kwargs = step.data.inputs(rows)
        out_BSD = first_output(step.block(hidden_BSD, **kwargs)).cpu()
        found += [out_BSD[i : i + 1] for i in range(len(out_BSD))]
    return found
