"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438), after mit-han-lab/smoothquant at c61476d.

Idea
    Weights and activations are both quantized to `bits` bits, so that products are of integers.
    Some channels of activations are a hundred times larger than others, which one grid per token
    cannot represent; weights have no such channels. So a part of the range moves from activations
    to weights.

Steps of `quantize_block`
    1. Smooth: where several linears read the output of a norm (q/k/v, gate/up), channel j is
       divided by s_j = max|x_j|**alpha / max|W_:j|**(1 - alpha), and column j of their weights is
       multiplied by it.
    2. Round: weights are rounded to nearest per row, to q in +-(2**(bits-1) - 1) with step max|w|
       / (2**(bits-1) - 1).

    At run time every token of the input gets a step of the same form (`a_bits` bits).
    `quantize_bmm_input` also quantizes the outputs of the q, k and v projections, before the rotary
    embedding.

    y = (codes_x codes_W^T) * step_x * step_W is computed in int8 on CPUs with VNNI (by our kernels,
    else by `torch._int_mm`) and on CUDA, and elsewhere in fp32. Weights are decoded for each
    product, whole or tile by tile. Where the input requires a gradient, it passes straight through
    the rounding.

Storage
    name      shape               dtype   bits per weight
    weight    [O, I * bits / 32]  int32   bits: q + 2**(bits-1)
    scale     [O, 1]              fp16    16 / I (fp32, twice that, with scale_bits=32)
    in_scale  [I]                 fp16    16 / O, likewise: s, or ones (absent without `smooth`)

Defaults
    alpha 0.85 is the authors' value for LLaMA-3. Quantized q, k and v are those of their perplexity
    script. Their 6.26 with both is the study's 6.3 at 8 bits. Their code has no 6 and 4 bits; for
    those, all widths change together.

