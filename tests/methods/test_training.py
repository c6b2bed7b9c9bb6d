"""What the trainings of several methods share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends import cuda

from llq_hf.engine.in_memory import quantize_model
from llq_hf.methods import build, spinquant, training
from llq_hf.methods.hybrid import costs
from llq_hf.methods.slim_llm import plus
from llq_hf.methods.training import settled_attention

FUSED = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)


def test_attention_is_settled_on_cuda_and_untouched_elsewhere():
    before = [enabled() for enabled in FUSED]
    with settled_attention(torch.device("cpu")):
        assert [enabled() for enabled in FUSED] == before
    with settled_attention(torch.device("cuda:0")):
        assert not any(enabled() for enabled in FUSED)
        assert cuda.math_sdp_enabled()
    assert [enabled() for enabled in FUSED] == before
    assert any(before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("omniquant", {"epochs": 1, "group_size": 32}),
        ("efficient_qat", {"epochs": 1, "group_size": 32}),
        ("slim_llm", {"plus": True, "epochs": 1, "group_size": 16}),
        ("db_llm", {"steps": 1}),
        ("spinquant", {"rotations": "learned", "learn_steps": 1}),
        ("hybrid", {"candidates": "rtn:2+rtn:4", "samples": 1, "measured": False}),
    ],
)
def test_every_backward_pass_of_a_run_is_inside(
    name: str,
    options: dict[str, Any],
    tiny_llama: Path,
    calibration_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
):
    from transformers import AutoModelForCausalLM

    inside = 0
    outside = []

    @contextmanager
    def counted(device: torch.device) -> Iterator[None]:
        nonlocal inside
        inside += 1
        yield
        inside -= 1

    for module in (training, plus, spinquant, costs):
        monkeypatch.setattr(module, "settled_attention", counted)
    attention = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        y = attention(*args, **kwargs)
        if y.requires_grad:
            seen.append(inside)
            outside.extend([] if inside else [name])
        return y

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    bits = 2 if name in ("slim_llm", "db_llm") else 3
    quantize_model(model, build(name, bits=bits, **options), calibration_ids[:2])
    assert seen
    assert not outside
