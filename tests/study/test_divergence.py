"""KL divergence against a literal loop over tokens."""

import math
from pathlib import Path

import pytest
import torch

from llq_hf.hosts.loading import load_model
from llq_hf.numerics import divergence as tokens
from llq_hf.study import divergence


def test_it_is_the_literal_mean_over_tokens(
    tiny_llama: Path,
    tiny_llama_tied: Path,
    calibration_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "TOKENS", 5)  # no divisor of the windows' length
    model, reference = (load_model(str(path), "cpu") for path in (tiny_llama, tiny_llama_tied))
    ids_NS = calibration_ids[:3]
    found = divergence.measure_divergence(model, reference, ids_NS)
    with torch.inference_mode():
        q_NSV = model(input_ids=ids_NS).logits.double().softmax(-1).tolist()
        p_NSV = reference(input_ids=ids_NS).logits.double().softmax(-1).tolist()
    kl = nats = 0.0
    for n, ids in enumerate(ids_NS.tolist()):
        for s in range(len(ids)):
            kl += sum(p * math.log(p / q) for p, q in zip(p_NSV[n][s], q_NSV[n][s], strict=True))
            nats -= math.log(q_NSV[n][s][ids[s + 1]]) if s + 1 < len(ids) else 0
    assert found["kl"] == pytest.approx(kl / ids_NS.numel(), rel=1e-5)
    perplexity = math.exp(nats / (ids_NS.numel() - len(ids_NS)))
    assert found["token_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    same = divergence.measure_divergence(reference, reference, ids_NS)
    assert same["kl"] == pytest.approx(0, abs=1e-6)
