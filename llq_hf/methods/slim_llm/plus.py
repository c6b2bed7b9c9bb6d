"""SliM-LLM+: trains the ranges of groups against the block's output.

Legend: O out_features, I in_features, G groups, g weights of a group.
"""

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
from ..training import settled_attention
from .levels import Levels, ends_of

if TYPE_CHECKING:
    from . import SliMLLM


class Clipping:
    """The ranges of one linear's groups: each end is multiplied by the sigmoid of a trained logit.

    In groups of 1 bit, the second logit scales the distance of the two levels instead.
    """

    def __init__(self, method: SliMLLM, linear: nn.Linear, widths: list[int]) -> None:
        self.method = method
        self.linear = linear
        self.widths = widths
        W_OI = linear.weight.detach().float()
        groups = len(widths)
        self.W_OGg = grouped(W_OI, method.group_size, mode="replicate")
        low, high = ends_of(self.W_OGg.flatten(0, 1))
        self.low_OG, self.high_OG = low.view(-1, groups), high.view(-1, groups)
        self.mean_OG = self.W_OGg.mean(2)
        self.size_OG = self.W_OGg.abs().mean(2)
        self.widths_G = torch.tensor(widths, dtype=torch.uint8, device=W_OI.device)
        self.top_G = torch.exp2(self.widths_G.float()) - 1
        # Sigmoids of the start: 0.982 of a range; in groups of 1 bit 0.5, to which 0.5 is added.
        start_G = torch.where(self.widths_G == 1, 0.0, 4.0)
        self.logits_2OG = start_G.expand(2, len(W_OI), -1).clone().requires_grad_()

    def levels(self) -> Levels:
        """The grids [O, G], with zeros as stored. Gradients reach the logits through the scale."""
        storage = self.method.storage
        share_2OG = torch.sigmoid(self.logits_2OG)
        low_OG = share_2OG[0] * self.low_OG
        high_OG = share_2OG[1] * self.high_OG
        two_G = self.widths_G == 1
        distance_OG = 2 * self.size_OG * (share_2OG[1] + 0.5)
        scale_OG = torch.where(two_G, distance_OG, (high_OG - low_OG) / self.top_G).clamp(1e-5, 1e4)
        with torch.no_grad():
            if storage.exact:
                centre_OG = torch.full_like(self.mean_OG, 0.5)
            else:
                centre_OG = 0.5 - self.mean_OG / scale_OG
            zero_OG = torch.where(two_G, centre_OG, torch.round(-low_OG / scale_OG))
            zero_OG = storage.round_zero(zero_OG, self.widths_G)
            mean_OG = self.mean_OG * two_G * storage.exact
        return Levels(scale_OG, zero_OG, mean_OG)

    def round(self) -> Tensor:
        """The weight [O, I] rounded on the present grids; gradients pass through the rounding."""
        levels_OG1 = self.levels().map(lambda t: t[..., None])
        position_OGg = (self.W_OGg - levels_OG1.mean) / levels_OG1.scale + levels_OG1.zero
        codes_OGg = round_through(position_OGg).clamp_min(0)
        codes_OGg = torch.minimum(codes_OGg, self.top_G[:, None])
        return self._columns(levels_OG1.values(codes_OGg))

    def _columns(self, x_OGg: Tensor) -> Tensor:
        """Groups as a matrix [O, I], without the padding of the last group."""
        return x_OGg.flatten(1)[:, : self.linear.in_features]

    def pack(self) -> Packed:
        """The stored tensors: scales are rounded, and weights take the nearest codes."""
        levels_OG = self.levels()
        levels_OG = levels_OG._replace(scale=self.method.uniform.stored(levels_OG.scale))
        parts = []
        for group, width in enumerate(self.widths):
            levels_O1 = levels_OG.map(lambda t, g=group: t[:, g, None])  # type: ignore[misc]
            parts.append(levels_O1.codes(self.W_OGg[:, group], width))
        codes_OI = self._columns(torch.stack(parts, dim=1))
        return self.method.storage.pack(codes_OI, levels_OG, self.widths)


def train(
    method: SliMLLM, step: Step, clippings: dict[str, Clipping], saved: dict[str, Tensor] | None
) -> list[float]:
    """Train the logits, one sequence a step, and save the state after each epoch.

    saved: a state to go on from. Returns the mean losses of all epochs. LLQError if the loss is not
    finite.
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
        with settled_attention(parameters[0].device):
            losses.append(_epoch(method, step, clippings, optimizer))
        if not math.isfinite(losses[-1]):
            raise LLQError(
                f"the clipping of {step.prefix} diverged; "
                f"lower learning_rate={method.learning_rate}"
            )
        tensors = {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "steps": optimizer.state[parameters[0]]["step"],
        }
        for name, clipping in clippings.items():
            state = optimizer.state[clipping.logits_2OG]
            tensors[f"{name}.logits"] = clipping.logits_2OG.detach()
            tensors[f"{name}.widths"] = clipping.widths_G
            tensors[f"{name}.exp_avg"] = state["exp_avg"]
            tensors[f"{name}.exp_avg_sq"] = state["exp_avg_sq"]
        step.state.save(tensors)
        step.listener.advance()
    return losses


def _epoch(
    method: SliMLLM, step: Step, clippings: dict[str, Clipping], optimizer: torch.optim.Optimizer
) -> float:
    """One epoch; returns the mean loss."""
    assert step.data is not None
    parameters = [clipping.logits_2OG for clipping in clippings.values()]
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
                f"{name}.weight": clipping.round().to(clipping.linear.weight.dtype)
                for name, clipping in clippings.items()
            }
            output = torch.func.functional_call(step.block, weights, (hidden_BSD,), kwargs)
            out_BSD = hidden_of(output).float()
            loss = torch.stack([F.mse_loss(out_BSD, target.float()) for target in targets]).sum()
        # Not `backward`: the block's own parameters may be trainable, and must get no gradient.
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        total = total.to(loss.device) + loss.detach()
    return float(total) / step.data.count
