"""SliM-LLM (Huang et al., ICML 2025, arXiv 2405.14917), after Aaronhuang-778/SliM-LLM at cfdf5ff.

Not all groups of columns deserve the same width. (1) Salience-determined bit allocation: groups are ranked by the sum
of W^2 / d^2, d the diagonal of U, the upper Cholesky factor of H^-1. For i = 1, 2, ... the i least salient groups of a
linear give a bit each to the i most salient, so that the mean stays `bits`; the i whose rounded outputs, as a
distribution over the output channels, diverge least (KL) from the true ones wins: a second pass over the calibration
data. (2) Salience-weighted quantizer calibration: each row's range in a group is scaled by the one of 101 shares that
leaves the least sum |error|**2.4, errors of salient weights times `lambda_salience`. (3) GPTQ's feedback, its blocks
the groups. A group of 1 bit takes the levels mean +- mean|w|. Fewer than 4 groups: all have `bits`, as the notes say.

`plus` is SliM-LLM+: in place of (2) and (3), OmniQuant's learnable clipping, trained on the block's
output.

At no stored bit, together preset="best": `search_range` tries wider spans of ranges and zeros
between whole steps, each column's error weighted by H_ii, also in the allocation; `try_uniform`
lets the allocation choose to move no bits; `act_group_aware`, `true_sequential`, `gptaq` and
`refine` are GPTQ's (methods/gptq.py, refine.py).

Storage (n = ceil(I / group_size) groups); value = scale * (code - zero)
    name    shape          dtype   bits per weight
    weight  [O, I*bits/32] int32   bits
    scale   [O, n]         fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O*n*4 / 32]   int32   4 / group_size (8 bits, twice that, with scale_bits=32)
    widths  [n]            uint8   8 / (O * group_size)
    mean    [O, n]         fp32    only at 2 bits with scale_bits=32: value = scale * (code - zero) + mean

`weight` is three runs: all groups of bits - 1, then of bits, then of bits + 1, each in order, each
packed as bits.py says. So a kernel is three of a fixed width, over the columns in the order of
argsort(widths); a short last group keeps `bits`, and the size is known before the allocation is
(runs that are no multiple of 32 columns pay for padding).

A zero is a fixed-point number of 4 bits, in steps of 2**width / 16. Up to 4 bits it holds every
whole zero exactly; wider groups have every 2nd to 16th. In a group of 1 bit it holds the mean, to
1/16 of the two levels' distance: an fp16 mean would be a second scale (16 bits more), and how many
there are is not known before the search. So every average costs 20 / group_size more: 2.156 bits at
2 bits and groups of 128. scale_bits=32 stores the mean as it is.

Departures: saliences come from the factor that the feedback uses, dead columns are zeroed, and every zero follows its
range. The authors rank by a factor of H + 0.01 I, leave the 0.01 in H, keep dead columns, and give leading groups of
bits - 1 (>= 2) the zero of a symmetric range: `as_published=True` does all that, rounding where they round. Their
packed files round the mean of 1-bit groups to an integer; these do not. A short last group keeps its width.
SliM-LLM+: 1-bit groups have their mean added back (theirs only compare with it) and start at mean|w| (theirs at 1.48
times it), ranges always hold zero, and the allocation is searched in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import LLQError
from ...common.spec import Spec
from ...kernels import Part, UniformCodes, once, product
from ...kernels.bitpack import BLOCK, pack, packed_words, unpack
from ...method import Flow, Job, Method, Packed, Step
from ...numerics.cholesky import prepare_hessian
from ...numerics.coordinate_descent import Objective, descend, refitted
from ...numerics.error_feedback import Solution, by_columns, drift, group_aware_order
from ...numerics.grids import Grid, Uniform
from ...numerics.stats import PairedHessian, Stat
from ..options import (
    check_damp,
    check_gptaq,
    check_least,
    check_positive,
    check_refine,
)
from .allocation import Search
from .levels import Factor, Levels, ends_of, most_salient
from .plus import Clipping, train

FIT_CHUNK = 1 << 18  # weights, by candidate grids, that are rounded at once: they stay in the cache
# Shares of a range, in the authors' order: of equals the first wins.
SHARES = torch.cat([torch.linspace(1.0, 1.1, 51), torch.linspace(1.0, 0.9, 51)[1:]]).tolist()
WIDE_SHARES = torch.linspace(0.4, 1.05, 41).tolist()  # of search_range
OFFSETS = (-2, -1, 0, 1, 2)  # of search_range: steps of a stored zero
FEWEST_GROUPS = 4  # with fewer the authors' search has no candidates


@dataclass(frozen=True, kw_only=True)
class SliMLLM(Method):
    """bits: the mean; damp: a share of mean(diag H); pairs: groups of bits - 1, and of bits + 1
    (-1: searched for); epochs, learning_rate and aug_loss (also aim at the full-precision block on
    the quantized inputs): for plus.
    """

    name: ClassVar[str] = "slim_llm"
    title: ClassVar[str] = "SliM-LLM (Huang et al. 2025)"
    bits_range: ClassVar[range] = range(2, 8)
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {
        "search_range": True,
        "try_uniform": True,
        "act_group_aware": True,
        "true_sequential": True,
        "gptaq": 0.25,
        "refine": 2,
    }

    bits: int = 2
    group_size: int = 128
    damp: float = 0.01
    pairs: int = -1
    lambda_salience: float = 1.0
    as_published: bool = False
    search_range: bool = False
    try_uniform: bool = False
    act_group_aware: bool = False
    true_sequential: bool = False
    gptaq: float = 0.0
    refine: int = 0
    plus: bool = False
    epochs: int = 50
    learning_rate: float = 1e-2
    aug_loss: bool = False
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.uniform  # validates scale_bits
        if self.group_size < 1:
            raise LLQError(
                f"group_size={self.group_size} must be at least 1: widths are allotted by group"
            )
        check_damp(self)
        if self.pairs < -1:
            raise LLQError(f"pairs={self.pairs} must be a count of groups, or -1 (searched for)")
        check_least(self, 0, "lambda_salience")
        check_gptaq(self)
        check_refine(self)
        check_least(self, 1, "epochs")
        check_positive(self, "learning_rate")
        feedback = (
            "as_published",
            "search_range",
            "act_group_aware",
            "true_sequential",
            "gptaq",
            "refine",
        )
        if self.plus and any(getattr(self, option) for option in feedback):
            raise LLQError(
                f"plus=True trains ranges instead of searching them: it goes without {', '.join(feedback)}"
            )

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.gptaq or self.refine or self.plus else Flow.QUANTIZED

    @property
    def uniform(self) -> Uniform:
        return Uniform(self.bits, scale_bits=self.scale_bits)

    # --- storage ----------------------------------------------------------------------------------

    @property
    def _exact(self) -> bool:
        return self.scale_bits == 32

    @property
    def _zero_bits(self) -> int:
        return 8 if self._exact else 4

    def _groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def _most_pairs(self, in_features: int) -> int:
        """How many groups may at most get bits - 1, and as many bits + 1."""
        whole = in_features // self.group_size
        if self.pairs == -1:
            groups = self._groups(in_features)
            return groups // 2 - 1 if groups >= FEWEST_GROUPS else 0
        if 2 * self.pairs > whole:
            raise LLQError(
                f"pairs={self.pairs} takes {2 * self.pairs} whole groups; {in_features} columns have {whole}"
            )
        return self.pairs

    def _words(self, in_features: int, pairs: int) -> int:
        """int32 words of a row with so many pairs."""
        moved = pairs * self.group_size
        columns = {self.bits - 1: moved, self.bits: in_features - 2 * moved, self.bits + 1: moved}
        return sum(packed_words(count, width) for width, count in columns.items())

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        groups, most = self._groups(in_features), self._most_pairs(in_features)
        words = max(
            self._words(in_features, pairs) for pairs in range(most + 1)
        )  # they differ by padding only
        layout = {
            "weight": Spec((out_features, words), torch.int32),
            "scale": Spec((out_features, groups), torch.float32 if self._exact else torch.float16),
            "zero": Spec((packed_words(out_features * groups, self._zero_bits),), torch.int32),
            "widths": Spec((groups,), torch.uint8),
        }
        if self._exact and self.bits == 2:
            layout["mean"] = Spec((out_features, groups), torch.float32)
        return layout

    def _runs(
        self, widths: list[int], in_features: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """(width, the columns of its groups), narrow to wide."""
        columns = torch.split(torch.arange(in_features, device=device), self.group_size)
        for width in sorted(set(widths)):
            yield (
                width,
                torch.cat(
                    [part for part, own in zip(columns, widths, strict=True) if own == width]
                ),
            )

    def pack(self, codes_OI: Tensor, levels_OG: Levels, widths: list[int]) -> Packed:
        """Codes and grids, in the model's order, -> the tensors of `layout`. Nothing is rounded
        here.
        """
        layout, device = self.layout(*codes_OI.shape), codes_OI.device
        runs = self._runs(widths, codes_OI.shape[1], device)
        weight = torch.cat([pack(codes_OI[:, columns], width) for width, columns in runs], dim=1)
        widths_G = torch.tensor(widths, dtype=torch.uint8, device=device)
        packed = {
            "weight": F.pad(weight, (0, layout["weight"].shape[1] - weight.shape[1])),
            "scale": levels_OG.scale.to(layout["scale"].dtype).contiguous(),
            "zero": pack((levels_OG.zero * self._zero_steps(widths_G)).flatten(), self._zero_bits),
            "widths": widths_G,
        }
        return {**packed, "mean": levels_OG.mean.contiguous()} if "mean" in layout else packed

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight, scale_OG, start = packed["weight"], packed["scale"].float(), 0
        weight_OI = torch.empty(out_features, in_features, device=weight.device)
        widths: list[int] = once(packed, packed["widths"].tolist, "widths")
        for width, columns in self._runs(widths, in_features, weight.device):
            stop = start + packed_words(len(columns), width)
            weight_OI[:, columns] = unpack(weight[:, start:stop], width, len(columns)).float()
            start = stop
        zero_OG = unpack(packed["zero"], self._zero_bits, scale_OG.numel()).view_as(scale_OG)
        zero_OG = zero_OG / self._zero_steps(packed["widths"])
        whole = in_features // self.group_size
        end = whole * self.group_size
        head_OGg, tail_O1g = (
            weight_OI[:, :end].view(out_features, whole, self.group_size),
            weight_OI[:, None, end:],
        )
        for part, groups in ((head_OGg, slice(whole)), (tail_O1g, slice(whole, None))):
            if part.numel():
                part.sub_(zero_OG[:, groups, None]).mul_(scale_OG[:, groups, None])
            if part.numel() and "mean" in packed:
                part.add_(packed["mean"][:, groups, None])
        return weight_OI

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        stored = once(packed, lambda: self._readable(packed, in_features))
        return product(x, stored, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _readable(self, packed: Packed, in_features: int) -> UniformCodes | None:
        """As kernels read it: a part for every width. None where groups are not whole blocks, or
        have means.
        """
        if self.group_size % BLOCK or in_features % BLOCK or "mean" in packed:
            return None
        widths_G, parts, start = packed["widths"], [], 0
        blocks_K = torch.arange(in_features // BLOCK, dtype=torch.int32, device=widths_G.device)
        widths_K = widths_G.repeat_interleave(self.group_size // BLOCK)[: len(blocks_K)]
        for width in sorted(set(widths_G.tolist())):
            blocks = blocks_K[widths_K == width]
            columns = len(blocks) * BLOCK
            parts.append(Part(width, columns, start, blocks, 2.0 ** (width - self._zero_bits)))
            start += packed_words(columns, width) * 4
        weight, scale, zero = packed["weight"], packed["scale"], packed["zero"]
        return UniformCodes(
            weight, in_features, tuple(parts), scale, zero, self.group_size, self._zero_bits
        )

    # --- which group gets how many bits -----------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        if self.plus:
            return self._trained(step)
        pairs, packed = self._pairs(step), {}
        for name, linear in step.linears.items():
            job, stat = step.job(name), step.stats[name]
            assert isinstance(stat, PairedHessian)
            packed[name] = self._quantized(linear.weight.detach().float(), stat, pairs[name], job)
        return packed

    @torch.no_grad()
    def _pairs(self, step: Step) -> dict[str, int]:
        """By linear: how many groups give a bit to as many others."""
        pairs = {
            name: self._most_pairs(linear.in_features) for name, linear in step.linears.items()
        }
        if self.pairs != -1 or not any(pairs.values()):
            return pairs
        factors: dict[Stat, Tensor] = {}
        searches = {}
        for name, most in pairs.items():
            stat, linear = step.stats[name], step.linears[name]
            assert isinstance(stat, PairedHessian)
            if stat not in factors:
                factors[stat] = self._factor(stat, {}, allocating=True).spread_I
            if most:
                ranking = self._ranking(linear.weight.detach().float(), factors[stat])
                searches[name] = Search(self, linear, ranking, most)
        handles = [
            step.linears[name].register_forward_hook(search.hook)
            for name, search in searches.items()
        ]
        try:
            step.run("bit allocation")
        finally:
            for handle in handles:
                handle.remove()
        return {**pairs, **{name: search.best() for name, search in searches.items()}}

    def _factor(
        self, stat: PairedHessian, notes: dict[str, Any], allocating: bool = False
    ) -> Factor:
        size = self.group_size
        H_II, U_II, order_I, dead_I = prepare_hessian(
            stat.H_II,
            0.0 if self.as_published and allocating else self.damp,
            notes,
            partial(group_aware_order, size=size) if self.act_group_aware else None,
            quick=not self.as_published,
            ridge=0.01 if self.as_published else 0.0,
        )
        spread_I = torch.diagonal(H_II).rsqrt() if U_II is None else torch.diagonal(U_II)
        return Factor(
            H_II,
            U_II,
            order_I,
            dead_I,
            (order_I[::size] // size).tolist(),
            spread_I[torch.argsort(order_I)],
        )

    def _ranking(self, weight_OI: Tensor, spread_I: Tensor) -> list[int]:
        """The whole groups, least salient first."""
        salience_OI = weight_OI.square() / spread_I.square()
        parts = [part.sum() for part in torch.split(salience_OI, self.group_size, dim=1)]
        whole = weight_OI.shape[1] // self.group_size
        ranking: list[int] = torch.argsort(torch.stack(parts)[:whole], stable=True).tolist()
        return ranking

    def _widths(self, weight_OI: Tensor, spread_I: Tensor, pairs: int) -> list[int]:
        """The width of every group."""
        widths, ranking = (
            [self.bits] * self._groups(weight_OI.shape[1]),
            self._ranking(weight_OI, spread_I),
        )
        for low, high in zip(ranking[:pairs], reversed(ranking), strict=False):
            widths[low], widths[high] = self.bits - 1, self.bits + 1
        return widths

    def _note(self, widths: list[int], job: Job) -> None:
        job.notes["pairs"] = widths.count(self.bits + 1)
        if self.pairs == -1 and len(widths) < FEWEST_GROUPS:
            job.notes["allocation"] = f"uniform: {len(widths)} groups are too few to move bits"

    # --- grids ------------------------------------------------------------------------------------

    def proxies(self, weight_OKg: Tensor, width: int) -> Tensor:
        """Groups of weights as the allocation rounds them: over whole ranges, or over those of
        `search_range`.
        """
        rows_Rg, found = weight_OKg.reshape(-1, weight_OKg.shape[2]), []
        for part_Rg in torch.split(rows_Rg, max(1, FIT_CHUNK // rows_Rg.shape[1])):
            levels_R = self._spanning(part_Rg, width)
            if self.search_range:
                levels_R = self._fitted(
                    part_Rg, width, torch.ones_like(part_Rg[0]), torch.zeros_like(part_Rg).bool()
                )
            found.append(levels_R.rounded(part_Rg, width))
        return torch.cat(found).view_as(weight_OKg)

    def _spanning(self, part_OB: Tensor, width: int) -> Levels:
        return self._two_levels(part_OB) if width == 1 else self._grid(*ends_of(part_OB), width)

    def _two_levels(self, part_OB: Tensor) -> Levels:
        """mean +- mean|w|; rows of zeros stay zeros."""
        mean, size = part_OB.mean(1, keepdim=True), part_OB.abs().mean(1, keepdim=True)
        scale = self.uniform.stored(2 * size)
        zero = (
            torch.full_like(mean, 0.5) if self._exact else self._stored_zero(0.5 - mean / scale, 1)
        )
        return Levels(
            scale,
            torch.where(size == 0, 0.0, zero),
            mean if self._exact else torch.zeros_like(mean),
        )

    def _grid(self, low: Tensor, high: Tensor, width: int, sym: bool = False) -> Levels:
        scale = self.uniform.stored((high - low) / (2**width - 1))
        zero = torch.full_like(scale, 2.0 ** (width - 1)) if sym else torch.round(-low / scale)
        return Levels(scale, self._stored_zero(zero, width), torch.zeros_like(scale))

    def _zero_steps(self, width: Tensor) -> Tensor:
        """Steps of a stored zero in one step of the codes."""
        return torch.exp2(self._zero_bits - width.float())

    def _stored_zero(self, zero: Tensor, width: int | Tensor) -> Tensor:
        steps = (
            2.0 ** (self._zero_bits - width) if isinstance(width, int) else self._zero_steps(width)
        )
        return torch.round(zero * steps).clamp_(0, 2**self._zero_bits - 1) / steps

    def _fitted(
        self,
        part_OB: Tensor,
        width: int,
        importance_B: Tensor,
        salient_OB: Tensor,
        sym: bool = False,
    ) -> Levels:
        """Salience-weighted quantizer calibration: for each row the grid of least error, the first
        of equals.
        """
        tried_C = self._candidates(part_OB, width, sym)  # each part [C, O, 1]
        best, least = tried_C.through(lambda t: t[0]), torch.full_like(part_OB[:, :1], math.inf)
        for start in range(0, len(tried_C.scale), size := max(1, FIT_CHUNK // part_OB.numel())):
            some_C = tried_C.through(lambda t, start=start: t[start : start + size])  # type: ignore[misc]
            error_COB = (
                (some_C.rounded(part_OB, width) - part_OB).abs_().pow_(2.4).mul_(importance_B)
            )
            salient_CO1 = (error_COB * salient_OB).sum(2, keepdim=True)
            error_CO1 = (error_COB * ~salient_OB).sum(
                2, keepdim=True
            ) + self.lambda_salience * salient_CO1
            which_1O1 = error_CO1.argmin(0, keepdim=True)
            error = error_CO1.gather(0, which_1O1)[0]
            better = error < least
            least = torch.where(better, error, least)
            winner = some_C.through(lambda t, which=which_1O1: t.gather(0, which)[0])  # type: ignore[misc]
            best = Levels(
                *(torch.where(better, new, old) for new, old in zip(winner, best, strict=True))
            )
        return best

    def _candidates(self, part_OB: Tensor, width: int, sym: bool) -> Levels:
        """The grids to try [C, O, 1]: of `search_range` many spans around the range, zeros also
        between whole steps.
        """
        if width == 1 and not self.search_range:
            return self._two_levels(part_OB).through(lambda t: t[None])
        low, high = ends_of(part_OB)
        shares_C11 = part_OB.new_tensor(WIDE_SHARES if self.search_range else SHARES)[:, None, None]
        if not self.search_range:
            return self._grid(shares_C11 * low, shares_C11 * high, width, sym)
        if (
            width == 1
        ):  # two levels lie inside the range: about 0.8 standard deviations from the mean
            mean, reach = part_OB.mean(1, keepdim=True), 1.25 * part_OB.abs().mean(1, keepdim=True)
            low, high = mean - reach, mean + reach
        scale_CO1 = self.uniform.stored(shares_C11 * (high - low) / (2**width - 1))
        steps = 2.0 ** (self._zero_bits - width)
        zero_CO1 = torch.round(-shares_C11 * low / scale_CO1 * steps) / steps
        zero_CO1 = torch.cat(
            [self._stored_zero(zero_CO1 + offset / steps, width) for offset in OFFSETS]
        )
        wide = Levels(scale_CO1.repeat(len(OFFSETS), 1, 1), zero_CO1, torch.zeros_like(zero_CO1))
        first = self._spanning(part_OB, width)
        return Levels(
            *(torch.cat([own[None], more]) for own, more in zip(first, wide, strict=True))
        )

    # --- rounding ---------------------------------------------------------------------------------

    def _quantized(self, weight_OI: Tensor, stat: PairedHessian, pairs: int, job: Job) -> Packed:
        factor = self._factor(stat, job.notes)
        W_OI = weight_OI if self.as_published else weight_OI.masked_fill(factor.dead_I, 0)
        widths = self._widths(W_OI, factor.spread_I, pairs)
        self._note(widths, job)
        solved = [widths[group] for group in factor.groups]
        order_I = factor.order_I
        C_II = (
            stat.C_II[order_I][:, order_I]
            if factor.U_II is not None and self.flow is Flow.BOTH
            else None
        )
        codes_OI, levels_OG = self._solve(W_OI[:, order_I], factor, C_II, solved)
        if self.refine and C_II is not None:
            ordered = weight_OI[:, order_I], W_OI[:, order_I]
            objective = Objective.of(factor.H_II, job.notes["damp"], C_II.T, *ordered)
            codes_OI, levels_OG = self._refined(objective, codes_OI, levels_OG, solved)
        back_G = torch.argsort(torch.tensor(factor.groups, device=codes_OI.device))
        return self.pack(
            codes_OI[:, torch.argsort(order_I)], levels_OG.through(lambda t: t[:, back_G]), widths
        )

    def _solve(
        self, W_OI: Tensor, factor: Factor, C_II: Tensor | None, widths: list[int]
    ) -> tuple[Tensor, Levels]:
        """Round the columns of W_OI, in the order of solving as all here, one by one; uses W_OI up."""
        codes_IO, found, U_II = torch.empty_like(W_OI.T), [], factor.U_II
        diagonal_I, spread_I = torch.diagonal(factor.H_II), factor.spread_I[factor.order_I]
        drift_II = None
        if self.gptaq and C_II is not None and U_II is not None:
            drift_II = drift(factor.H_II, C_II, U_II, self.gptaq)

        def begin(start: int, stop: int) -> None:
            group, part_OB = start // self.group_size, W_OI[:, start:stop]
            importance_B = (
                diagonal_I[start:stop]
                if self.search_range
                else torch.ones_like(spread_I[start:stop])
            )
            sym = self.as_published and all(width < self.bits for width in widths[: group + 1])
            salient_OB = most_salient(part_OB.square() / spread_I[start:stop].square())
            found.append(self._fitted(part_OB, widths[group], importance_B, salient_OB, sym))

        def rounded(j: int, w_O: Tensor) -> Tensor:
            levels_O = found[-1].through(Tensor.flatten)
            codes_IO[j] = code_O = levels_O.codes(w_O, widths[len(found) - 1])
            return levels_O.values(code_O)

        by_columns(
            W_OI,
            U_II,
            rounded,
            begin,
            block=self.group_size,
            drift_II=drift_II,
            fused=not self.as_published,
        )
        return codes_IO.T.contiguous(), Levels(
            *(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        )

    def _refined(
        self, objective: Objective, codes_OI: Tensor, levels_OG: Levels, widths: list[int]
    ) -> tuple[Tensor, Levels]:
        """`refine` rounds: every code to its best level given all others, then every scale to its
        best.
        """
        group_I = torch.arange(codes_OI.shape[1], device=codes_OI.device) // self.group_size
        codes_IO = codes_OI.T.contiguous()
        for _ in range(self.refine):

            def nearest(j: int, w_O: Tensor, levels_OG: Levels = levels_OG) -> Tensor:
                group = j // self.group_size
                levels_O = levels_OG.through(lambda t: t[:, group])
                codes_IO[j] = levels_O.codes(w_O, widths[group])
                return levels_O.values(codes_IO[j])

            descend(
                objective, levels_OG.through(lambda t: t[:, group_I]).values(codes_IO.T), nearest
            )
            # Means stay: a scale is refitted to what they leave.
            mean_OI = levels_OG.mean[:, group_I]
            rest = Objective(objective.H_II, objective.B_OI - mean_OI @ objective.H_II)
            solution = Solution(codes_IO.T, Grid(levels_OG.scale, levels_OG.zero), group_I)
            levels_OG = levels_OG._replace(scale=refitted(rest, solution, self.uniform).scale)
        return codes_IO.T.contiguous(), levels_OG

    # --- SliM-LLM+ --------------------------------------------------------------------------------

    def _trained(self, step: Step) -> dict[str, Packed]:
        """Train the clipping of all linears together, so that the block's output is the
        full-precision model's.
        """
        jobs = {name: step.job(name) for name in step.linears}
        saved = step.state.load()
        pairs = self._pairs(step) if saved is None else {}
        clippings = {}
        for name, linear in step.linears.items():
            if saved is None:
                stat = step.stats[name]
                assert isinstance(stat, PairedHessian)
                widths = self._widths(
                    linear.weight.detach().float(), self._factor(stat, {}).spread_I, pairs[name]
                )
            else:
                widths = saved[f"{name}.widths"].tolist()
            self._note(widths, jobs[name])
            clippings[name] = Clipping(self, linear, widths)
        losses = train(self, step, clippings, saved)
        for job in jobs.values():
            job.notes["loss"] = [losses[0], losses[-1]]
        with torch.no_grad():
            return {name: clipping.packed() for name, clipping in clippings.items()}
