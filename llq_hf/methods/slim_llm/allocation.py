"""SliM-LLM's bit allocation: which groups get a bit more, and which a bit less."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from . import SliMLLM


CHUNK = 1 << 22  # outputs whose distributions are held at once
LEAST = math.log(1e-6)  # of a probability, as the authors clamp it


class Search:
    """Sums, for 0, 1, 2, ... pairs, how far the outputs of a linear rounded so diverge from its
    own.
    """

    def __init__(self, method: SliMLLM, linear: nn.Linear, ranking: list[int], most: int) -> None:
        self.linear, self.first = linear, 0 if method.try_uniform else 1
        self.divergence_P = torch.zeros(most + 1, dtype=torch.float64, device=linear.weight.device)
        dtype, W_OI = linear.weight.dtype, linear.weight.detach().float()
        size, bits, whole = method.group_size, method.bits, W_OI.shape[1] // method.group_size
        head_OKg, tail_O1g = (
            W_OI[:, : whole * size].view(-1, whole, size),
            W_OI[:, None, whole * size :],
        )
        base_OKg = method.proxies(head_OKg, bits)
        tail = [method.proxies(tail_O1g, bits)[:, 0]] if tail_O1g.numel() else []
        self.base_OI = torch.cat([base_OKg.flatten(1), *tail], dim=1).to(
            dtype
        )  # all groups at `bits`
        lows, highs = ranking[:most], ranking[::-1][:most]
        self.changes = []  # what each further pair changes of it: columns, and by how much
        for groups, width in ((lows, bits - 1), (highs, bits + 1)):
            change_OPg = (method.proxies(head_OKg[:, groups], width) - base_OKg[:, groups]).to(
                dtype
            )
            columns = [slice(group * size, (group + 1) * size) for group in groups]
            self.changes.append(list(zip(columns, change_OPg.unbind(1), strict=True)))

    def best(self) -> int:
        sums = self.divergence_P.tolist()[self.first :]
        return sums.index(min(sums)) + self.first

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
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
