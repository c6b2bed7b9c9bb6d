"""llq-hf: low-bit LLaMA models for real. Imported at every interpreter start, so it imports
nothing; names come lazily.

Public: QuantizedLlama, QuantizedLlavaNext, build (a method by name), quantize_checkpoint,
quantize_model, Calibration, LLQError, and one configuration type per method (RTNConfig, GPTQConfig,
QuIPConfig, ...) for `from_pretrained(quantization_config=...)`.
"""

_WHERE = {
    "Calibration": "data.calibration",
    "LLQError": "common.errors",
    "QuantizedLlama": "hosts.hf_models",
    "QuantizedLlavaNext": "hosts.hf_models",
    "build": "methods",
    "quantize_checkpoint": "engine.execute",
    "quantize_model": "engine.in_memory",
}


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    from importlib import import_module

    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name.endswith("Config") and not name.startswith("_"):
        configs = {
            config.__name__: config
            for config in import_module(f"{__name__}.hosts.hf_quantizer").CONFIGS.values()
        }
        if name in configs:
            return configs[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
