"""A `quantization_config` type for each method, and one quantizer for all, registered with
transformers.

Loading a packed checkpoint builds QuantLinears on the meta device from config and layout; the
ordinary loader then fills them by name, without repacking. A config given for a dense model
quantizes the loaded model in place.

`_startup` imports this module when transformers imports its quantizers, which happens in the middle
of importing its models: no model class may be imported here. No other file knows
transformers.quantizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.dense import header
from ..checkpoints.format import CONFIG, HASHES, PREFIX, RUN_KEYS, PackedConfig
from ..checkpoints.hashes import check
from ..checkpoints.records import LinearRecord
from ..common.errors import LLQError
from ..common.progress import Progress
from ..data.calibration import Calibration, CalibrationOptions
from ..engine.in_memory import quantize_model
from ..engine.prepare import calibration_data
from ..engine.whole_model import resolve_method
from ..layers import kv_cache
from ..layers.attention import install
from ..layers.linear import QuantLinear, check_finite, check_linears
from ..method import Method, stored_bits
from ..methods import METHODS
from ..models.decoder import decoder_of, quantizable, replace_module
from ..models.load import build_skeleton, check_depth, module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LLQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Base of the `quantization_config` types. Use the one of a method: RTNConfig, GPTQConfig,
    QuIPConfig, ...

    Fields of the method (bits, group_size, ...) and `preset`. For dense models also the options of
    the calibration: `calibration` (a data set or a file), `calibration_samples`,
    `calibration_seqlen`, `calibration_seed` (defaults: `CalibrationOptions.for_model`), and
    `tokenizer` (default: the model's).
    """

    method_type: ClassVar[type[Method]]

    def __init__(self, preset: str = "study", tokenizer: Any = None, **options: Any) -> None:
        stored = {key: value for key, value in options.items() if _is_stored(key, value)}
        asked = {key: value for key, value in options.items() if key not in stored}
        self.calibration_options, fields = CalibrationOptions.split(asked)
        self.quant_method = PREFIX + self.method_type.name
        self.tokenizer = tokenizer
        self.packed = PackedConfig.of(self.method_type.build(preset, **fields), stored, fields)
        # Where this process quantizes: the calibration as drawn, and a record per linear.
        self.calibration: Calibration | None = None
        self.records: list[LinearRecord] = []

    @property
    def method(self) -> Method:
        return self.packed.method

    @property
    def quantized_linears(self) -> int | None:
        return self.packed.quantized_linears

    @property
    def calibration_used(self) -> dict[str, Any] | None:
        return self.packed.calibration

    @property
    def fingerprint(self) -> str | None:
        return self.packed.run

    def to_dict(self) -> dict[str, Any]:
        """JSON of what a checkpoint's config.json holds."""
        return self.packed.to_section()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _is_stored(key: str, value: Any) -> bool:
    """Whether an option is a key of a checkpoint's section, and no option of the method.

    In a checkpoint `calibration` is a mapping: what the calibration data were. For a dense model
    it is the name of what to calibrate on.
    """
    return key in RUN_KEYS and (key != "calibration" or isinstance(value, dict | None))


def _config_type(method: type[Method]) -> type[LLQConfig]:
    doc = (
        f"`quantization_config` of {method.title}: the fields of `{method.__name__}`, and those of"
        " LLQConfig."
    )
    return type(
        f"{method.__name__}Config",
        (LLQConfig,),
        {"method_type": method, "__doc__": doc, "__module__": __name__},
    )


CONFIGS: dict[str, type[LLQConfig]] = {
    name: _config_type(method) for name, method in METHODS.items()
}
# RTNConfig, GPTQConfig, ... as names of this module
globals().update({config.__name__: config for config in CONFIGS.values()})


class LLQQuantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer of every LLQConfig: it loads packed checkpoints, and quantizes dense models."""

    requires_calibration = False
    quantization_config: LLQConfig

    def __init__(self, quantization_config: LLQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checked: Path | None = None
        if self.pre_quantized:
            quantization_config.packed.check()

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the config, before a model is built from it: what an edited
        field does there is a failure somewhere inside of transformers, or no end of layers.
        """
        if self.pre_quantized:
            self._check(Path(str(getattr(config, "name_or_path", ""))))
            check_depth(config)
        return config

    def _check(self, folder: Path) -> None:
        """LLQError unless the folder is as it was written; it is looked at once."""
        if folder != self._checked and (folder / CONFIG).is_file():
            check(folder)
            if not (folder / HASHES).is_file():  # then nothing else tells of an edited field
                build_skeleton(folder)
            self._checked = folder

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        linears = quantizable(model)
        if len(linears) != config.quantized_linears:
            raise LLQError(
                f"the model has {len(linears)} linears in its blocks, the checkpoint"
                f" {config.quantized_linears}; restore its config.json"
            )
        for name, linear in linears.items():
            new = QuantLinear(
                config.method.for_linear(name),
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                "meta",
                linear.weight.dtype,
            )
            # transformers would draw random numbers for what stays on meta, because it is loaded
            # from disk when it is used; integers have none.
            flagged: Any = new
            flagged._is_hf_initialized = True
            replace_module(model, name, new)
        if config.method.attention is not None:
            install(decoder_of(model)[1], config.method.attention)
        files = [Path(file) for file in checkpoint_files or []]
        if files:
            self._check(files[0].parent)
        _check_files(model, files)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            self._quantize(model)
        else:
            _check_numbers(model)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.weight.requires_grad_(False)
        return model

    def _quantize(self, model: PreTrainedModel) -> None:
        """Quantize a dense model in place, and note in the config what was done."""
        config = self.quantization_config
        path = str(model.name_or_path)
        config.calibration = config.calibration_options.for_model(path)
        method = config.method.bound_to(model)
        data, used = calibration_data(
            config.calibration, method, model.config, Path(path), Progress(), config.tokenizer
        )
        method, learned = resolve_method(model, method, data)
        config.records = quantize_model(model, method, data, learned=learned)
        config.packed = PackedConfig(method, len(config.records), used)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """`model.dequantize()`: the dense model that computes the same."""
        if not self.quantization_config.method.weight_only:
            raise _not_weights_only(self.quantization_config.method)
        dequantize_linears(model, dtype or model.dtype)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # with adapters: the packed weights themselves are frozen

    @property
    def is_compileable(self) -> bool:
        return True  # `generate` then compiles decoding with a static cache on GPUs by itself


