"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438), after mit-han-lab/smoothquant at c61476d.

Weights and activations both on `bits` bits, so that the product is one of integers. Activations have channels a hundred
times larger than others, which a grid per token cannot serve; weights do not. So a channel j of what a norm feeds to
several linears (q/k/v, gate/up) is divided by s_j = max|x_j|**alpha / max|W_:j|**(1 - alpha), and column j of their
weights multiplied by it. Then weights are rounded to nearest per row, q in +-(2**(bits-1) - 1) with step max|w| / (2**(
bits-1) - 1), and every token of every linear's input finds its own step of the same form at run time (`a_bits` bits).
`quantize_bmm_input` does the same to what q, k and v projections put out, before the rotary embedding.

y = (codes_x codes_W^T) * step_x * step_W is computed in int8 on CPUs with VNNI (our kernels, else
`torch._int_mm`) and on CUDA, else in fp32; weights are decoded for the product, tile by tile or
whole, and forgotten. Where the input wants a gradient, rounding passes it through.

Storage
    name      shape               dtype   bits per weight
    weight    [O, I * bits / 32]  int32   bits: q + 2**(bits-1)
    scale     [O, 1]              fp16    16 / I (fp32, twice that, with scale_bits=32)
    in_scale  [I]                 fp16    16 / O, likewise: s; ones where nothing is smoothed (absent without smooth)

Defaults: alpha 0.85 is the authors' for LLaMA-3, quantized q, k and v their perplexity script's;
their 6.26 with both is the study's 6.3 at 8 bits. For 6 and 4 bits, which their code has not, all
widths change together.

Departures: scales are rounded to what is stored before codes are chosen; s stands beside each linear instead of being
folded into the norm; it is computed in fp32 (theirs in the model's dtype), and a channel that never fired has s = 1
(theirs 1e-5, which blows up the token where it fires at last). A single linear behind a norm, as a fused qkv_proj, is
not smoothed: what a norm feeds is known by its several readers. Only q_proj, k_proj and v_proj are known
to enter a product of activations. `search_range` (in preset="best") shrinks each row's range to where sum |error|**2.4
is least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.spec import Spec
from ..kernels import choose, once
from ..kernels.bitpack import unpack
from ..method import Flow, Method, Packed, Step
from ..numerics.activations import TokenQuant
from ..numerics.grids import Grid, Uniform
from ..numerics.stats import AbsMax, Stat
from .options import check_range
from .uniform import OnUniformGrid

BMM_INPUTS = ("q_proj", "k_proj", "v_proj")
CUDA_ROWS = 32  # CUDA's integer product wants more than 16


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(OnUniformGrid):
    """a_bits: of activations, 0 as bits, 16 not quantized; alpha: how much of the difficulty moves
    into the weights.
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
        """Storage of the codes; and with `search_range`, the grid itself."""
        return Uniform(self.bits, sym=True, search=self.search_range, scale_bits=self.scale_bits)

    @property
    def tokens(self) -> TokenQuant:
        return TokenQuant(self.a_bits or self.bits)

    @property
    def weight_only(self) -> bool:
        return not self.tokens.on

    @property
    def flow(self) -> Flow:
        return Flow.DENSE

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
            s_I = torch.ones_like(stat.max_I)
            if self.smooth and len(group) > 1:
                s_I = self._smoothing(stat.max_I, list(weights.values()))
            for name, weight_OI in weights.items():
                job = step.job(name)
                job.notes["smoothed"] = self.smooth and len(group) > 1
                job.notes["bmm_input"] = isinstance(self.for_linear(job.name), BmmInput)
                packed[name] = self._rounded(weight_OI * s_I)
                if self.smooth:
                    packed[name]["in_scale"] = s_I.to(self.grid.scale_dtype)
        return packed

    def _smoothing(self, max_I: Tensor, weights: list[Tensor]) -> Tensor:
        """s [I], as it will be stored."""
        top_I = (
            torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0).clamp_min(1e-5)
        )
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
        z = x / packed["in_scale"].float() if self.smooth else x
        if not self.tokens.on:
            return super().linear(z.to(x.dtype), packed, bias, out_features)
        if self._integers(x, out_features):
            y = self._integer_product(z, packed)
        else:  # products and sums of codes, in fp32 whatever the model's dtype
            y = nn.functional.linear(self.tokens(z.float()), self.grid.unpack(packed, x.shape[-1]))
        return (y if bias is None else y + bias).to(x.dtype)

    def _integers(self, x: Tensor, out_features: int) -> bool:
        """Whether the product can be one of int8."""
        if self.tokens.bits > 8 or (x.requires_grad and torch.is_grad_enabled()):
            return False
        if x.is_cuda:
            return x.shape[-1] % 8 == 0 and out_features % 8 == 0
        return x.device.type == "cpu" and _cpu_has_int8()

    def _integer_product(self, z: Tensor, packed: Packed) -> Tensor:
        """fp32 y [..., O]."""
        codes_TI, step_T1 = self.tokens.codes(z.reshape(-1, z.shape[-1]))
        stored = once(packed, lambda: self.grid.readable(packed, z.shape[-1]))
        if (kernel := choose(codes_TI, stored)) is not None:
            return (kernel(codes_TI, stored, None) * step_T1).view(*z.shape[:-1], stored.rows)
        tokens = len(codes_TI)
        if z.is_cuda and tokens < CUDA_ROWS:
            codes_TI = nn.functional.pad(codes_TI, (0, 0, 0, CUDA_ROWS - tokens))
        codes_OI = unpack(packed["weight"], self.bits, z.shape[-1])
        signed_OI = codes_OI.sub_(2 ** (self.bits - 1)).view(
            torch.int8
        )  # wraps around to two's complement
        y_TO = torch._int_mm(codes_TI, signed_OI.T)[:tokens] * step_T1 * packed["scale"].float().T
        return y_TO.view(*z.shape[:-1], len(signed_OI))


class BmmInput(SmoothQuant):
    """SmoothQuant of a linear whose output enters a product of two activations: it is quantized per
    token too.
    """

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return self.tokens(super().linear(x, packed, bias, out_features))


@cache
def _cpu_has_int8() -> bool:
    """Whether the CPU multiplies int8 with int32 sums; without, the product is slow, or its partial
    sums saturate.
    """
    return hasattr(torch, "_int_mm") and bool(torch.cpu._is_vnni_supported())
