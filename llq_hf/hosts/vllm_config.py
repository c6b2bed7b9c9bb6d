"""vLLM's view of a packed checkpoint's `quantization_config`: which of its layers are packed.

All methods share one class. vLLM makes an object of it from config.json, sends it to its worker
processes, and asks it for each layer how to load and multiply. `vllm_plugin` imports this file; it
imports of vLLM only the base class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..checkpoints.format import PREFIX, PackedConfig
from ..common.errors import LLQError
from .vllm_plan import Plan, block_of, check_folder


class ServedConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM has asked for so far stands in `served` (packed linears, by their names inside of
    the decoder) and `attentions`; `finished` are the packed linears that are ready to run.
    """

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed
        self.plan: Plan | None = None
        self.served: set[str] = set()
        self.attentions: set[str] = set()
        self.finished: dict[str, nn.Linear] = {}

    def get_name(self) -> str:
        return PREFIX + self.packed.method.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where no kernel of ours serves, torch decodes

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        """LLQError for a section that no finished checkpoint has, or that was edited."""
        packed = PackedConfig.from_section(config)
        packed.check()
        return cls(packed)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called once, before any layer is built: whatever is wrong with config.json shows here."""
        check_folder(Path(model_name))
        self.plan = Plan.of(self.packed, hf_config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM's layer of this name is loaded and multiplied; None: as an unquantized one."""
        from .vllm_layers import layer_method

        return layer_method(self, layer, prefix)

    def known_plan(self) -> Plan:
        if self.plan is None:
            raise LLQError(
                "this vLLM does not tell its plugins of the model's config"
                " (QuantizationConfig.maybe_update_config); update vLLM"
            )
        return self.plan

    def check_served(self, all_blocks: bool) -> None:
        """LLQError unless vLLM has asked for every packed linear, and for the attention of every
        block whose keys and values are quantized: what it builds without asking would run on
        random numbers, or in full precision.

        all_blocks: False where other processes hold blocks of their own.
        """
        plan = self.known_plan()
        here = {block_of(name) for name in (plan.shapes if all_blocks else self.served)}
        expected = {name for name in plan.shapes if block_of(name) in here}
        missing = sorted(expected - self.served)
        if missing:
            raise LLQError(
                f"vLLM serves {len(expected) - len(missing)} of {len(expected)} packed linears;"
                f" {missing[0]} is not among them: the plugin cannot serve this architecture"
            )
        unknown = sorted(here - self.attentions)
        if unknown and self.packed.method.attention is not None:
            raise LLQError(
                f"{self.packed.method.name} quantizes what attention reads, and vLLM's attention of"
                f" {unknown[0]} is of a kind that the plugin does not know; it"
                " would stay in full precision"
            )
