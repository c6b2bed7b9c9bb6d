"""A vLLM that is not there: the classes that the plugin builds on, and an engine that loads a
checkpoint as vLLM 0.32 does, fused and part by part.

    with pretended() as vllm:
        engine = vllm.Engine(folder)
        engine.layers["model.layers.0.self_attn.qkv_proj"](x)

Only what the plugin meets is here, in the order and with the arguments of the real engine
(tests/bench/vllm_serves.py runs that one).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

OURS = ("vllm_config", "vllm_layers")  # our modules that import vLLM
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *sizes: Any, **rest: Any) -> None: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None: ...


class LinearBase(nn.Module):
    """A layer of vLLM; `sizes` are the outputs of what it fuses, in all processes together."""

    def __init__(
        self,
        config: Any,
        prefix: str,
        columns: int,
        sizes: list[int],
        bias: bool = False,
        *,
        rank: int = 0,
        ranks: int = 1,
        by_rows: bool = True,
        parts: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.params_dtype = rank, ranks, torch.float32
        self.quant_method = config.get_quant_method(self, prefix)
        mine = parts or [size // ranks if by_rows else size for size in sizes]
        self.quant_method.create_weights(
            self,
            columns if by_rows else columns // ranks,
            mine,
            columns,
            sum(sizes),
            torch.float32,
            weight_loader=None,
        )
        self.bias = nn.Parameter(torch.zeros(sum(mine)), requires_grad=False) if bias else None
        self.mine = mine

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)

    def load(self, key: str, tensor: Tensor, shard: str | int | None) -> None:
        if key == "bias":
            at = {None: 0, "q": 0, "k": 1, "v": 2}.get(shard, shard)
            self.bias.data.split(self.mine)[at].copy_(tensor)
            return
        parameter = dict(self.named_parameters(recurse=False))[key]
        loader = parameter.weight_loader
        loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)


class Attention(nn.Module):
    """It returns what would go to the cache and to the product."""

    def __init__(self, config: Any, prefix: str, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        for _ in range(2):  # once to build it, once when weights are loaded
            assert config.get_quant_method(self, prefix) is None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value


class Engine:
    """A model whose packed layers are built, loaded and checked; `fused` is what vLLM says that its
    layers consist of. drop: layers that it builds without asking the plugin. edit: changes the
    tensors of the files before they arrive.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fused: dict[str, list[str]] = FUSED,
        drop: str = "nothing",
        attentions: bool = True,
        rank: int = 0,
        ranks: int = 1,
        edit: Any = lambda tensors: None,
    ) -> None:
        section = json.loads((folder / "config.json").read_text())["quantization_config"]
        table = sys.modules["vllm.model_executor.layers.quantization"].table
        self.config = table[section["quant_method"]].from_config(section)
        sizes = AutoConfig.from_pretrained(folder)
        self.config.maybe_update_config(str(folder), hf_config=sizes, revision=None)
        self.config.packed_modules_mapping.update(fused)
        self.layers: dict[str, LinearBase] = {}
        self.attentions: dict[str, Attention] = {}
        head = sizes.hidden_size // sizes.num_attention_heads
        keys, hidden, ffn = (
            sizes.num_key_value_heads * head,
            sizes.hidden_size,
            sizes.intermediate_size,
        )
        share = {"rank": rank, "ranks": ranks}
        biased = [getattr(sizes, f"{part}_bias", False) for part in ("attention", "mlp")]
        for number in range(sizes.num_hidden_layers):
            block = f"model.layers.{number}"
            built = {
                "self_attn.qkv_proj": (hidden, [hidden, keys, keys], biased[0], True),
                "self_attn.o_proj": (hidden, [hidden], biased[0], False),
                "mlp.gate_up_proj": (hidden, [ffn, ffn], biased[1], True),
                "mlp.down_proj": (ffn, [hidden], biased[1], False),
            }
            for name, (columns, outputs, bias, by_rows) in built.items():
                if drop not in f"{block}.{name}":
                    self.layers[f"{block}.{name}"] = LinearBase(
                        self.config,
                        f"{block}.{name}",
                        columns,
                        outputs,
                        bias,
                        by_rows=by_rows,
                        **share,
                    )
            if attentions:
                name = f"{block}.self_attn.attn"
                self.attentions[name] = Attention(self.config, name, head)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        self.load(tensors)
        for layer in self.layers.values():
            layer.quant_method.process_weights_after_loading(layer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """vLLM renames "q_proj" to "qkv_proj" by a table of the model's, whatever `fused` is."""
        shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
        for name, tensor in tensors.items():
            module, _, key = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            whole = next((w for w, names in FUSED.items() if last in names), last)
            layer = self.layers.get(f"{parent}.{whole}")
            if layer is not None:
                layer.load(key, tensor, shards.get(last))


def modules() -> dict[str, ModuleType]:
    """vLLM's modules by name, as far as the plugin imports them."""
    table: dict[str, Any] = {}
    known: list[str] = ["awq", "gptq"]

    def register(name: str) -> Any:
        known.append(name)
        return lambda config: table.setdefault(name, config)

    lines: list[str] = []

    def say(text: str, *values: Any) -> None:
        lines.append(text % values)

    logger = SimpleNamespace(info=say, warning=say)
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"Engine": Engine, "lines": lines},
        "vllm.distributed": {"get_pp_group": lambda: SimpleNamespace(world_size=1)},
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.attention": {"Attention": Attention},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {
            "QUANTIZATION_METHODS": known,
            "register_quantization_config": register,
            "table": table,
        },
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        module.__dict__.update(contents[name])
    return made


@contextmanager
def pretended() -> Iterator[Any]:
    """Inside, `import vllm` gives this vLLM, and the plugin is registered."""
    made = modules()
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        from llq_hf.hosts.vllm_plugin import register

        register()
        yield made["vllm"]
    finally:
        for name in (*made, *(f"llq_hf.hosts.{ours}" for ours in OURS)):
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module is not None})
