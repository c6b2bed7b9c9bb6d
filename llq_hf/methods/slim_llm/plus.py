"""SliM-LLM+: the ranges of groups are trained against the block's output."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import LLQError
from ...method import Packed, Step
from ...models.decoder import hidden_of
from ...numerics.activations import round_through
from ...numerics.grids import grouped
from .levels import Levels, ends_of

if TYPE_CHECKING:
    from . import SliMLLM


class Clipping:
    """The ranges of one linear's groups, each end times the sigmoid of a logit that is trained."""

    def __init__(self, method: SliMLLM, linear: nn.Linear, widths: list[int]) -> None:
        self.method, self.linear, self.widths = method, linear, widths
        W_OI, groups = linear.weight.detach().float(), len(widths)
        self.W_OGg = grouped(W_OI, method.group_size, mode="replicate")
        low, high = ends_of(self.W_OGg.flatten(0, 1))
        self.low_OG, self.high_OG = low.view(-1, groups), high.view(-1, groups)
        self.mean_OG, self.size_OG = self.W_OGg.mean(2), self.W_OGg.abs().mean(2)
        self.widths_G = torch.tensor(widths, dtype=torch.uint8, device=W_OI.device)
        self.top_G = torch.exp2(self.widths_G.float()) - 1
        start_G = torch.where(
            self.widths_G == 1, 0.0, 4.0
        )  # sigmoids: 0.982 of a range, 0.5 + 0.5 of mean|w|
        self.logits_2OG = start_G.expand(2, len(W_OI), -1).clone().requires_grad_()

    def levels(self) -> Levels:
        """Differentiable in the logits through the scale."""
        method, share_2OG = self.method, torch.sigmoid(self.logits_2OG)
        low_OG, high_OG = share_2OG[0] * self.low_OG, share_2OG[1] * self.high_OG
        two_G = self.widths_G == 1
        distance_OG = 2 * self.size_OG * (share_2OG[1] + 0.5)
        scale_OG = torch.where(two_G, distance_OG, (high_OG - low_OG) / self.top_G).clamp(1e-5, 1e4)
        with torch.no_grad():
            centre_OG = (
                torch.full_like(self.mean_OG, 0.5)
                if method._exact
                else 0.5 - self.mean_OG / scale_OG
            )
            zero_OG = torch.where(two_G, centre_OG, torch.round(-low_OG / scale_OG))
            zero_OG = method._stored_zero(zero_OG, self.widths_G)
            mean_OG = self.mean_OG * two_G * method._exact
        return Levels(scale_OG, zero_OG, mean_OG)

    def rounded(self) -> Tensor:
        """The weight [O, I] as rounded now; gradients pass through the rounding."""
        levels_OG1 = self.levels().through(lambda t: t[..., None])
        position_OGg = (self.W_OGg - levels_OG1.mean) / levels_OG1.scale + levels_OG1.zero
        codes_OGg = round_through(position_OGg).clamp_min(0)
        codes_OGg = torch.minimum(codes_OGg, self.top_G[:, None])
        return self._columns(levels_OG1.values(codes_OGg))

    def _columns(self, x_OGg: Tensor) -> Tensor:
        return x_OGg.flatten(1)[:, : self.linear.in_features]

    def packed(self) -> Packed:
        levels_OG = self.levels()
        levels_OG = levels_OG._replace(scale=self.method.uniform.stored(levels_OG.scale))
        parts = [
            levels_OG.through(lambda t, g=group: t[:, g, None]).codes(self.W_OGg[:, group], width)  # type: ignore[misc]
            for group, width in enumerate(self.widths)
        ]
        return self.method.pack(self._columns(torch.stack(parts, dim=1)), levels_OG, self.widths)


def train(
    method: SliMLLM, step: Step, clippings: dict[str, Clipping], saved: dict[str, Tensor] | None
) -> list[float]:
    """Train the logits, sequence by sequence; state is saved after every epoch. Mean losses of all
    epochs.
    """
    assert step.data is not None
    parameters = [clipping.logits_2OG for clipping in clippings.values()]
    optimizer = torch.optim.AdamW(parameters, lr=method.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    if saved is not None:
        losses = saved["losses"].tolist()
        for name, clipping in clippings.items():
            clipping.logits_2OG.data.copy_(saved[f"{name}.logits"])
            moments = {
                key: saved[f"{name}.{key}"].to(clipping.logits_2OG.device)
                for key in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[clipping.logits_2OG] = {**moments, "step": saved["steps"].clone()}
    step.listener.stage("clipping", method.epochs)
    step.listener.advance(len(losses))
    while len(losses) < method.epochs:
        losses.append(_epoch(method, step, clippings, optimizer))
        if not math.isfinite(losses[-1]):
            raise LLQError(
                f"the clipping of {step.prefix} diverged; lower learning_rate={method.learning_rate}"
            )
        tensors = {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "steps": optimizer.state[parameters[0]]["step"],
        }
        for name, clipping in clippings.items():
            state = optimizer.state[clipping.logits_2OG]
            tensors[f"{name}.logits"], tensors[f"{name}.widths"] = (
                clipping.logits_2OG.detach(),
                clipping.widths_G,
            )
            tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = (
                state["exp_avg"],
                state["exp_avg_sq"],
            )
        step.state.save(tensors)
        step.listener.advance()
    return losses


def _epoch(
    method: SliMLLM, step: Step, clippings: dict[str, Clipping], optimizer: torch.optim.Optimizer
) -> float:
    assert step.data is not None
    total = torch.zeros(())
    for i in range(step.data.count):
        rows = slice(i, i + 1)
        hidden_BSD, kwargs = step.data.inputs(rows)
        targets = [step.data.targets(rows)]
        if method.aug_loss:
            with torch.no_grad():
                targets.append(hidden_of(step.block(hidden_BSD, **kwargs)))
        with torch.enable_grad():
            weights = {
                f"{n}.weight": c.rounded().to(c.linear.weight.dtype) for n, c in clippings.items()
            }
            out_BSD = hidden_of(
                torch.func.functional_call(step.block, weights, (hidden_BSD,), kwargs)
            ).float()
            loss = torch.stack([F.mse_loss(out_BSD, target.float()) for target in targets]).sum()
        parameters = [clipping.logits_2OG for clipping in clippings.values()]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = (
                gradient  # and nobody else's: the block's own parameters may be trainable
            )
        optimizer.step()
        total = total.to(loss.device) + loss.detach()
    return float(total) / step.data.count
