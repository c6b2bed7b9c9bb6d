"""model_args: the options of `--model llq`, alike in lm-eval and lmms-eval, and the checkpoint that
they stand for.

A packed checkpoint is scored as it is, if every tensor is as it was written: that is verified once,
and remembered until a file changes. A dense one is first quantized by `method` and kept in the
cache under the fingerprint of everything that decides its bytes; `method=none` is the
full-precision baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..checkpoints.dense import fetch, read_config
from ..checkpoints.format import PackedConfig
from ..checkpoints.hashes import damage_once, refuse
from ..common.errors import LLQError
from ..common.machine import usable_device
from ..common.words import nearest
from ..data.calibration import CalibrationOptions
from ..demo import resolve
from ..engine.cached import cached
from ..engine.options import RunOptions
from ..methods import METHODS, build

NONE = "none"  # the method that leaves the model as it is


class Loadable(NamedTuple):
    """What from_pretrained is to load."""

    path: str  # folder or Hub id
    revision: str
    quantized: bool  # whether it must turn out to be a packed checkpoint
    base: str | None = None  # the dense model that it is or was made from, if that was given


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The model_args that are ours and not the harness's. `llq methods` lists those of methods."""

    pretrained: str
    base: str | None = None  # the full-precision model that `llq_kl` compares with
    method: str | None = None
    preset: str = "study"
    kv_cache_bits: int | None = None  # of a packed cache of keys and values, in generation
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    offload: str | None = None
    cache_dir: str | None = None
    revision: str | None = None
    method_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def split(
        cls, options: dict[str, Any], default: str, host: set[str]
    ) -> tuple[Self, dict[str, Any]]:
        """Split model_args into (ours, the harness's); LLQError for one that nobody knows.

        default: the model to score where `pretrained` is not given. host: names of the harness's
        own options.
        """
        ours = {each.name for each in fields(cls)} - {"method_options"}
        ours |= set(CalibrationOptions.option_names())
        of_methods = {name for each in METHODS.values() for name in each.field_names()}
        of_methods -= host | ours
        known = sorted(ours | host | of_methods)
        for name in options:
            if name not in known:
                raise LLQError(f"unknown option {name!r} in model_args{nearest(name, known)}")
        own = {name: value for name, value in options.items() if name in ours}
        chosen = {name: value for name, value in options.items() if name in of_methods}
        rest = {name: value for name, value in options.items() if name in host - ours}
        if own.get("method", "") is None:  # so lm-eval reads `none` in a string of model_args
            own["method"] = NONE
        calibration, own = CalibrationOptions.split({"pretrained": default, **own})
        return cls(**own, calibration=calibration, method_options=chosen), rest

    def loadable(self, device: str | None, dtype: Any) -> Loadable:
        """The checkpoint to load, made first where `method` asks for that. device, dtype: the
        harness's.
        """
        model = resolve(self.pretrained)
        packed = _packed_config(model, self.revision)
        if packed is not None:
            _agree(model, packed, self.method, self.method_options)
            folder = fetch(model, self.revision)
            refuse(folder, damage_once(folder))
        elif self.method is None:
            raise LLQError(
                f"{model} is not quantized: give method=... (one of {', '.join(METHODS)}), "
                "or method=none for the full-precision baseline"
            )
        elif self.method == NONE:
            if self.method_options:
                given = ", ".join(self.method_options)
                raise LLQError(f"method=none takes no options, but {given} was given")
        else:
            return Loadable(str(self._quantized(model, device, dtype)), "main", True, model)
        own = model if packed is None else None
        return Loadable(model, self.revision or "main", packed is not None, own)

    def _quantized(self, model: str, device: str | None, dtype: Any) -> Path:
        assert self.method is not None
        method = build(self.method, self.preset, **self.method_options)
        data = self.calibration.for_model(model)
        run = RunOptions(
            device=usable_device(device),
            dtype=dtype if isinstance(dtype, str) else None,
            offload=Path(self.offload) if self.offload else None,
            revision=self.revision,
        )
        return cached(model, method, data, run, Path(self.cache_dir) if self.cache_dir else None)


def _packed_config(model: str, revision: str | None) -> PackedConfig | None:
    """What a packed checkpoint says about its weights; None for a dense model.

    LLQError for a checkpoint that another tool quantized.
    """
    section = read_config(fetch(model, revision)).get("quantization_config")
    if section is None:
        return None
    if not PackedConfig.is_ours(section):
        other = section.get("quant_method")
        raise LLQError(f"{model} was quantized by {other}, not by llq-hf; score it with --model hf")
    return PackedConfig.from_section(section)


def _agree(model: str, packed: PackedConfig, method: str | None, options: dict[str, Any]) -> None:
    """Raise LLQError where options contradict the packed checkpoint, which is scored as it is."""
    stored = {"method": packed.method.name, **packed.method.to_dict()}
    asked = {"method": method} if method is not None else {}
    for key, value in {**asked, **options}.items():
        if stored.get(key) != value:
            raise LLQError(
                f"{model} is a packed checkpoint with {key}={stored.get(key)!r}, but"
                f" {key}={value!r} was asked for; leave that option out, or give the dense model"
            )
