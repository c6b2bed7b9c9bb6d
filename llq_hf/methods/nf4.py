"""NF4: NormalFloat of 2 to 4 bits, the base of QLoRA (Dettmers et al. 2023); with `icq` of IR-QLoRA
(Qin et al. 2024).

Idea
    1. The matrix, read row by row, is cut into blocks of 64 weights.
    2. With `icq` (information calibration quantization), each block is shifted by tau. Of
       2 `tau_steps` + 1 shifts around the median, tau is the one whose codes have the most entropy.
    3. A block is divided by its largest magnitude, its scale. With `double_quant` the scales are
       stored in 8 bits, and 256 of them share one fp32 number.
    4. Each weight takes the nearest of 2**bits levels, which lie at quantiles of a normal
       distribution; zero is one of them.
    No calibration data is needed.

preset="best"
    The range of each block is searched for the least squared error, codes are chosen for scales and
    shifts as stored, and the smallest of equally good shifts is taken (theirs: the most negative).

Storage (N = O I weights, B = ceil(N / 64) blocks, S = ceil(B / 256) super-blocks)
    name          shape                 dtype   bits per weight
    weight        [N * bits / 32]       int32   bits
    scale         [B]                   uint8   8 / 64 (fp32, 32 / 64, without double_quant)
    scale_absmax  [S]                   fp32    32 / (64 * 256)     only with double_quant
    scale_mean    [1]                   fp32    32 / N              only with double_quant
    tau           [B]                   uint8   8 / 64              only with icq
    tau_absmax    [S]                   fp32    32 / (64 * 256)     only with icq
    4 bits store 4.127, with icq 4.254. Codes of 4 bits lie in the same bytes as bitsandbytes' (the
    first of two in the high half), so that its CUDA kernels read them in place, where it is
    installed.

Departures
    Codes, scales and mean equal those of bitsandbytes bit for bit, but:
    * A block of zeros gets the code of zero (theirs divides by zero).
    * 8-bit codes are always the nearest, as in its CUDA kernels. Its CPU kernel first rounds to
      65536 points, which moves about one scale in 700 by a code.
    * tau is stored beside the codes, in 8 bits. The authors derive it anew at every load, from a
      full-precision model and a `tau_steps` that must be the same.
    * 2 and 3 bits, which the papers mention and nobody published, use the same construction of
      levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import Numbers, TableCodes, once, product
from ..kernels.bitpack import pack, packed_words, unpack
from ..method import Job, Method, Packed
from ..numerics.grids import at_once, grouped
from ..numerics.stats import Stat
from .options import check_range

SUPER = 256  # blocks whose scales (or shifts) share one fp32 number
CHUNK = 2**21  # weights whose shifts are searched at once on a CPU, to bound memory
SHRINKS = 32  # ranges tried by search_range, 1.00 down to 0.38

# The published levels, and the bounds between neighbours that bitsandbytes' kernels use: midpoints,
# some of them an ulp off.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BOUNDS = (
    -0.8480964, -0.61063293, -0.45999527, -0.33967943, -0.23460741, -0.13791173, -0.04552502,
    0.03979015, 0.12025525, 0.20352125, 0.29201377, 0.38931254, 0.50166342, 0.64278692, 0.86147842,
)  # fmt: skip


@cache
def levels(bits: int) -> tuple[Tensor, Tensor]:
    """The values of the codes [2**bits], in ascending order, and the bounds between neighbours."""
    if bits == 4:
        return torch.tensor(NF4_LEVELS), torch.tensor(NF4_BOUNDS)
    half = 2 ** (bits - 1)
    tail = _tail(bits)
    positive, negative = (torch.special.ndtri(_line(tail, n)[:-1]) for n in (half + 1, half))
    values = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]).float()
    values /= values.max()
    return values, (values[1:] + values[:-1]) / 2


def _tail(bits: int) -> float:
    """The probability whose quantile is the outermost level.

    It is rounded as the published 0.9677083 of 4 bits is.
    """
    return float(round(1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2, 7))


def _line(start: float, count: int) -> Tensor:
    """`count` evenly spaced probabilities from `start` to 0.5."""
    return torch.linspace(start, 0.5, count, dtype=torch.float64)


@cache
def dynamic_levels() -> tuple[Tensor, Tensor]:
    """bitsandbytes' signed "dynamic" map of 8 bits: 256 values, finer near zero, and the bounds
    between neighbours.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    values_256 = torch.tensor(sorted(values))
    return values_256, (values_256[1:] + values_256[:-1]) / 2