Departures
    Scales are rounded to what is stored before codes are chosen. s is stored beside each linear
    instead of being folded into the norm, and computed in fp32 (theirs in the model's dtype). A
    channel that never fired has s = 1 (theirs 1e-5, which inflates the channel if it fires later).
    A linear that alone reads a norm, such as a fused qkv_proj, is not smoothed: that an input comes
    from a norm is concluded from its having several readers. Only q_proj, k_proj and v_proj count
    as inputs of products of activations; a model that has none is refused with
    `quantize_bmm_input`.

Presets
    "best" is `search_range`, which shrinks each row's range to where sum |error|**2.4 is least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import divided, integer_product, once, product, product_of_codes
from ..kernels.bitpack import unpack
from ..method import Flow, Method, Packed, Step
from ..models.decoder import quantizable
from ..numerics.activations import TokenQuant
from ..numerics.grids import Grid, Uniform
from ..numerics.stats import AbsMax, Stat
from .options import check_range
from .uniform import OnUniformGrid

BMM_INPUTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(OnUniformGrid):
    """a_bits: of activations; 0 means `bits`, 16 not quantized. alpha: how much of the range moves
    into the weights, 0..1.
    """

    name: ClassVar[str] = "smoothquant"
    title: ClassVar[str] = "SmoothQuant (Xiao et al. 2023)"
    bits_range: ClassVar[range] = range(2, 9)
    observes: ClassVar[type[Stat] | None] = AbsMax
    best: ClassVar[dict[str, Any]] = {"search_range": True}

    bits: int = 8
    a_bits: int = 0
    alpha: float = 0.85
    smooth: bool = True
    quantize_bmm_input: bool = True
    search_range: bool = False
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid, self.tokens  # validate scale_bits and a_bits
        check_range(self, "alpha", 0, 1)

    @cached_property
    def grid(self) -> Uniform:
        """How codes are stored; with `search_range`, also the grid they are found on."""
        return Uniform(self.bits, sym=True, search=self.search_range, scale_bits=self.scale_bits)

    @property
    def tokens(self) -> TokenQuant:
        """How activations are quantized."""
        return TokenQuant(self.a_bits or self.bits)

    @property
    def weight_only(self) -> bool:
        return not self.tokens.on

    @property
    def flow(self) -> Flow:
        return Flow.DENSE

    def bound_to(self, model: nn.Module) -> Self:
        last = {name.rpartition(".")[2] for name in quantizable(model)}
        if self.quantize_bmm_input and not last.intersection(BMM_INPUTS):
            raise LLQError(
                f"{type(model).__name__} has no {', '.join(BMM_INPUTS)} whose outputs could be "
                "quantized: its attention would stay 16 bits; give quantize_bmm_input=false"
            )
        return self

    def for_linear(self, name: str) -> Method:
        quantized = self.quantize_bmm_input and name.rpartition(".")[2] in BMM_INPUTS
        return BmmInput(**self.to_dict()) if quantized else self

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = super().layout(out_features, in_features)
        if self.smooth:
            layout["in_scale"] = Spec((in_features,), self.grid.scale_dtype)
        return layout

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        packed = {}
        for group in step.groups:
            weights = {name: step.linears[name].weight.detach().float() for name in group}
            stat = step.stats[group[0]]
            assert isinstance(stat, AbsMax)
            # 1. smooth
            smoothed = self.smooth and len(group) > 1
            s_I = torch.ones_like(stat.max_I)
            if smoothed:
                s_I = self._smoothing(stat.max_I, list(weights.values()))
            # 2. round
            for name, weight_OI in weights.items():
                job = step.job(name)
                job.notes["smoothed"] = smoothed
                job.notes["bmm_input"] = isinstance(self.for_linear(job.name), BmmInput)
                packed[name] = self._rounded(weight_OI * s_I)
                if self.smooth:
                    packed[name]["in_scale"] = s_I.to(self.grid.scale_dtype)
        return packed

    def _smoothing(self, max_I: Tensor, weights: list[Tensor]) -> Tensor:
        """s [I], rounded to what is stored."""
        top_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0)
        top_I = top_I.clamp_min(1e-5)
        s_I = (max_I.pow(self.alpha) / top_I.pow(1 - self.alpha)).clamp(1e-5, 6e4)
        return torch.where(max_I > 0, s_I, 1.0).to(self.grid.scale_dtype).float()

    def _rounded(self, W_OI: Tensor) -> Packed:
        if self.search_range:
            grid = self.grid.grids(W_OI)
        else:
            scale = self.grid.stored(W_OI.abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 1))
            grid = Grid(scale, torch.full_like(scale, float(2 ** (self.bits - 1))))
        return self.grid.pack(grid.codes(W_OI, self.bits), grid)

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        return weight_OI / packed["in_scale"].float() if self.smooth else weight_OI

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if self._integers(x, out_features):
            return self._integer_product(x, packed, bias)
        if not self.tokens.on:
            z = divided(x, packed, "in_scale") if self.smooth else x
            return super().linear(z, packed, bias, out_features)
        # in fp32, whatever the model's dtype
        z = x / packed["in_scale"].float() if self.smooth else x
        y = product(self.tokens(z.float()), None, lambda: self.grid.unpack(packed, z.shape[-1]))
        return (y if bias is None else y + bias).to(x.dtype)

    def _integers(self, x: Tensor, out_features: int) -> bool:
        """Whether the product can be computed in int8."""
        if (
            not self.tokens.on
            or self.tokens.bits > 8
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
        if x.is_cuda:
            return x.shape[-1] % 8 == 0 and out_features % 8 == 0
        return x.device.type == "cpu" and _cpu_has_int8()

    def _integer_product(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        in_features = x.shape[-1]
        stored = once(packed, lambda: self.grid.readable(packed, in_features))
        s_I = packed["in_scale"] if self.smooth else None
        codes_TI, step_T1 = self.tokens.codes(x.reshape(-1, in_features), s_I)
        y_TO = product_of_codes(codes_TI, stored, step_T1, bias, x.dtype)
        if y_TO is None:
            y_TO = self._by_torch(codes_TI, packed) * step_T1
            y_TO = (y_TO if bias is None else y_TO + bias).to(x.dtype)
        return y_TO.view(*x.shape[:-1], stored.rows)

    def _by_torch(self, codes_TI: Tensor, packed: Packed) -> Tensor:
        """fp32 y [T, O] of a step of 1."""
        codes_OI = unpack(packed["weight"], self.bits, codes_TI.shape[1])
        signed_OI = codes_OI.sub_(2 ** (self.bits - 1)).view(torch.int8)  # uint8 wraps around
        return integer_product(codes_TI, signed_OI) * packed["scale"].float().T


class BmmInput(SmoothQuant):
    """SmoothQuant of a linear whose output enters a product of two activations, and so is quantized
    per token, too.
    """

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return self.tokens(super().linear(x, packed, bias, out_features))


@cache
def _cpu_has_int8() -> bool:
    """Whether the CPU multiplies int8 with int32 sums (VNNI). Without it, the product is slow, or
    its partial sums saturate.
    """
    return hasattr(torch, "_int_mm") and bool(torch.cpu._is_vnni_supported())
