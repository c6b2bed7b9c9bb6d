"""IR-QLoRA's information elastic connections (Qin et al. 2024), computed as plain LoRA weights.

Legend: r rank, I in_features, O out_features, g = gcd of the rank and the width at hand.

Each half of a LoRA pair is bridged by a fixed averaging map with one trainable factor:

    u = A x + beta1 P x     (P x)_k: mean of the (k mod g)-th of g chunks of x
    v = B u + beta2 R u     (R u)_j: mean of the chunk of u that belongs to the j-th of O outputs

P and R are linear, so the pair always equals a plain pair with the weights A + beta1 P and
B + beta2 R. This is how it is computed here and what `merge` leaves behind: the merged adapter is
bit for bit the trained one, and any LoRA loader serves it. Where r divides both widths, as the
authors' code demands, P averages chunks of I / r inputs and R repeats each entry O / r times; else
the paper's rule with the greatest common divisor holds.

Departure: with dropout, P gets the inputs that A gets; in the authors' code it gets all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class Elastic(nn.Linear):
    """One half of a LoRA pair with its connection, in place of peft's own Linear."""

    def __init__(self, half: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = half.in_features
        self.out_features = half.out_features
        self.weight = half.weight
        self.register_parameter("bias", None)
        # A matrix, because peft takes a vector for a damaged one.
        self.beta = nn.Parameter(half.weight.new_zeros(1, 1))

    def effective_weight(self) -> Tensor:
        """The weight of the plain linear that this half equals."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective_weight())

    def _eye(self, gcd: int) -> Tensor:
        return torch.eye(gcd, dtype=self.weight.dtype, device=self.weight.device)


class ElasticDown(Elastic):
    """A + beta P, [r, I]."""

    def effective_weight(self) -> Tensor:
        r, width = self.weight.shape
        g = math.gcd(r, width)
        mean = self._eye(g)[None, :, :, None] * (g / width)
        return (self.weight.view(r // g, g, g, width // g) + self.beta * mean).view(r, width)


class ElasticUp(Elastic):
    """B + beta R, [O, r]."""

    def effective_weight(self) -> Tensor:
        width, r = self.weight.shape
        g = math.gcd(r, width)
        mean = self._eye(g)[:, None, :, None] * (g / r)
        return (self.weight.view(g, width // g, g, r // g) + self.beta * mean).view(width, r)


def connect(model: nn.Module) -> None:
    """Give every LoRA pair of a peft model its connections."""
    for layer in _layers(model):
        for name in list(layer.lora_A):
            layer.lora_A[name] = ElasticDown(layer.lora_A[name])
            layer.lora_B[name] = ElasticUp(layer.lora_B[name])


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace pairs with connections by plain LoRA pairs that compute the same."""
    for layer in _layers(model):
        for half in (layer.lora_A, layer.lora_B):
            for name, module in half.items():
                if isinstance(module, Elastic):
                    half[name] = _plain(module)


def _plain(module: Elastic) -> nn.Linear:
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(
        module.effective_weight(), requires_grad=module.weight.requires_grad
    )
    return plain


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
