"""Loads the model of a folder or Hub id, whatever it is: packed, dense, or an adapter."""

from __future__ import annotations

from torch import nn

from ..checkpoints.adapter import base_of, is_adapter
from ..models.load import auto_class


def load_model(path: str, device: str, parallelize: bool = False, dtype: str = "auto") -> nn.Module:
    """The model on `device`, in eval mode. parallelize: over all GPUs there are."""
    from transformers import AutoConfig

    config_of = base_of(path) if is_adapter(path) else path
    kind = auto_class(AutoConfig.from_pretrained(config_of, trust_remote_code=False))
    if parallelize:
        spread: nn.Module = kind.from_pretrained(path, dtype=dtype, device_map="auto")
        return spread.eval()
    model: nn.Module = kind.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()