@cache
@torch.inference_mode(False)
def _on(
    device: torch.device, table: Callable[..., tuple[Tensor, Tensor]], *bits: int
) -> tuple[Tensor, Tensor]:
    """The values and bounds of `levels` or `dynamic_levels` on a device.

    They are copied there once, because a CUDA graph may not copy them.
    """
    values, bounds = table(*bits)
    return values.to(device), bounds.to(device)


class DynamicInt8:
    """Stores numbers [B] in 8 bits: each is a code of the dynamic map times the largest magnitude
    among 256 neighbours.
    """

    @staticmethod
    def encode(values_B: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, uint8 [B], and largest magnitudes, fp32 [S]."""
        padded_SK = grouped(values_B, SUPER)
        absmax_S = padded_SK.abs().amax(1)
        bounds = _on(values_B.device, dynamic_levels)[1]
        codes_SK = torch.bucketize(padded_SK * _inverse(absmax_S)[:, None], bounds)
        return codes_SK.flatten()[: len(values_B)].to(torch.uint8), absmax_S

    @staticmethod
    def decode(codes_B: Tensor, absmax_S: Tensor) -> Tensor:
        absmax_B = absmax_S.repeat_interleave(SUPER)[: len(codes_B)]
        return _on(codes_B.device, dynamic_levels)[0][codes_B.int()] * absmax_B


@dataclass(frozen=True, kw_only=True)
class NF4(Method):
    """block_size: weights that share a scale; double_quant: scales in 8 bits; search_range: shrink
    each block's range to the least squared error; icq: shift each block by a stored tau, found
    among 2 tau_steps + 1 shifts within tau_range (in sigmas of a block's levels) of the median;
    nearest_shift: take the smallest of equally good shifts.
    """

    name: ClassVar[str] = "nf4"
    title: ClassVar[str] = "NormalFloat (Dettmers et al. 2023)"
    bits_range: ClassVar[range] = range(2, 5)
    best: ClassVar[dict[str, Any]] = {"search_range": True, "nearest_shift": True}

    bits: int = 4
    block_size: int = 64
    double_quant: bool = True
    search_range: bool = False
    icq: bool = False
    tau_range: float = 0.1
    tau_steps: int = 100
    nearest_shift: bool = False

    def check(self) -> None:
        check_range(self, "block_size", 2, 2**24)  # a short block is padded to this
        if not 0 < self.tau_range < 1:
            raise LLQError(f"tau_range={self.tau_range} must lie between 0 and 1")
        check_range(self, "tau_steps", 1, 10_000)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        weights = out_features * in_features
        blocks = -(-weights // self.block_size)
        supers = -(-blocks // SUPER)
        words = -(-weights // 8) if self.bits == 4 else packed_words(weights, self.bits)
        layout = {"weight": Spec((words,), torch.int32)}
        if self.double_quant:
            layout["scale"] = Spec((blocks,), torch.uint8)
            layout["scale_absmax"] = Spec((supers,), torch.float32)
            layout["scale_mean"] = Spec((1,), torch.float32)
        else:
            layout["scale"] = Spec((blocks,), torch.float32)
        if self.icq:
            layout["tau"] = Spec((blocks,), torch.uint8)
            layout["tau_absmax"] = Spec((supers,), torch.float32)
        return layout

    # --- quantizing -------------------------------------------------------------------------------

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        # 1. Blocks.
        weight_BK = grouped(weight_OI.flatten(), self.block_size)
        packed: Packed = {}
        # 2. Shifts.
        if self.icq:
            weight_BK, packed = self._shift(weight_OI.flatten(), weight_BK)
        # 3. Scales.
        scale_B = self._search_scales(weight_BK) if self.search_range else weight_BK.abs().amax(1)
        packed |= self._pack_scales(scale_B)
        # 4. Codes. Unless ranges are searched, they are for scales before rounding, as in the
        # papers.
        codes_BK = self._codes(weight_BK, self._scales(packed) if self.search_range else scale_B)
        return {"weight": self._pack_codes(codes_BK.flatten()[: weight_OI.numel()]), **packed}

    def _codes(self, weight_BK: Tensor, scale_B: Tensor) -> Tensor:
        """Nearest codes [B, K]."""
        # Times the reciprocal, as in bitsandbytes: a division would round differently.
        bounds = _on(weight_BK.device, levels, self.bits)[1]
        return torch.bucketize(weight_BK * _inverse(scale_B)[:, None], bounds, out_int32=True)

    def _search_scales(self, weight_BK: Tensor) -> Tensor:
        """The scale [B] of each block that has the least squared error, of `SHRINKS` shrunken
        ones.
        """
        values = _on(weight_BK.device, levels, self.bits)[0]
        full_B = weight_BK.abs().amax(1)
        best_B = full_B
        least_B = torch.full_like(full_B, torch.inf)
        for step in range(SHRINKS):
            scale_B = full_B * (1 - step / 50)
            restored_BK = values[self._codes(weight_BK, scale_B)] * scale_B[:, None]
            error_B = (restored_BK - weight_BK).square_().sum(1)
            best_B = torch.where(error_B < least_B, scale_B, best_B)
            least_B = torch.minimum(error_B, least_B)
        return best_B

    def _pack_scales(self, scale_B: Tensor) -> Packed:
        if not self.double_quant:
            return {"scale": scale_B}
        mean_1 = scale_B.mean().reshape(1)
        codes_B, absmax_S = DynamicInt8.encode(scale_B - mean_1)
        return {"scale": codes_B, "scale_absmax": absmax_S, "scale_mean": mean_1}

    def _scales(self, packed: Packed) -> Tensor:
        """Scales, fp32 [B], of the stored tensors."""
        if not self.double_quant:
            return packed["scale"]
        return DynamicInt8.decode(packed["scale"], packed["scale_absmax"]) + packed["scale_mean"]

    def _pack_codes(self, codes_N: Tensor) -> Tensor:
        if self.bits != 4:
            return pack(codes_N, self.bits)
        pairs = torch.nn.functional.pad(codes_N.to(torch.uint8), (0, -len(codes_N) % 8)).view(-1, 2)
        return (pairs[:, 0] << 4 | pairs[:, 1]).contiguous().view(torch.int32)

    def _unpack_codes(self, weight: Tensor, weights: int) -> Tensor:
        """Codes, int32 [N], to index levels with."""
        if self.bits != 4:
            return unpack(weight, self.bits, weights).int()
        as_bytes = weight.contiguous().view(torch.uint8).int()
        return torch.stack([as_bytes >> 4, as_bytes & 15], dim=1).flatten()[:weights]

    # --- information calibration ------------------------------------------------------------------

    def _shift(self, weight_N: Tensor, weight_BK: Tensor) -> tuple[Tensor, Packed]:
        """(weights minus their block's tau, tau as stored).

        Like the authors' the subtracted tau is not rounded, unless ranges are searched.
        """
        whole = len(weight_N) // self.block_size
        chunks = torch.split(
            weight_BK[:whole], max(at_once(weight_BK.device, CHUNK) // self.block_size, 1)
        )
        taus = [self._taus(chunk_BK) for chunk_BK in chunks]
        if whole < len(weight_BK):  # a short last block: its padding takes no part
            taus.append(self._taus(weight_N[whole * self.block_size :][None]))
        tau_B = torch.cat(taus)
        codes_B, absmax_S = DynamicInt8.encode(tau_B)
        if self.search_range:
            tau_B = DynamicInt8.decode(codes_B, absmax_S)
        shifted_N = (weight_BK - tau_B[:, None]).flatten()[: len(weight_N)]
        return grouped(shifted_N, self.block_size), {"tau": codes_B, "tau_absmax": absmax_S}

    def _taus(self, weight_BK: Tensor) -> Tensor:
        """tau [B] whose codes have the most entropy."""
        # Sorted weights stay sorted when shifted, so codes are counted by binary search.
        ordered_BK = weight_BK.sort(1).values
        median_B = ordered_BK[:, (ordered_BK.shape[1] - 1) // 2]  # the lower one
        reach_B = torch.maximum(ordered_BK[:, -1] - median_B, median_B - ordered_BK[:, 0])
        best_B = median_B
        most_B = torch.full_like(median_B, -1)
        for shift in self._shifts():
            tau_B = median_B + shift * reach_B
            entropy_B = self._entropy(ordered_BK - tau_B[:, None])
            best_B = torch.where(entropy_B > most_B, tau_B, best_B)
            most_B = torch.maximum(entropy_B, most_B)
        return best_B

    def _shifts(self) -> list[float]:
        """Shifts in the order of preference among equally good ones.

        That is from the most negative one up, or with `nearest_shift` from zero outwards.
        """
        sigmas = torch.special.ndtri(torch.tensor(_tail(self.bits), dtype=torch.float64))
        reach = self.tau_range / float(sigmas)
        shifts: list[float] = torch.linspace(-reach, reach, 2 * self.tau_steps + 1).tolist()
        return sorted(shifts, key=abs) if self.nearest_shift else shifts

    def _entropy(self, ordered_BK: Tensor) -> Tensor:
        """Entropy [B] in bits per code, of blocks whose weights are in ascending order."""
        size = ordered_BK.shape[1]
        bounds = _on(ordered_BK.device, levels, self.bits)[1]
        scale_B = torch.maximum(ordered_BK[:, -1], -ordered_BK[:, 0])
        normal_BK = ordered_BK * _inverse(scale_B)[:, None]
        bounds_BL = bounds.expand(len(normal_BK), -1).contiguous()
        below_BL = torch.searchsorted(normal_BK, bounds_BL, right=True)
        all_B1 = below_BL.new_full((len(below_BL), 1), size)
        counts = torch.nn.functional.pad(below_BL, (1, 0)).diff(append=all_B1)
        if self.nearest_shift:
            # Sorted, so that the same counts in another order have exactly the same sum.
            counts = counts.sort(1).values
        return -sum(_plogp(size, counts.device)[counts].unbind(1), start=torch.zeros_like(scale_B))

    # --- use --------------------------------------------------------------------------------------

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weights = out_features * in_features
        values = _on(packed["weight"].device, levels, self.bits)[0]
        weight_BK = grouped(values[self._unpack_codes(packed["weight"], weights)], self.block_size)
        weight_BK *= self._scales(packed)[:, None]
        if self.icq:
            weight_BK += DynamicInt8.decode(packed["tau"], packed["tau_absmax"])[:, None]
        return weight_BK.flatten()[:weights].view(out_features, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        stored = once(packed, lambda: self._stored(packed, out_features, in_features))
        return product(x, stored, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _stored(self, packed: Packed, out_features: int, in_features: int) -> TableCodes:
        """The stored tensors as kernels read them."""
        device = packed["weight"].device
        map_256 = _on(device, dynamic_levels)[0]
        scale = Numbers(packed["scale"])
        if self.double_quant:
            scale = Numbers(packed["scale"], map_256, packed["scale_absmax"], packed["scale_mean"])
        return TableCodes(
            packed["weight"],
            out_features,
            in_features,
            self.bits,
            _on(device, levels, self.bits)[0],
            self.block_size,
            scale,
            Numbers(packed["tau"], map_256, packed["tau_absmax"]) if self.icq else None,
            levels_name="nf4" if self.bits == 4 else None,
        )


def _inverse(scale_B: Tensor) -> Tensor:
    """1 / scale; 0 for blocks of zeros, all of whose weights then get the code of zero."""
    return torch.where(scale_B == 0, 0.0, 1 / scale_B)


@cache
def _plogp(size: int, device: torch.device) -> Tensor:
    """p log2 p for counts 0..size out of `size`."""
    share = torch.arange(size + 1, dtype=torch.float32, device=device) / size
    return torch.where(share == 0, 0.0, share * torch.log2(share))
