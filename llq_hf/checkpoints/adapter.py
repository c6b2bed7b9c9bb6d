"""Ties a LoRA adapter to the base that it was trained on.

The folder of an adapter holds:
    adapter_config.json, adapter_model.safetensors   what any LoRA loader reads
    llq_adapter.json                                 fingerprint of the base, training options,
                                                     loss, sha256 of the weights
    base/                                            the packed base, if the run made it; else
                                                     adapter_config.json names it

An adapter is only valid on the base it was trained on, and peft does not check this. `check_base`
does. `_startup` calls it before peft loads an adapter, so that `PeftModel.from_pretrained` refuses
another base too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.errors import LLQError
from ..common.files import read_json, sha256_file
from ..layers.linear import QuantLinear

NOTE = "llq_adapter.json"
ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base"


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / ADAPTER).is_file()


def is_whole(folder: Path, note: dict[str, Any]) -> bool:
    """Whether the weights of a finished adapter are as its note says; older notes say nothing."""
    wanted, file = note.get("weights_sha256"), folder / WEIGHTS
    return file.is_file() and wanted in (None, sha256_file(file))


def base_of(folder: str) -> str:
    """Folder or Hub id of an adapter's base.

    The `base` inside the folder is preferred to the path in its config, so that the folder can be
    moved. LLQError where there is neither.
    """
    own = Path(folder) / BASE
    if own.is_dir():
        return str(own)
    named = read_json(Path(folder) / ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise LLQError(
            f"{Path(folder) / ADAPTER} names no base model (base_model_name_or_path); "
            "put its path there"
        )
    return named


def identity_of(model: nn.Module) -> dict[str, Any]:
    """What identifies a packed base: the fingerprint of its run, and the sha256 of its bytes.

    The fingerprint is None for a model that was quantized in memory.
    """
    return {"fingerprint": _fingerprint(model), "sha256": packed_sha256(model)}


def check_base(model: nn.Module, folder: str) -> None:
    """LLQError unless `model` is the base of the adapter in `folder`.

    Adapters that llq-hf did not train are not checked.
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
            f"{folder} was trained on another base: its fingerprint is "
            f"{_or_unknown(trained['fingerprint'])}, this model's {_or_unknown(found)}, "
            f"and their packed weights differ. Load it on {base_of(folder)}"
        )


def packed_sha256(model: nn.Module) -> str:
    """The sha256 of everything that the quantized linears store.

    It depends on their order, but not on their names, so that a wrapped model has the same.
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


def _or_unknown(fingerprint: str | None) -> str:
    return fingerprint or "not known"
