"""The entry point `vllm.general_plugins`: it makes every `quant_method` of ours known to vLLM.

vLLM calls `register` in each of its processes, perhaps more than once, before it reads a model's
config. `vllm serve user/checkpoint` then needs no flag. Only this call imports vLLM, and only what
vLLM itself has imported by then.
"""

from __future__ import annotations

import os

from ..checkpoints.format import PREFIX
from ..methods import METHODS


def register() -> None:
    """Add our quantization configs to vLLM's table, once. LLQ_DISABLE=1 switches it off."""
    if os.environ.get("LLQ_DISABLE", "") not in ("", "0"):
        return
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from .vllm_config import ServedConfig

    for name in METHODS:
        if PREFIX + name not in QUANTIZATION_METHODS:
            register_quantization_config(PREFIX + name)(ServedConfig)