def _check_numbers(model: PreTrainedModel) -> None:
    """Raise LLQError where a number that was loaded cannot be: in the packed linears, and in all
    vectors (norms, biases). Large matrices outside the blocks are not read.
    """
    modules = model.named_modules()
    check_linears({name: each for name, each in modules if isinstance(each, QuantLinear)})
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    check_finite({name: p for name, p in vectors.items() if p.is_floating_point()})


def _check_files(model: PreTrainedModel, files: list[Path]) -> None:
    """Raise LLQError unless every tensor of every QuantLinear is in the files, with its shape and
    dtype, and everything else with its shape. This is checked before any is loaded.

    transformers itself would fill a missing buffer with whatever memory holds, and only warn.
    """
    found: dict[str, Any] = {}
    for file in files:
        found.update(header(file))
    if not found:
        return
    asked = {
        f"{name}.{key}": spec
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for key, spec in module.layout.items()
    }
    if not asked.keys() <= found.keys():  # names of the files may be older than the model's
        found = {name: found[stored] for name, stored in module_names(model, found).items()}
    for name, spec in asked.items():
        stored = found.get(name)
        if stored is None:
            raise LLQError(
                f"the checkpoint lacks {name}; it is incomplete, or its quantization_config was"
                " edited"
            )
        if stored != spec:
            raise LLQError(
                f"{name} is stored as {list(stored.shape)} {stored.dtype}, its"
                f" quantization_config says {list(spec.shape)} {spec.dtype}: one of them was edited"
            )
    # Of all else the sizes: transformers makes room for a tensor of another size before it refuses.
    for name, parameter in model.named_parameters():
        stored = found.get(name)
        if stored is not None and stored.shape != tuple(parameter.shape):
            raise LLQError(
                f"{name} is stored as {list(stored.shape)}, config.json says"
                f" {list(parameter.shape)}: one of them was edited"
            )


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a dense linear in the place of every packed one; LLQError where one does more than
    multiply with its weights.
    """
    packed = {n: each for n, each in model.named_modules() if isinstance(each, QuantLinear)}
    for linear in packed.values():
        if not linear.method.weight_only:
            raise _not_weights_only(linear.method)
    for name, linear in packed.items():
        dense = nn.Linear(linear.in_features, linear.out_features, False, device="meta")
        dense.weight = nn.Parameter(linear.dequantized().to(dtype), requires_grad=False)
        dense.bias = linear.bias
        replace_module(model, name, dense.train(linear.training))


def _not_weights_only(method: Method) -> LLQError:
    return LLQError(
        f"{method.name} quantizes activations while the model runs; a dense model would not"
    )


def count_quantized(model: nn.Module) -> int:
    """The number of packed linears in a model."""
    return sum(isinstance(module, QuantLinear) for module in model.modules())


def check_quantized(model: nn.Module) -> LLQConfig:
    """The model's LLQConfig; LLQError unless exactly the linears that it counts are packed, so that
    no other model is scored in its place.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, LLQConfig):
        raise LLQError(
            "the model carries no llq quantization_config: it would be scored in full precision"
        )
    packed = count_quantized(model)
    if packed != config.quantized_linears or packed == 0:
        raise LLQError(
            f"{packed} linears are packed, the checkpoint says {config.quantized_linears}: not the"
            " quantized model"
        )
    return config


def _register() -> None:
    for name, config in CONFIGS.items():
        if PREFIX + name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(PREFIX + name)(config)
            register_quantizer(PREFIX + name)(LLQQuantizer)


_register()


def described(model: nn.Module) -> dict[str, Any]:
    """What results say about the model that was really scored: method, options, bits, ..."""
    cache = kv_cache.described(model)
    cached = {} if cache is None else {"kv_cache": cache}
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, LLQConfig):
        return {"method": "none", **cached}
    attention = config.method.attention
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    bits = sum(
        stored_bits(linear.layout, linear.out_features, linear.in_features)
        * linear.in_features
        * linear.out_features
        for linear in linears
    )
    return {
        "method": config.method.name,
        "config": config.method.to_dict(),
        "nominal_bits": config.method.nominal_bits,
        "stored_bits": bits / weights,
        "quantized_linears": len(linears),
        "calibration": config.calibration_used,
        "fingerprint": config.fingerprint,
        **({} if attention is None else {"attention": attention.described}),
        **cached,
    }
