"""PB-LLM (Shang et al., ICLR 2024, arXiv 2310.00034), after hahnyuan/PB-LLM at fe85da9 (its
post-training "GPTQ-PB").

Idea
    A share of the weights is salient and keeps 8 bits; the others are binarized to mu +- alpha.
    1. Grid. Each row gets one 8-bit grid for its salient weights.
    2. Salience. It is w^2 / U_jj^2 (what GPTQ would pay for dropping the weight) or |w|. In each
       group of columns, all rows together, the largest are salient.
    3. Levels. Each row and group gets its alpha and mu. Like the mask and the grids, they are
       chosen once, from the original weights.
    4. Codes. Columns are rounded from first to last with GPTQ's feedback; the mask says to which
       kind of code.
    `bits` is the paper's figure, which counts 1 bit for a binarized weight and 8 for a salient one:
    bits = 1 + 7 * salient share. So 1.7 means 10 % and 2.0 means 1/7. It does not count the scales
    and the positions of the salient weights; the stored bits do.

preset="best"
    5. `refine` rounds over the whole linear follow: each code is set to its best given all others,
       then alpha and mu to theirs given the codes. They lower the output error. The outputs aimed
       at are by `dense_share` those of the full-precision model, else those of the original weight
       on the quantized model's activations. The storage is the same.

    Perplexity at 1.7 bits   full precision   without   with
    stories260K              3.66             56.7      35.5      rounds and share were chosen on it
    babyllama                2.98             16.1      6.3       not used to choose anything

Storage (G = ceil(I / group_size) groups, s = (bits - 1) / 7 the salient share, S salient weights)
    name           shape       dtype   bits per weight
    weight         [O, I / 32] int32   1: the sign; of salient weights the top bit of the code
    code           [7 S / 32]  int32   7 s: the other bits of salient codes, by rows (none if S = 0)
    position       [..]        int32   at most 1, together with
    position_low   [..]        int32   both 0.53 at 1.7 bits, 0.68 at 2.0 (see `Positions`)
    scale          [O, G]      fp16    16 / group_size: alpha (fp32, twice that, with scale_bits=32)
    mean           [O, G]      fp16    16 / group_size: mu
    salient_scale  [O]         fp16    16 / I
    salient_zero   [O]         uint8   8 / I
    A 4096 x 4096 linear in groups of 128 takes 2.48 bits at "1.7" and 2.93 at "2.0".

Departures
    * Exactly floor(N * (1 - s)) + 1 of the N weights of a group are binarized, and ties go to the
      first (theirs binarizes all weights that tie with the last one). So sizes are known before. At
      1 bit all are binarized (theirs crashes), at 8 bits none.
    * Groups need not be multiples of 128.
    * A weight equal to mu is coded as mu + alpha (theirs: as mu, a third level).
    * Scales are rounded to the stored fp16 before codes are chosen.
    * Averages run over the whole group, with salient weights counted as zeros. So does their code,
      and published numbers have it; `mean_over="binarized"` is the paper's optimum.
    * Their "2bit" and "4bit" low methods are left out, because they are broken: the zero points of
      all rows use one row's scale.
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
from ..kernels.bitpack import UNIT, count_ones, pack, packed_words, unpack
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
    """Stores which `count` of `total` weights are salient, in a size that is known before.

    The positions of the rarer kind, in row-major order, are an Elias-Fano list. The low bits of
    each position are stored as they are. The high parts are unary: entry k is a one at bit
    (high part + k). With the best number of low bits, the size is within 0.1 bits per weight of the
    mask's entropy at 1.7 and 2.0 bits. If a quarter of the weights or more are salient, a bitmap is
    smaller and is stored instead.
    """

    count: int
    total: int

    @property
    def listed(self) -> int:
        """How many weights the list holds: those of the rarer kind."""
        return min(self.count, self.total - self.count)

    def _unary_bits(self, low_bits: int) -> int:
        return self.listed + ((self.total - 1) >> low_bits)

    @property
    def unary_bits(self) -> int:
        """Bits of the unary part."""
        return self._unary_bits(self.low_bits or 0)

    @property
    def low_bits(self) -> int | None:
        """How many low bits of each position are stored as they are; None: a bitmap is stored."""
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
        """The tensors of `layout` from a mask [total] with `count` ones."""
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
        """Positions of the salient weights, int64 [count], in ascending order."""
        if self.listed == 0:
            return torch.arange(self.count, device=device)
        if self.low_bits is None:
            return _ones(unpack(packed["position"], 1, self.total), self.count)
        listed_K = self._list(packed)
        if self.listed == self.count:
            return listed_K
        salient_N = torch.ones(self.total, dtype=torch.bool, device=device)
        salient_N[listed_K] = False
        return _ones(salient_N, self.count)

    def _list(self, packed: Packed) -> Tensor:
        """The listed positions, int64 [listed]."""
        low = self.low_bits or 0
        ones_K = _ones(unpack(packed["position"], 1, self.unary_bits), self.listed)
        listed_K = ones_K.sub_(torch.arange(self.listed, device=ones_K.device)) << low
        if low:
            listed_K |= unpack(packed["position_low"], low, self.listed)
        return listed_K

    def check_count(self, packed: Packed) -> None:
        """LLQError if `position` holds the wrong number of ones. This is quick: no list is read."""
        if not self.listed:
            return
        low = self.low_bits
        wanted, plane = (self.count, self.total) if low is None else (self.listed, self.unary_bits)
        words = packed["position"]
        padding = unpack(words[-1:], 1, UNIT)[plane % UNIT :] if plane % UNIT else words[:0]
        ones = count_ones(words) - int(padding.sum())
        if ones != wanted:
            raise LLQError(
                f"position: the list of salient weights is damaged: it holds {ones} of them, "
                f"not {wanted}"
            )

    def check(self, packed: Packed) -> None:
        """LLQError if a list has the wrong length, does not ascend or leaves the weight. `unpack`
        and kernels rely on that. It takes as long as `unpack`.
        """
        self.check_count(packed)
        if self.listed and self.low_bits is not None:
            listed_K = self._list(packed)
            ascending = (listed_K[1:] > listed_K[:-1]).all() & (listed_K[-1] < self.total)
            if not ascending:
                raise LLQError(
                    "position: the list of salient weights is damaged: it does not ascend"
                )


def _ones(mask_N: Tensor, count: int) -> Tensor:
    """Indices [count] of the ones of a mask. As `count` is given, a GPU need not stop to count."""
    return torch.nonzero_static(mask_N, size=count).flatten()


class Coder:
    """Rounds columns, salient weights to their grid and the others to two levels, and keeps codes.

    Codes are uint8. Only the top bit of a binarized weight's code has a meaning: 1 for mu + alpha,
    0 for mu - alpha.
    """

    def __init__(
        self, salient_IO: Tensor, grid: Grid, scale_OG: Tensor, mean_OG: Tensor, size: int
    ) -> None:
        self.salient_IO = salient_IO
        self.grid = grid
        self.scale_OG = scale_OG
        self.mean_OG = mean_OG
        self.size = size
        self.grid_O = Grid(*(part.flatten() for part in grid))
        self.codes_IO = torch.zeros_like(salient_IO, dtype=torch.uint8)

    def nearest(self, j: int, w_O: Tensor) -> Tensor:
        """The nearest possible values of column j to w_O [O]; their codes are kept."""
        salient_O = self.salient_IO[j]
        group = j // self.size
        alpha_O, mu_O = self.scale_OG[:, group], self.mean_OG[:, group]
        code_O = self.grid_O.codes(w_O, 8)
        above_O = w_O >= mu_O
        self.codes_IO[j] = torch.where(
            salient_O, code_O.to(torch.uint8), above_O.to(torch.uint8) << 7
        )
        low_O = torch.where(above_O, alpha_O, -alpha_O) + mu_O
        return torch.where(salient_O, self.grid_O.values(code_O), low_O)

    def group(self, g: int) -> Tensor:
        """Values [O, B] of the codes of group g."""
        part = slice(g * self.size, (g + 1) * self.size)
        codes_OB = self.codes_IO[part].T
        sign_OB = (codes_OB >> 7).float().mul_(2).sub_(1)
        low_OB = sign_OB.mul_(self.scale_OG[:, g, None]).add_(self.mean_OG[:, g, None])
        return torch.where(self.salient_IO[part].T, self.grid.values(codes_OB), low_OB)


@dataclass(frozen=True, kw_only=True)
class PBLLM(Method):
    """bits: 1 + 7 * salient share; group_size -1: one group; salience: "hessian" or "magnitude";
    mean_over: "group" or "binarized" (see above); feedback: repair later columns as GPTQ does;
    damp: a share of mean(diag H).
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
        """How many of the `weights` of a group are binarized.

        This is the authors' rule, but all are at 1 bit and none at 8.
        """
        if self.bits == self.bits_range[-1]:
            return 0
        # 1e-6, because a product that should be whole may come out a little smaller.
        return min(math.floor(weights * (8 - self.bits) / 7 + 1e-6) + 1, weights)

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
        # 1. The 8-bit grids, before dead columns are zeroed.
        salient_grid = self.salient_grid.grid(weight_OI)
        # 2. Salience. Without a factor of the Hessian it is the magnitude, and nothing is repaired.
        H_II, U_II, _, dead_I = prepare_hessian(stat.H_II, self.damp, job.notes, fallback="rtn")
        W_OI = weight_OI.masked_fill(dead_I, 0)
        salient_OI = self._salient(W_OI, U_II)
        # 3. Levels of the other weights.
        scale_OG, mean_OG = self._levels(W_OI, salient_OI)
        size = self._sizes(W_OI.shape[1])[0]
        coder = Coder(salient_OI.T.contiguous(), salient_grid, scale_OG, mean_OG, size)
        # 4. Codes.
        by_columns(W_OI.clone(), U_II if self.feedback else None, coder.nearest)
        # 5. Refinement.
        if self.refine and U_II is not None:
            share = self.dense_share if self.flow is Flow.BOTH else 0.0
            target_II = torch.lerp(stat.H_II, stat.C_II.T, share)
            self._refine(coder, Objective.of(H_II, job.notes["damp"], target_II, weight_OI, W_OI))
        return self._pack(coder)

    def _refine(self, coder: Coder, objective: Objective) -> None:
        """`refine` rounds: set each code to its best given all others, then alpha and mu of each
        group to theirs.
        """

        def round_levels(levels_O2: Tensor) -> Tensor:
            alpha_O, mu_O = levels_O2.to(self._scale_dtype).float().unbind(1)
            return torch.stack([alpha_O.clamp_min(0), mu_O], dim=1)

        for _ in range(self.refine):
            groups = range(coder.scale_OG.shape[1])
            values_OI = torch.cat([coder.group(g) for g in groups], dim=1)
            values_OI = descend(objective, values_OI, coder.nearest)
            for g, start in enumerate(range(0, values_OI.shape[1], coder.size)):
                part = slice(start, start + coder.size)
                low_OB = ~coder.salient_IO[part].T
                sign_OB = (coder.codes_IO[part].T >> 7).float() * 2 - 1
                basis_O2B = torch.stack([sign_OB * low_OB, low_OB.float()], dim=1)
                levels_O2 = torch.stack([coder.scale_OG[:, g], coder.mean_OG[:, g]], dim=1)
                levels_O2 = refit_levels(
                    objective, values_OI, start, basis_O2B, levels_O2, round_levels
                )
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
        """alpha and mu [O, G] of the binarized weights, rounded as stored, in fp32.

        LLQError if fp16 cannot hold them.
        """
        size = self._sizes(W_OI.shape[1])[0]
        groups = zip(
            torch.split(W_OI, size, dim=1), torch.split(salient_OI, size, dim=1), strict=True
        )
        levels = []
        for part_OB, salient_OB in groups:
            part_OB = part_OB * ~salient_OB
            if self.mean_over == "group":
                mean_O1 = part_OB.mean(1, keepdim=True)
                alpha_O1 = (part_OB - mean_O1).abs().mean(1, keepdim=True)
            else:
                count_O1 = (~salient_OB).sum(1, keepdim=True).clamp_min(1)
                mean_O1 = part_OB.sum(1, keepdim=True) / count_O1
                alpha_O1 = ((part_OB - mean_O1).abs() * ~salient_OB).sum(1, keepdim=True) / count_O1
            levels.append((alpha_O1, mean_O1))
        scale_OG, mean_OG = (
            torch.cat(parts, dim=1).to(self._scale_dtype).float()
            for parts in zip(*levels, strict=True)
        )
        if not (torch.isfinite(scale_OG).all() and torch.isfinite(mean_OG).all()):
            raise LLQError("a level does not fit fp16: the weights are too large")
        return scale_OG, mean_OG

    def _pack(self, coder: Coder) -> Packed:
        codes_OI = coder.codes_IO.T
        salient_OI = coder.salient_IO.T.contiguous()
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

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        self._positions(out_features, in_features).check_count(packed)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        view = once(packed, lambda: self._view(packed, out_features, in_features))
        return product(x, view, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _view(self, packed: Packed, out_features: int, in_features: int) -> SalientCodes | None:
        """The codes as kernels read them; None if the salient weights are not an Elias-Fano list.

        LLQError if the list is damaged.
        """
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
            part_OB.mul_(packed["scale"][:, g, None].float())
            part_OB.add_(packed["mean"][:, g, None].float())
        positions = self._positions(out_features, in_features)
        if positions.count:
            once(packed, lambda: positions.check(packed), "checked")
            at_S = positions.unpack(packed, weight_OI.device)
            code_S = unpack(packed["code"], 7, positions.count) | top_OI.view(-1)[at_S] << 7
            row_S = torch.div(at_S, in_features, rounding_mode="floor")
            zero_S = packed["salient_zero"][row_S].float()
            scale_S = packed["salient_scale"][row_S].float()
            weight_OI.view(-1)[at_S] = scale_S * (code_S.float() - zero_S)
        return weight_OI
