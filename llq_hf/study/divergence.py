"""KL divergence of a packed model's predictions from those of the full-precision model.

Legend: N windows, S tokens of a window, V vocabulary; p full precision, q packed.

KL(p || q) is the mean over all tokens of all windows, in nats. Logits are compared in fp32,
whatever dtype the models compute in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.words import nearest
from ..data.evaluation import EVALUATION_TEXTS, load_evaluation

TOKENS = 256  # compared at a time: a large vocabulary takes 0.5 MB a token


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions:
    """On what text it is measured: the first `windows` windows of `seqlen` tokens.

    text: a name of data.evaluation.EVALUATION_TEXTS. file: a local file in place of the Hub's.
    """

    text: str = "wikitext2"
    file: str | None = None
    windows: int = 16
    seqlen: int = 2048

    def __post_init__(self) -> None:
        if self.text not in EVALUATION_TEXTS:
            meant = nearest(str(self.text), EVALUATION_TEXTS)
            raise LLQError(
                f"divergence: there is no text {self.text!r}{meant}; "
                f"give one of {', '.join(EVALUATION_TEXTS)}"
            )
        for name in ("windows", "seqlen"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LLQError(f"divergence: {name}={value!r} should be 1 or more")

    @classmethod
    def names(cls) -> list[str]:
        return [each.name for each in fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_windows(base: str, options: DivergenceOptions) -> Tensor:
    """Token windows int64 [N, S] of the text, by the tokenizer of the model in `base`."""
    from ..models.load import load_tokenizer

    text = load_evaluation(options.text, options.file)
    return text.windows(load_tokenizer(Path(base)), options.seqlen)[: options.windows]


@torch.inference_mode()
def measure_divergence(
    model: nn.Module,
    reference: nn.Module,
    windows_NS: Tensor,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"kl": nats per token, "token_perplexity": of `model` on the same windows}.

    tick: called after every window.
    """
    device = next(model.parameters()).device
    divergence = nats = 0.0
    for ids_S in windows_NS.to(device):
        q_SV, p_SV = (each(input_ids=ids_S[None]).logits[0] for each in (model, reference))
        divergence += _kl(p_SV, q_SV) / len(ids_S)
        nats += float(nn.functional.cross_entropy(q_SV[:-1].float(), ids_S[1:]))
        tick()
    count = len(windows_NS)
    return {"kl": divergence / count, "token_perplexity": math.exp(nats / count)}


def _kl(p_SV: Tensor, q_SV: Tensor) -> float:
    """Sum over tokens of KL(softmax(p) || softmax(q)), of logits."""
    total = 0.0
    for p_TV, q_TV in zip(torch.split(p_SV, TOKENS), torch.split(q_SV, TOKENS), strict=True):
        log_p_TV = p_TV.float().log_softmax(-1)
        log_q_TV = q_TV.float().log_softmax(-1)
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
    return total
