"""Checks of options: every one names the option, its value and what would be right."""

from __future__ import annotations

import math

import pytest

from llq_hf.common.errors import LLQError
from llq_hf.methods import build

WRONG = [
    ("gptq", {"damp": 1.5}, "gptq: damp=1.5 must lie in 0..1, a share of the Hessian's mean"),
    ("gptq", {"aim": 1.5}, "gptq: aim=1.5 must lie in 0..1, the share of the way to"),
    ("slim_llm", {"aim": 0.5, "gptaq": 0.5}, "gptaq and aim are two ways to the same outputs"),
    ("gptq", {"gptaq": -0.1}, "gptq: gptaq=-0.1 must lie in 0..1, the share of GPTAQ's"),
    ("billm", {"refine": 101}, "billm: refine=101 must lie in 0..100 rounds"),
    ("omniquant", {"alpha": math.nan}, "omniquant: alpha=nan must lie in 0..1"),
    ("efficient_qat", {"batch": 0}, "efficient_qat: batch=0 must be a number of at least 1"),
    ("efficient_qat", {"grid_lr": math.inf}, "grid_lr=inf must be a number of at least 0"),
    ("spinquant", {"learn_rate": 0.0}, "spinquant: learn_rate=0.0 must be positive"),
    ("awq", {"gqa": "tied"}, "awq: gqa='tied' must be one of skip, tie, free"),
    ("pb_llm", {"group_size": 0}, r"pb_llm: group_size=0 must be -1 \(one group\) or at least 1"),
    ("db_llm", {"scale_bits": 8}, r"db_llm: scale_bits=8 must be 16 \(stored as fp16\) or 32"),
]


@pytest.mark.parametrize(("method", "options", "words"), WRONG)
def test_the_error_names_the_value_and_the_cure(method: str, options: dict, words: str):
    with pytest.raises(LLQError, match=words):
        build(method, **options)
