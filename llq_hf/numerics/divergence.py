"""How far a packed model's predictions are from full precision, token by token.

Legend: T tokens, V vocabulary; p full precision, q packed.

KL(p || q) of a token is in nats. Logits are compared in fp32, whatever dtype the models compute in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError

TOKENS = 256  # compared at a time: a large vocabulary takes 0.5 MB a token


@dataclass(frozen=True, eq=False)
class Divergence:
    """Of some tokens: KL(p || q) fp32 [T], and whether both find the same token likeliest [T]. Both
    lie on the CPU.
    """

    kl_T: Tensor
    same_T: Tensor

    @classmethod
    def of(cls, p_TV: Tensor, q_TV: Tensor) -> Divergence:
        """From the logits of both models. LLQError where their vocabularies differ."""
        if p_TV.shape != q_TV.shape:
            raise LLQError(
                f"the models predict {q_TV.shape[-1]} and {p_TV.shape[-1]} different tokens: the "
                "one is not the full precision of the other"
            )
        parts = [
            _compare(p, q)
            for p, q in zip(torch.split(p_TV, TOKENS), torch.split(q_TV, TOKENS), strict=True)
        ]
        return cls.together(parts)

    @classmethod
    def together(cls, parts: Sequence[Divergence]) -> Divergence:
        """Of the tokens of all parts."""
        if not parts:
            return cls(torch.empty(0), torch.empty(0, dtype=torch.bool))
        return cls(torch.cat([each.kl_T for each in parts]), torch.cat([p.same_T for p in parts]))

    def __len__(self) -> int:
        return len(self.kl_T)

    def __repr__(self) -> str:  # what lm-eval writes into sample logs
        return f"{len(self)} tokens"

    def summary(self) -> dict[str, float]:
        """Mean, median, 99th percentile and maximum of the KL; the share of equal likeliest tokens.

        Figures do not depend on the order of the tokens. LLQError where there are none.
        """
        if not len(self):
            raise LLQError("no token was compared")
        nats = self.kl_T.double().numpy()
        return {
            "kl": math.fsum(nats) / len(nats),
            "kl_median": float(np.median(nats)),
            "kl_p99": float(np.quantile(nats, 0.99)),
            "kl_max": float(nats.max()),
            "top1_agreement": float(self.same_T.double().mean()),
        }


FIGURES = ("kl", "kl_median", "kl_p99", "kl_max", "top1_agreement")  # of `summary`


def _compare(p_TV: Tensor, q_TV: Tensor) -> Divergence:
    log_p_TV = p_TV.float().log_softmax(-1)
    log_q_TV = q_TV.to(p_TV.device).float().log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    same_T = log_p_TV.argmax(-1) == log_q_TV.argmax(-1)
    return Divergence(kl_T.cpu(), same_T.cpu())
