"""PB-LLM (Shang et al., ICLR 2024, arXiv 2310.00034), after hahnyuan/PB-LLM at fe85da9 (its
post-training "GPTQ-PB").

A share of the weights is salient and keeps 8 bits; the rest is binarized to mu +- alpha. A weight's salience is w^2 /
U_jj^2 (what GPTQ would pay for dropping it) or |w|; in each group of columns, all rows together, the largest are
salient. The mask, alpha and mu of every row and group, and the 8-bit grid of every row are found once, from the
original weights. Then columns are rounded from first to last, each to whichever of its two codes the mask says, with
GPTQ's feedback. `bits` is the paper's figure, 1 for a binarized weight and 8 for a salient one: bits = 1 + 7 *
salient share, so 1.7 is 10 % and 2.0 is 1/7. Where the salient weights are, and the scales, it does not count; the
storage does.

Storage (G = ceil(I / group_size) groups, s = (bits - 1) / 7 the salient share, S salient weights in
all)
    name           shape                 dtype   bits per weight
    weight         [O, I / 32]           int32   1: the sign; of salient weights the top bit of the code
    code           [7 S / 32]            int32   7 s: the other bits of salient codes, in order of rows (none if S = 0)
    position       [..]                  int32   at most 1, with
    position_low   [..]                  int32   both together 0.53 at 1.7 bits, 0.68 at 2.0 (see `Positions`)
    scale          [O, G]                fp16    16 / group_size: alpha (fp32, twice that, with scale_bits=32)
    mean           [O, G]                fp16    16 / group_size: mu
    salient_scale  [O]                   fp16    16 / I
    salient_zero   [O]                   uint8   8 / I
A 4096 x 4096 linear in groups of 128 takes 2.48 bits at "1.7" and 2.93 at "2.0".

Departures: exactly floor(N * (1 - s)) + 1 of the N weights of a group are binarized, ties going to
the first (theirs binarizes every weight that ties with the last one), so that sizes are known
beforehand; all at 1 bit (theirs crashes), none at 8. Groups need not be multiples of 128. A weight
equal to mu is coded mu + alpha (theirs: mu, a third level). Scales are rounded to the stored fp16
before codes are chosen. Averages run over the whole group with salient weights counted as zeros, as
their code does and published numbers have it; `mean_over="binarized"` is the paper's optimum. Their
"2bit" and "4bit" low methods are left out: they are broken (the zero points of all rows use one
row's scale).

preset="best" adds `refine` rounds over the whole linear: every code to its best given all others,
then alpha and mu to theirs given the codes, for the output error against outputs that are by
`dense_share` the full-precision model's (else the original weight's on the quantized model's
activations). Same storage. Perplexity at 1.7 bits falls from 56.7 to 35.5 on stories260K, on which
rounds and share were chosen, and from 16.1 to 6.3 on babyllama, which had no part in it (full
precision 3.66 and 2.98).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import SalientCodes, once, product
from ..kernels.bitpack import count_ones, pack, packed_words, unpack
from ..method import Flow, Job, Method, Packed
from ..numerics.cholesky import prepare_hessian
from ..numerics.coordinate_descent import Objective, descend, refit_levels
from ..numerics.error_feedback import by_columns
from ..numerics.grids import Grid, Uniform, check_group_size, columns_per_group, scale_dtype
from ..numerics.stats import PairedHessian, Stat
from .options import check_choice, check_damp, check_range, check_refine

SALIENCES = ("hessian", "magnitude")
MEANS = ("group", "binarized")


@dataclass(frozen=True)
class Positions:
    """Which `count` of `total` weights are salient, in a size that is known beforehand.

    The rarer kind is listed, in row-major order, as Elias and Fano do: the low bits of each
    position as they are, the high parts in unary, position k as a one at bit (high part + k). With
    the best number of low bits that is within 0.1 bits per weight of the mask's entropy at 1.7 and
    2.0 bits; from a quarter of the weights on a bitmap is smaller.
    """

    count: int
    total: int

    @property
    def listed(self) -> int:
        return min(self.count, self.total - self.count)

    def _unary_bits(self, low_bits: int) -> int:
        return self.listed + ((self.total - 1) >> low_bits)

    @property
    def unary_bits(self) -> int:
        return self._unary_bits(self.low_bits or 0)

    @property
    def low_bits(self) -> int | None:
        """Bits of a position stored as they are; None: a bitmap is no larger."""
        sizes = [self.listed * low + self._unary_bits(low) for low in range(9)]
        return None if self.total <= min(sizes) else sizes.index(min(sizes))

    def layout(self) -> dict[str, Spec]:
        if self.listed == 0:
            return {}
        low = self.low_bits
        plane = self.total if low is None else self.unary_bits
        layout = {"position": Spec((packed_words(plane, 1),), torch.int32)}
        if low:
            layout["position_low"] = Spec((packed_words(self.listed, low),), torch.int32)
        return layout

    def pack(self, salient_N: Tensor) -> Packed:
        """Mask [total] with `count` ones -> the tensors of `layout`."""
        if self.listed == 0:
            return {}
        low = self.low_bits
        if low is None:
            return {"position": pack(salient_N.to(torch.uint8), 1)}
        listed_K = (salient_N if self.listed == self.count else ~salient_N).nonzero().flatten()
        unary = torch.zeros(self.unary_bits, dtype=torch.uint8, device=salient_N.device)
        unary[(listed_K >> low) + torch.arange(self.listed, device=salient_N.device)] = 1
        packed = {"position": pack(unary, 1)}
        if low:
            packed["position_low"] = pack(listed_K & ((1 << low) - 1), low)
        return packed

    def unpack(self, packed: Packed, device: torch.device) -> Tensor:
        """Positions of the salient weights, int64 [count], ascending."""
        if self.listed == 0:
            return torch.arange(self.count, device=device)
        low = self.low_bits
        if low is None:
            return _ones(unpack(packed["position"], 1, self.total), self.count)
        ones_K = _ones(unpack(packed["position"], 1, self.unary_bits), self.listed)
        listed_K = (ones_K - torch.arange(self.listed, device=device)) << low
        if low:
            listed_K |= unpack(packed["position_low"], low, self.listed)
        if self.listed == self.count:
            return listed_K
        salient_N = torch.ones(self.total, dtype=torch.bool, device=device)
        salient_N[listed_K] = False
        return _ones(salient_N, self.count)

    def check(self, packed: Packed) -> None:
        """LLQError where the list has another length: `unpack` and kernels rely on it."""
        wanted = self.count if self.low_bits is None else self.listed
        if self.listed and (found := count_ones(packed["position"])) != wanted:
            raise LLQError(
                f"the list of salient weights is damaged: it holds {found} of them, not {wanted}"
            )


def _ones(mask_N: Tensor, count: int) -> Tensor:
    """Where the `count` ones of a mask are [count]: known beforehand, so that a GPU need not stop
    to count them.
    """
    return torch.nonzero_static(mask_N, size=count).flatten()


class Coder:
    """Rounds columns to their two kinds of levels and keeps the codes, uint8.

    Of a binarized weight's code only the top bit means something: 1 for mu + alpha, 0 for mu -
    alpha.
    """

    def __init__(
        self, salient_IO: Tensor, grid: Grid, scale_OG: Tensor, mean_OG: Tensor, size: int
    ) -> None:
        self.salient_IO, self.grid, self.scale_OG, self.mean_OG, self.size = (
            salient_IO,
            grid,
            scale_OG,
            mean_OG,
            size,
        )
        self.grid_O = Grid(*(part.flatten() for part in grid))
        self.codes_IO = torch.zeros_like(salient_IO, dtype=torch.uint8)

    def nearest(self, j: int, w_O: Tensor) -> Tensor:
        """Of the values that column j may take, the nearest to w_O."""
        alpha_O, mu_O = self.scale_OG[:, j // self.size], self.mean_OG[:, j // self.size]
        code_O, above_O = self.grid_O.codes(w_O, 8), w_O >= mu_O
        self.codes_IO[j] = torch.where(
            self.salient_IO[j], code_O.to(torch.uint8), above_O.to(torch.uint8) << 7
        )
        low_O = torch.where(above_O, alpha_O, -alpha_O) + mu_O
        return torch.where(self.salient_IO[j], self.grid_O.values(code_O), low_O)

    def group(self, g: int) -> Tensor:
        """Values [O, B] that the codes of group g mean."""
        part = slice(g * self.size, (g + 1) * self.size)
        codes_OB = self.codes_IO[part].T
        low_OB = (
            (codes_OB >> 7)
            .float()
            .mul_(2)
            .sub_(1)
            .mul_(self.scale_OG[:, g, None])
            .add_(self.mean_OG[:, g, None])
        )
        return torch.where(self.salient_IO[part].T, self.grid.values(codes_OB), low_OB)


@dataclass(frozen=True, kw_only=True)
class PBLLM(Method):
    """bits = 1 + 7 * salient share; salience: "hessian" or "magnitude"; mean_over: "group" or
    "binarized" (see above); feedback: repair later columns as GPTQ does; damp: a share of mean(diag
    H); group_size -1: one group.
    """

    name: ClassVar[str] = "pb_llm"
    title: ClassVar[str] = "PB-LLM (Shang et al. 2024)"
    bits_range: ClassVar[tuple[float, ...]] = (1.0, 1.7, 2.0, 3.0, 5.0, 8.0)
    any_bits: ClassVar[bool] = True
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {"refine": 5}

    bits: float = 1.7
    group_size: int = 128
    salience: str = "hessian"
    mean_over: str = "group"
    feedback: bool = True
    refine: int = 0
    dense_share: float = 0.5
    damp: float = 0.01
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.salient_grid  # validates scale_bits
        check_group_size(self.group_size, whole="one group")
        check_choice(self, "salience", SALIENCES)
        check_choice(self, "mean_over", MEANS)
        check_refine(self)
        check_range(self, "dense_share", 0, 1)
        check_damp(self)

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.refine and self.dense_share else Flow.QUANTIZED

    @property
    def salient_grid(self) -> Uniform:
        """One 8-bit grid per row, over all its weights."""
        return Uniform(8, scale_bits=self.scale_bits)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return scale_dtype(self.scale_bits)

    def _sizes(self, in_features: int) -> list[int]:
        """Columns of each group."""
        size = columns_per_group(self.group_size, in_features)
        return [min(size, in_features - start) for start in range(0, in_features, size)]

    def _binarized(self, weights: int) -> int:
        """How many of the weights of a group are binarized: the authors' rule, but all at 1 bit and
        none at 8.
        """
        if self.bits == self.bits_range[-1]:
            return 0
        return min(
            math.floor(weights * (8 - self.bits) / 7 + 1e-6) + 1, weights
        )  # 0.9 N may lie a hair below 0.9 N

    def _positions(self, out_features: int, in_features: int) -> Positions:
        groups = [out_features * size for size in self._sizes(in_features)]
        return Positions(sum(n - self._binarized(n) for n in groups), out_features * in_features)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        positions = self._positions(out_features, in_features)
        group_spec = Spec((out_features, len(self._sizes(in_features))), self._scale_dtype)
        layout = {"weight": Spec((out_features, packed_words(in_features, 1)), torch.int32)}
        if positions.count:
            layout["code"] = Spec((packed_words(positions.count, 7),), torch.int32)
        return {
            **layout,
            **positions.layout(),
            "scale": group_spec,
            "mean": group_spec,
            "salient_scale": Spec((out_features,), self._scale_dtype),
            "salient_zero": Spec((out_features,), torch.uint8),
        }

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        assert isinstance(stat, PairedHessian)
        salient_grid = self.salient_grid.grid(weight_OI)  # before dead columns are zeroed
        # Without a factor: salience by magnitude, no repair.
        H_II, U_II, _, dead_I = prepare_hessian(stat.H_II, self.damp, job.notes)
        W_OI = weight_OI.masked_fill(dead_I, 0)
        salient_OI = self._salient(W_OI, U_II)
        scale_OG, mean_OG = self._levels(W_OI, salient_OI)
        coder = Coder(
            salient_OI.T.contiguous(),
            salient_grid,
            scale_OG,
            mean_OG,
            self._sizes(W_OI.shape[1])[0],
        )
        by_columns(W_OI.clone(), U_II if self.feedback else None, coder.nearest)
        if self.refine and U_II is not None:
            share = self.dense_share if self.flow is Flow.BOTH else 0.0
            target_II = torch.lerp(stat.H_II, stat.C_II.T, share)
            self._refine(coder, Objective.of(H_II, job.notes["damp"], target_II, weight_OI, W_OI))
        return self._packed(coder)

    def _refine(self, coder: Coder, objective: Objective) -> None:
        """Every code to its best given all others, then alpha and mu of every group to theirs,
        `refine` times.
        """

        def stored(levels_O2: Tensor) -> Tensor:
            alpha_O, mu_O = levels_O2.to(self._scale_dtype).float().unbind(1)
            return torch.stack([alpha_O.clamp_min(0), mu_O], dim=1)

        for _ in range(self.refine):
            groups = range(coder.scale_OG.shape[1])
            values_OI = descend(
                objective, torch.cat([coder.group(g) for g in groups], dim=1), coder.nearest
            )
            for g, start in enumerate(range(0, values_OI.shape[1], coder.size)):
                part = slice(start, start + coder.size)
                low_OB = ~coder.salient_IO[part].T
                sign_OB = (coder.codes_IO[part].T >> 7).float() * 2 - 1
                basis_O2B = torch.stack([sign_OB * low_OB, low_OB.float()], dim=1)
                levels_O2 = torch.stack([coder.scale_OG[:, g], coder.mean_OG[:, g]], dim=1)
                levels_O2 = refit_levels(objective, values_OI, start, basis_O2B, levels_O2, stored)
                coder.scale_OG[:, g], coder.mean_OG[:, g] = levels_O2.unbind(1)
                values_OI[:, part] = coder.group(g)

    def _salient(self, W_OI: Tensor, U_II: Tensor | None) -> Tensor:
        """Mask [O, I] of the weights that keep 8 bits."""
        salience_OI = W_OI.abs()
        if self.salience == "hessian" and U_II is not None:
            salience_OI = W_OI.square() / torch.diagonal(U_II).square()
        parts = []
        for part_OB in torch.split(salience_OI, self._sizes(W_OI.shape[1])[0], dim=1):
            order_N = torch.argsort(part_OB.flatten(), stable=True)
            salient_N = torch.zeros_like(order_N, dtype=torch.bool)
            salient_N[order_N[self._binarized(len(order_N)) :]] = True
            parts.append(salient_N.view_as(part_OB))
        return torch.cat(parts, dim=1)

    def _levels(self, W_OI: Tensor, salient_OI: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and mu [O, G] of the binarized weights, as stored, in fp32."""
        size = self._sizes(W_OI.shape[1])[0]
        found = []
        for part_OB, salient_OB in zip(
            torch.split(W_OI, size, dim=1), torch.split(salient_OI, size, dim=1), strict=True
        ):
            part_OB = part_OB * ~salient_OB
            if self.mean_over == "group":
                mean_O1 = part_OB.mean(1, keepdim=True)
                alpha_O1 = (part_OB - mean_O1).abs().mean(1, keepdim=True)
            else:
                count_O1 = (~salient_OB).sum(1, keepdim=True).clamp_min(1)
                mean_O1 = part_OB.sum(1, keepdim=True) / count_O1
                alpha_O1 = ((part_OB - mean_O1).abs() * ~salient_OB).sum(1, keepdim=True) / count_O1
            found.append((alpha_O1, mean_O1))
        scale_OG, mean_OG = (
            torch.cat(parts, dim=1).to(self._scale_dtype).float()
            for parts in zip(*found, strict=True)
        )
        if not (torch.isfinite(scale_OG).all() and torch.isfinite(mean_OG).all()):
            raise LLQError("a level does not fit fp16: the weights are too large")
        return scale_OG, mean_OG

    def _packed(self, coder: Coder) -> Packed:
        codes_OI, salient_OI = coder.codes_IO.T, coder.salient_IO.T.contiguous()
        packed = {"weight": pack(codes_OI >> 7, 1)}
        if salient_OI.any():
            packed["code"] = pack(codes_OI[salient_OI] & 127, 7)
        return {
            **packed,
            **self._positions(*salient_OI.shape).pack(salient_OI.flatten()),
            "scale": coder.scale_OG.to(self._scale_dtype),
            "mean": coder.mean_OG.to(self._scale_dtype),
            "salient_scale": coder.grid.scale.flatten().to(self._scale_dtype),
            "salient_zero": coder.grid.zero.flatten().to(torch.uint8),
        }

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        stored = once(packed, lambda: self._readable(packed, out_features, x.shape[-1]))
        return product(x, stored, lambda: self.dequantize(packed, out_features, x.shape[-1]), bias)

    def _readable(self, packed: Packed, out_features: int, in_features: int) -> SalientCodes | None:
        """None: the salient weights are not what is listed."""
        positions = self._positions(out_features, in_features)
        if not positions.count or positions.listed < positions.count or positions.low_bits is None:
            return None
        once(packed, lambda: positions.check(packed), "checked")
        return SalientCodes(
            weight=packed["weight"],
            columns=in_features,
            scale=packed["scale"],
            mean=packed["mean"],
            group_size=self._sizes(in_features)[0],
            own_scale=packed["salient_scale"],
            own_zero=packed["salient_zero"],
            code=packed["code"],
            high=packed["position"],
            low=packed.get("position_low"),
            count=positions.count,
            unary=positions.unary_bits,
            low_bits=positions.low_bits,
        )

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        size = self._sizes(in_features)[0]
        top_OI = unpack(packed["weight"], 1, in_features).contiguous()
        weight_OI = top_OI.float().mul_(2).sub_(1)
        for g, part_OB in enumerate(torch.split(weight_OI, size, dim=1)):
            part_OB.mul_(packed["scale"][:, g, None].float()).add_(
                packed["mean"][:, g, None].float()
            )
        positions = self._positions(out_features, in_features)
        if positions.count:
            once(packed, lambda: positions.check(packed), "checked")
            at_S = positions.unpack(packed, weight_OI.device)
            code_S = unpack(packed["code"], 7, positions.count) | top_OI.view(-1)[at_S] << 7
            row_S = torch.div(at_S, in_features, rounding_mode="floor")
            zero_S, scale_S = (
                packed["salient_zero"][row_S].float(),
                packed["salient_scale"][row_S].float(),
            )
            weight_OI.view(-1)[at_S] = scale_S * (code_S.float() - zero_S)
        return weight_OI
