"""SliM-LLM's bit allocation: measures how many groups should give a bit to as many others.

Legend: O out_features, I in_features, T tokens, K groups, P pairs, g weights of a group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from . import SliMLLM


CHUNK = 1 << 22  # outputs whose distributions are held at once
LEAST = math.log(1e-6)  # the authors' lower limit of a probability


class Search:
    """Sums up the KL divergence of a linear's rounded outputs from its own, for 0, 1, ... pairs.

    `hook` is a forward hook of the linear; `best` gives the number of pairs of least divergence.
    """

    def __init__(self, method: SliMLLM, linear: nn.Linear, ranking: list[int], most: int) -> None:
        self.linear = linear
        self.first = 0 if method.try_uniform else 1
        self.divergence_P = torch.zeros(most + 1, dtype=torch.float64, device=linear.weight.device)
        dtype, W_OI = linear.weight.dtype, linear.weight.detach().float()
        size, bits, fit = method.group_size, method.bits, method.grid_fit
        whole = W_OI.shape[1] // size
        # The weight with all groups at `bits`.
        head_OKg = W_OI[:, : whole * size].view(-1, whole, size)
        tail_O1g = W_OI[:, None, whole * size :]
        base_OKg = fit.round_groups(head_OKg, bits)
        tail = [fit.round_groups(tail_O1g, bits)[:, 0]] if tail_O1g.numel() else []
        self.base_OI = torch.cat([base_OKg.flatten(1), *tail], dim=1).to(dtype)
        # What each further pair changes in it: columns, and by how much.
        lows, highs = ranking[:most], ranking[::-1][:most]
        self.changes = []
        for groups, width in ((lows, bits - 1), (highs, bits + 1)):
            rounded_OPg = fit.round_groups(head_OKg[:, groups], width)
            change_OPg = (rounded_OPg - base_OKg[:, groups]).to(dtype)
            columns = [slice(group * size, (group + 1) * size) for group in groups]
            self.changes.append(list(zip(columns, change_OPg.unbind(1), strict=True)))

    def best(self) -> int:
        """The number of pairs of least divergence; the smallest of equally good ones."""
        sums = self.divergence_P.tolist()[self.first :]
        return sums.index(min(sums)) + self.first

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        """Add the divergences on one batch of inputs."""
        x_TI, y_TO = args[0].flatten(0, -2), y.flatten(0, -2)
        size = max(1, CHUNK // y_TO.shape[1])
        for x_tI, y_tO in zip(torch.split(x_TI, size), torch.split(y_TO, size), strict=True):
            self._compare(x_tI.float(), torch.log_softmax(y_tO.float(), dim=1).clamp_min_(LEAST))

    def _compare(self, x_TI: Tensor, target_TO: Tensor) -> None:
        bias = None if self.linear.bias is None else self.linear.bias.detach().float()
        y_TO = F.linear(x_TI, self.base_OI.float(), bias)
        for pairs, change in enumerate([(), *zip(*self.changes, strict=True)]):
            for columns, change_OB in change:
                y_TO.addmm_(x_TI[:, columns], change_OB.float().T)
            if pairs >= self.first:
                log_TO = torch.log_softmax(y_TO, dim=1).clamp_min_(LEAST)
                self.divergence_P[pairs] += (log_TO.exp() * (log_TO - target_TO)).sum()
