"""Divergence from full precision in fixed windows, as a task of lm-evaluation-harness.

The YAML files in `tasks/lm_eval` name the class `WindowDivergence` here. Text and windows are those
of the perplexity task of the same text; all S tokens of a window count, since a prediction needs no
next token to be compared.

The full-precision model is loaded beside the model that is scored, once for all tasks. Windows go
through both, a batch at a time, and of their logits only two numbers a token are kept. Which model
it is, in this order: `base` of the metadata or of model_args; the model that `--model llq`
quantized; what the packed checkpoint's report names. With `method=none` it is the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from ..checkpoints.dense import fetch, read_config
from ..common.errors import LLQError
from ..numerics.divergence import FIGURES, Divergence
from .lm_eval_perplexity import WindowPerplexity, scored_shards
from .loading import load_model

REQUEST_TYPE = "llq_windows_kl"
ITSELF = ""  # as a base: the model that is scored is in full precision itself


class WindowDivergence(WindowPerplexity):
    """KL divergence from the full-precision model, and agreement with it, on one evaluation text.

    The user's metadata may say `base`, beside what it says for perplexities.
    """

    request_type = REQUEST_TYPE

    def more(self) -> tuple[Any, ...]:
        base = self.config.metadata.get("base")
        if base is not None and (not isinstance(base, str) or not base):
            raise LLQError(f"base={base!r} in the metadata is no folder, Hub id or name of a model")
        return (base,)

    def process_results(self, doc: Any, results: Sequence[Any]) -> dict[str, Any]:
        divergence, seqlen = results[0]
        self.config.metadata["seqlen"] = seqlen
        return dict.fromkeys(FIGURES, divergence)

    def aggregation(self) -> dict[str, Callable[[Any], float]]:
        return {name: partial(_figure, name) for name in FIGURES}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name == "top1_agreement" for name in FIGURES}


def _figure(name: str, shards: Sequence[Divergence]) -> float:
    return Divergence.together(shards).summary()[name]


def windows_kl(lm: Any, requests: Sequence[Instance]) -> list[tuple[Divergence, int]]:
    """Serve requests of the type `llq_windows_kl` with an HFLM.

    Gives the divergence of each token, and the window length, for each shard. LLQError where the
    full-precision model is not known, or is of another kind.
    """

    def scorer(request: Instance) -> Callable[[Tensor], list[Divergence]]:
        reference = _reference(lm, request.args[4])
        return lambda batch_BS: _batch_divergence(lm, reference, batch_BS)

    return [
        (Divergence.together(parts), length)
        for parts, length in scored_shards(lm, requests, scorer)
    ]


@torch.no_grad()
def _batch_divergence(lm: Any, reference: Any, batch_BS: Tensor) -> list[Divergence]:
    """Of each window; one at a time is cast to float32."""
    batch_BS = batch_BS.to(lm.device)
    q_BSV = lm._model_call(batch_BS)
    p_BSV = q_BSV if reference is lm.model else reference(input_ids=batch_BS).logits
    return [Divergence.of(p_SV, q_SV) for p_SV, q_SV in zip(p_BSV, q_BSV, strict=True)]


def _reference(lm: Any, asked: str | None) -> Any:
    """The full-precision model; it stays with `lm` for the next task."""
    base = _base_of(lm) if asked is None else str(fetch(asked))
    if base == ITSELF:
        return lm.model
    loaded = getattr(lm, "_llq_reference", None)
    if loaded is None or loaded[0] != base:
        if "quantization_config" in read_config(Path(base)):
            raise LLQError(f"{base} is quantized itself; give the full-precision model as base=...")
        lm._llq_reference = None  # frees the last one first
        spread = len(set((getattr(lm.model, "hf_device_map", None) or {}).values())) > 1
        lm._llq_reference = loaded = (base, load_model(base, str(lm.device), spread))
    return loaded[1]


def _base_of(lm: Any) -> str:
    """The folder of the full-precision model of what `lm` scores, or ITSELF."""
    find = getattr(lm, "llq_base", None)
    base: str | None = None if find is None else find()
    if base is None:
        raise LLQError(
            "nothing says which full-precision model to compare with: give base=MODEL in "
            """model_args, or --metadata '{"base": "MODEL"}'"""
        )
    return base
