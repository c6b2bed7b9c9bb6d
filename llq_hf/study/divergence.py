"""Measures how far a packed model's predictions are from those of the full-precision model.

Legend: N windows, S tokens of a window, V vocabulary; p full precision, q packed.
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
from ..numerics.divergence import Divergence


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
    """The figures of `Divergence.summary` over all tokens of all windows, and "token_perplexity":
    that of `model` on the same windows.

    tick: called after every window.
    """
    device = next(model.parameters()).device
    parts: list[Divergence] = []
    nats = 0.0
    for ids_S in windows_NS.to(device):
        q_SV, p_SV = (each(input_ids=ids_S[None]).logits[0] for each in (model, reference))
        parts.append(Divergence.of(p_SV, q_SV))
        nats += float(nn.functional.cross_entropy(q_SV[:-1].float(), ids_S[1:]))
        tick()
    perplexity = math.exp(nats / len(windows_NS))
    return {**Divergence.together(parts).summary(), "token_perplexity": perplexity}
