"""The folder of an adapter: pure peft, and beside it a note of the base that it was trained on.

adapter_config.json, adapter_model.safetensors   as any LoRA loader reads them
llq_adapter.json                                 fingerprint of the base, how it was trained, the loss curve
base/                                            the packed base, where the run made it (else the config names it)

An adapter says nothing on another base, and nothing in peft would notice. `check_base` does:
`_startup` puts it in front of peft's loading, so that plain `PeftModel.from_pretrained` refuses
too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.errors import LLQError
from ..common.files import read_json
from ..layers.linear import QuantLinear

NOTE, ADAPTER, BASE = "llq_adapter.json", "adapter_config.json", "base"


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def base_of(folder: str) -> str:
    """Folder or Hub id of the base of an adapter; its own `base` goes first, so that the folder may
    be moved.
    """
    own = Path(folder) / BASE
    if own.is_dir():
        return str(own)
    named = read_json(Path(folder) / ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise LLQError(
            f"{Path(folder) / ADAPTER} names no base model (base_model_name_or_path); put its path there"
        )
    return named


def identity_of(model: nn.Module) -> dict[str, Any]:
    """What tells a packed base from others: the fingerprint of its run (None if quantized in
    memory), and its bytes.
    """
    return {"fingerprint": _fingerprint(model), "sha256": packed_sha256(model)}


def check_base(model: nn.Module, folder: str) -> None:
    """LLQError unless `model` is the base of the adapter in `folder`; silent for adapters that are
    not ours.
    """
    note = Path(folder) / NOTE
    if not note.is_file():
        return
    trained = read_json(note)["base"]
    found = _fingerprint(model)
    if found is not None and found == trained["fingerprint"]:
        return
    if packed_sha256(model) != trained["sha256"]:
        raise LLQError(
            f"{folder} was trained on another base: its fingerprint is {_shown(trained['fingerprint'])}, this model's "
            f"{_shown(found)}, and their packed weights differ. Load it on {base_of(folder)}"
        )


def packed_sha256(model: nn.Module) -> str:
    """Digest of everything that the quantized linears store, in order, wherever they sit in the
    model.
    """
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            for tensor in module.packed().values():
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fingerprint(model: nn.Module) -> str | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "fingerprint", None)


def _shown(fingerprint: str | None) -> str:
    return fingerprint or "not known"
