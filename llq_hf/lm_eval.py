"""`lm_eval --model llq`: quantize (once, cached), load the packed checkpoint, score it.

    lm_eval --model llq --model_args method=quip,bits=2 --tasks llq_wikitext2
    lm_eval --model llq --model_args pretrained=FOLDER --tasks llq_csqa          a packed checkpoint is just evaluated
    lm_eval --model llq --model_args pretrained=ADAPTER --tasks llq_csqa         an adapter, on the base it belongs to
    lm_eval --model llq --model_args method=none --tasks llq_study               the full-precision baseline

`_startup` registers the class; results carry method, options, nominal and stored bits, and the fingerprint.
"""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from .adapters.folder import base_of, is_adapter
from .checkpoint import fetch, read_json
from .data import Calibration
from .demo import calibration_for, resolve
from .errors import LLQError
from .hf import LLQConfig, check_quantized
from .linear import QuantLinear
from .method import Method, nearest, stored_bits
from .methods import METHODS, build, method_type
from .packed import finished_fingerprint
from .progress import RichProgress
from .quantize import Progress, RunOptions
from .run import execute, prepare

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B"


class LLQLM(HFLM):  # type: ignore[misc]
    """HFLM over a packed model. Options of the method by name, as in `llq methods`; an unknown one is refused."""

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        method: str | None = None,
        preset: str = "study",
        calibration: str | None = None,
        calibration_samples: int | None = None,
        calibration_seqlen: int | None = None,
        calibration_seed: int = 0,
        offload: str | None = None,
        cache_dir: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        own = set(inspect.signature(LLQLM).parameters) - {"options"}
        host = set(inspect.signature(HFLM).parameters) - {"kwargs"}
        fields = {name for each in METHODS.values() for name in each.field_names()}
        for name in options:
            if name not in host | fields:
                raise LLQError(f"unknown option {name!r} in model_args{nearest(name, own | host | fields)}")
        chosen = {name: options.pop(name) for name in list(options) if name in fields and name not in host}
        self.llq_method: Method | None = None
        pretrained = resolve(pretrained)
        if is_adapter(pretrained):
            options["peft"], pretrained = pretrained, base_of(pretrained)
        path = pretrained
        packed = _packed_config(pretrained, revision)
        if packed is not None:
            _agree(pretrained, packed, method, chosen)
        elif method is None:
            raise LLQError(
                f"{pretrained} is not quantized: give method=... (one of {', '.join(METHODS)}), "
                "or method=none for the full-precision baseline"
            )
        elif method != "none":
            self.llq_method = build(method, preset, **chosen)
            data = calibration_for(pretrained, calibration, calibration_samples, calibration_seqlen, calibration_seed)
            run = RunOptions(
                device=_device(options.get("device")),
                dtype=options.get("dtype") if isinstance(options.get("dtype"), str) else None,
                offload=Path(offload) if offload else None,
                revision=revision,
            )
            path = str(cached(pretrained, self.llq_method, data, run, Path(cache_dir) if cache_dir else None))
        elif chosen:
            raise LLQError(f"method=none takes no options, but {', '.join(chosen)} was given")
        options.setdefault("softmax_dtype", "float32")  # log-softmax in bf16 shifts perplexities
        self._quantized = packed is not None or self.llq_method is not None
        super().__init__(pretrained=path, revision=(None if path != pretrained else revision) or "main", **options)
        accelerator = getattr(self, "accelerator", None)  # HFLM takes ranks from it only where it sees several GPUs
        if accelerator is not None and accelerator.num_processes > 1 and self.world_size == 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._quantized:
            check_quantized(self.model)

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # lm-eval hands the checkpoint's own quantization_config back to from_pretrained, which warns about that.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            super()._create_model(*args, **kwargs)
        if peft is not None:  # lm-eval's own way first resizes the embeddings where the tokenizer has other tokens
            from peft import PeftModel

            self._model: Any = PeftModel.from_pretrained(self._model, peft)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results file, with what was really scored."""
        info: dict[str, Any] = super().get_model_info()
        config = getattr(self.model.config, "quantization_config", None)
        if not isinstance(config, LLQConfig):
            return {**info, "llq": {"method": "none"}}
        linears = [module for module in self.model.modules() if isinstance(module, QuantLinear)]
        weights = sum(linear.in_features * linear.out_features for linear in linears)
        bits = sum(
            stored_bits(linear.layout, linear.out_features, linear.in_features)
            * linear.in_features
            * linear.out_features
            for linear in linears
        )
        info["llq"] = {
            "method": config.method.name,
            "config": config.method.to_dict(),
            "nominal_bits": config.method.nominal_bits,
            "stored_bits": bits / weights,
            "quantized_linears": len(linears),
            "calibration": config.calibration_used,
            "fingerprint": config.fingerprint,
            "adapter": self.peft,
        }
        return info


def _packed_config(model: str, revision: str | None) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint of ours, else None; other people's quantized checkpoints are refused."""
    section = read_json(fetch(model, revision) / "config.json").get("quantization_config")
    if section is not None and not str(section.get("quant_method", "")).startswith("llq_"):
        raise LLQError(
            f"{model} was quantized by {section.get('quant_method')}, not by llq-hf; score it with --model hf"
        )
    return section


def _agree(model: str, packed: dict[str, Any], method: str | None, options: dict[str, Any]) -> None:
    """A packed checkpoint is scored as it is; options that say otherwise are an error, not a wish."""
    name = str(packed["quant_method"]).removeprefix("llq_")
    asked = {"method": method} if method is not None else {}
    for key, value in {**asked, **options}.items():
        stored = name if key == "method" else packed.get(key)
        if stored != value:
            raise LLQError(f"{model} is a packed checkpoint with {key}={stored!r}, but {key}={value!r} was asked for")
    method_type(name)


def _device(device: str | None) -> str:
    """lm-eval's default is cuda:0 wherever it runs; without a GPU that means the CPU."""
    wanted = device or "cuda"
    return "cpu" if wanted.startswith("cuda") and not torch.cuda.is_available() else wanted


def cache_root() -> Path:
    """Where quantized models are kept for the next evaluation: $LLQ_CACHE, else ~/.cache/llq."""
    return Path(os.environ.get("LLQ_CACHE") or Path.home() / ".cache" / "llq").expanduser()


def cached(model: str, method: Method, calibration: Calibration, run: RunOptions, root: Path | None = None) -> Path:
    """Folder of the packed checkpoint, from the cache or made now; keyed by everything that decides its bytes."""
    rank = int(os.environ.get("RANK", "0"))
    progress: Progress = RichProgress() if rank == 0 else Progress()
    try:
        plan = prepare(model, method, calibration, run, None, progress)
        out = (root or cache_root()) / plan.fingerprint
        if finished_fingerprint(out) != plan.fingerprint:
            execute(plan, out, progress)
        return out
    finally:
        progress.close()
