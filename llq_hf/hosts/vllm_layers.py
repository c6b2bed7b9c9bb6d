"""Packed linears inside of vLLM's layers.

A layer of vLLM holds one QuantLinear for each linear of the checkpoint that it fuses, whatever
their methods and widths are. Each multiplies by itself, with the kernels and transforms that it has
under transformers, and the outputs are concatenated. So weights stay packed in memory, by every
method. Under vLLM's tensor parallelism each process keeps its part.

A QuantLinear has no memory until a tensor of the right shape and dtype arrives: tensors that never
came are found by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)

from ..common.errors import LLQError
from ..common.spec import Spec
from ..layers.linear import QuantLinear, check_linears
from ..method import Method
from .vllm_config import ServedConfig
from .vllm_plan import Part, block_of, take_part

logger = init_logger("vllm.plugins.llq")  # vLLM shows the loggers below its own name

SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of fused layers; others are numbers


def layer_method(config: ServedConfig, layer: nn.Module, prefix: str) -> Any:
    """What `get_quant_method` returns for a layer."""
    if isinstance(layer, Attention):
        quantize_attention(config, layer, prefix)
        return None
    if not isinstance(layer, LinearBase):
        return None  # embeddings and heads
    names = config.known_plan().linears(prefix, config.packed_modules_mapping)
    return PackedLinearMethod(config, prefix, names) if names else UnquantizedLinearMethod()


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer of vLLM that consists of packed linears, `names`, inside of the decoder."""

    def __init__(self, config: ServedConfig, prefix: str, names: list[str]) -> None:
        self.config, self.prefix, self.names = config, prefix, names
        self.sizes: list[int] = []  # outputs of each linear in this process
        self.parts: list[Part] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its QuantLinears, and a parameter without elements for each name of a
        stored tensor, by which vLLM's loader finds us.
        """
        plan, ranks = self.config.known_plan(), layer.tp_size
        sizes = output_partition_sizes
        self.sizes = sizes if len(self.names) > 1 else [sum(sizes)]
        if len(self.sizes) != len(self.names):
            raise LLQError(
                f"vLLM's layer {self.prefix} has {len(sizes)} parts, but consists of"
                f" {', '.join(self.names)}: the plugin cannot serve this architecture"
            )
        methods = [plan.method(name) for name in self.names]
        if ranks > 1:
            self._check_divisible(methods, sizes)
        shapes = [plan.shapes[name] for name in self.names]
        self.parts = [
            Part.of(shape, (size, input_size_per_partition), layer.tp_rank, ranks)
            for shape, size in zip(shapes, self.sizes, strict=True)
        ]
        layer.llq = nn.ModuleList(
            QuantLinear(method, columns, rows, bias=False, device="meta")
            for method, (rows, columns) in zip(methods, shapes, strict=True)
        )
        stored = {key: spec.dtype for each in layer.llq for key, spec in each.layout.items()}
        for key, dtype in stored.items():
            asked: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            asked.weight_loader = partial(self._load, layer, key)
            layer.register_parameter(key, asked)
        self.config.served.update(self.names)

    def _check_divisible(self, methods: list[Method], sizes: list[int]) -> None:
        """LLQError where several processes cannot share this layer."""
        for method in methods:
            if not method.weight_only:
                raise LLQError(
                    f"{method.name} quantizes activations, each token on a grid for all of its"
                    " channels, which tensor parallelism would divide; serve it with"
                    " --tensor-parallel-size 1"
                )
        if len(sizes) > len(self.names):
            raise LLQError(
                f"{self.names[0]} is several layers in one, which tensor parallelism would divide;"
                " serve it with --tensor-parallel-size 1"
            )

    def _load(self, layer: Any, key: str, asked: Tensor, tensor: Tensor, shard: Any = None) -> None:
        """vLLM's `weight_loader` of the stored tensors `key`. LLQError for a tensor of a shape or
        dtype that the layout does not say.
        """
        index = SHARDS.get(shard, shard) if shard is not None or len(self.names) > 1 else 0
        if not isinstance(index, int) or not 0 <= index < len(self.names):
            raise LLQError(
                f"vLLM loads {key} into part {shard!r} of {self.prefix}, which consists of"
                f" {', '.join(self.names)}: the plugin cannot serve this architecture"
            )
        name, linear = f"{self.names[index]}.{key}", layer.llq[index]
        want, got = linear.layout.get(key), Spec(tuple(tensor.shape), tensor.dtype)
        if got != want:
            said = "no such tensor" if want is None else f"{list(want.shape)} {want.dtype}"
            raise LLQError(
                f"{name} is stored as {list(got.shape)} {got.dtype}, its quantization_config says"
                f" {said}: one of them was edited"
            )
        linear.put(key, tensor.detach().to(asked.device, copy=True))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check everything that was loaded, and keep this process's part of it."""
        self.config.check_served(all_blocks=get_pp_group().world_size == 1)
        for name, linear in zip(self.names, layer.llq, strict=True):
            missing = [key for key, tensor in linear.packed().items() if tensor.is_meta]
            if missing:
                raise LLQError(
                    f"the checkpoint lacks {name}.{missing[0]}; it is incomplete, or its"
                    " quantization_config was edited"
                )
            check_linears({name: linear})
        if layer.tp_size > 1:
            layer.llq = nn.ModuleList(
                take_part(linear, part, layer.params_dtype)
                for linear, part in zip(layer.llq, self.parts, strict=True)
            )
        self.config.finished.update(zip(self.names, layer.llq, strict=True))
        if len(self.config.finished) == len(self.config.served):
            report(self.config)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        biases: Sequence[Tensor | None] = [None] * len(self.sizes)
        if bias is not None:
            biases = torch.split(bias, self.sizes)
        outputs = [product(part, x, b) for part, b in zip(layer.llq, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def product(linear: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., O] of x [..., I], by a packed linear or by a part of one that is dense."""
    if isinstance(linear, QuantLinear):
        return linear.product(x, bias)
    assert isinstance(linear, nn.Linear)
    return nn.functional.linear(x, linear.weight, bias)


def report(config: ServedConfig) -> None:
    """Say in vLLM's log what is packed, in how much memory, and what is not."""
    packed = [each for each in config.finished.values() if isinstance(each, QuantLinear)]
    size = sum(tensor.nbytes for linear in packed for tensor in linear.packed().values())
    logger.info("%d linears are packed, in %.1f MiB", len(packed), size / 2**20)
    dense = len(config.finished) - len(packed)
    if dense:
        logger.warning(
            "%d linears are dense: under tensor parallelism their parts do not fall on whole blocks"
            " of %s's storage",
            dense,
            config.packed.method.name,
        )


# --- what attention reads -------------------------------------------------------------------------


def quantize_attention(config: ServedConfig, layer: nn.Module, prefix: str) -> None:
    """Make an attention layer of the decoder quantize its queries, keys and values, where the
    method does. vLLM asks for a layer twice; it is hooked once.
    """
    inside = config.known_plan().inside(prefix)
    attention = config.packed.method.attention
    if inside is None or attention is None or block_of(inside) in config.attentions:
        return
    config.attentions.add(block_of(inside))
    layer.register_forward_pre_hook(partial(_quantized, attention.transform))


def _quantized(
    transform: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    layer: Any,
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Forward pre-hook: vLLM's query, key and value [T, heads * head_dim], quantized before they
    go to the cache.
    """
    read, rest = args[:3], args[3:]
    query, key, value = (x.reshape(1, len(x), -1, layer.head_size).transpose(1, 2) for x in read)
    ready = transform(query, key, value)
    return *(x.transpose(1, 2).reshape(y.shape) for x, y in zip(ready, read, strict=True)), *rest
