"""SliM-LLM (Huang et al., ICML 2025, arXiv 2405.14917), after Aaronhuang-778/SliM-LLM at cfdf5ff.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bits import pack, packed_words, unpack
from ..errors import LLQError
from ..feedback import by_columns
from ..grids import Spec, Uniform
from ..method import Job, Method, Packed, Step
from ..stats import Hessian, Stat, factorize, revive_dead

CHUNK = 1 << 22  # outputs whose softmax is held at once
# Shares of a group's range, in the authors' order: the first of equals wins.
SHARES = torch.cat([torch.linspace(1.0, 1.1, 51), torch.linspace(1.0, 0.9, 51)[1:]])
FEWEST_GROUPS = 4  # below, the search has no candidates


class Levels(NamedTuple):
    """Grids of groups: value = scale * (code - zero) + mean; zero counts steps, and need not be a whole number."""

    scale: Tensor
    zero: Tensor
    mean: Tensor

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        whole = self.zero.floor()
        return (torch.round((weight - self.mean) / self.scale + (self.zero - whole)) + whole).clamp_(0, 2**bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero) + self.mean

    def rounded(self, weight: Tensor, bits: int) -> Tensor:
        return self.values(self.codes(weight, bits))


@dataclass(frozen=True, kw_only=True)
class SliMLLM(Method):
    """bits: the average; damp: a share of mean(diag H); pairs: groups of bits - 1, and of bits + 1; -1 searches."""

    name: ClassVar[str] = "slim_llm"
    title: ClassVar[str] = "SliM-LLM (Huang et al. 2025)"
    bits_range: ClassVar[range] = range(2, 8)
    observes: ClassVar[type[Stat] | None] = Hessian

    bits: int = 2
    group_size: int = 128
    damp: float = 0.01
    pairs: int = -1
    lambda_salience: float = 1.0
    as_published: bool = False
    scale_bits: int = 16

    def check(self) -> None:
        if self.group_size < 1:
            raise LLQError(f"group_size={self.group_size} must be at least 1: widths are allotted by group")
        if not 0 <= self.damp <= 1:
            raise LLQError(f"damp={self.damp} must lie in 0..1, a share of the Hessian's mean diagonal")
        if self.pairs < -1:
            raise LLQError(f"pairs={self.pairs} must be -1 (searched for) or a count of groups")
        if not 0 <= self.lambda_salience < math.inf:
            raise LLQError(f"lambda_salience={self.lambda_salience} must not be negative")
        _ = self._uniform  # validates scale_bits

    # --- storage -----------------------------------------------------------------------------------------------------

    @property
    def _uniform(self) -> Uniform:
        return Uniform(self.bits, self.group_size, scale_bits=self.scale_bits)

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
                f"pairs={self.pairs} needs {2 * self.pairs} whole groups, {in_features} columns have {whole}"
            )
        return self.pairs

    def _words(self, in_features: int, pairs: int) -> int:
        """int32 words per row with so many pairs."""
        moved = pairs * self.group_size
        columns = {self.bits - 1: moved, self.bits: in_features - 2 * moved, self.bits + 1: moved}
        return sum(packed_words(count, width) for width, count in columns.items())

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        groups, most = self._groups(in_features), self._most_pairs(in_features)
        # The same for all counts of pairs, but for padding where group_size is not a multiple of 32.
        words = max(self._words(in_features, pairs) for pairs in range(most + 1))
        layout = {
            "weight": Spec((out_features, words), torch.int32),
            "scale": Spec((out_features, groups), torch.float32 if self._exact else torch.float16),
            "zero": Spec((packed_words(out_features * groups, self._zero_bits),), torch.int32),
            "widths": Spec((groups,), torch.uint8),
        }
        if self._exact and self.bits == 2:
            layout["mean"] = Spec((out_features, groups), torch.float32)
        return layout

    def _runs(self, widths: list[int], in_features: int) -> Iterator[tuple[int, Tensor]]:
        """(width, its columns) from narrow to wide: codes of a run are packed together."""
        columns = torch.arange(in_features).split(self.group_size)
        for width in sorted(set(widths)):
            yield width, torch.cat([c for c, own in zip(columns, widths, strict=True) if own == width])

    def _pack(self, codes_OI: Tensor, levels_OG: Levels, widths: list[int]) -> Packed:
        layout = self.layout(*codes_OI.shape)
        parts = [pack(codes_OI[:, columns.to(codes_OI.device)], w) for w, columns in self._runs(widths, codes_OI.shape[1])]
        weight = torch.cat(parts, dim=1)
        widths_G = torch.tensor(widths, dtype=torch.uint8, device=codes_OI.device)
        zero_OG = levels_OG.zero * torch.exp2(self._zero_bits - widths_G.float())
        packed = {
            "weight": F.pad(weight, (0, layout["weight"].shape[1] - weight.shape[1])),
            "scale": levels_OG.scale.to(layout["scale"].dtype).contiguous(),
            "zero": pack(zero_OG.flatten(), self._zero_bits),
            "widths": widths_G,
        }
        if "mean" in layout:
            packed["mean"] = levels_OG.mean.contiguous()
        return packed

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        widths, start = packed["widths"].tolist(), 0
        weight_OI = packed["scale"].new_empty((out_features, in_features), dtype=torch.float32)
        for width, columns in self._runs(widths, in_features):
            stop = start + packed_words(len(columns), width)
            codes = unpack(packed["weight"][:, start:stop], width, len(columns))
            weight_OI[:, columns.to(weight_OI.device)] = codes.float()
            start = stop
        scale_OG = packed["scale"].float()
        zero_OG = unpack(packed["zero"], self._zero_bits, scale_OG.numel()).view_as(scale_OG).float()
        zero_OG *= torch.exp2(packed["widths"].float() - self._zero_bits)
        whole = in_features // self.group_size
        head_OGg = weight_OI[:, : whole * self.group_size].unflatten(1, (whole, self.group_size))
        for part, groups in ((head_OGg, slice(whole)), (weight_OI[:, whole * self.group_size :, None], slice(whole, None))):
            part.sub_(zero_OG[:, groups, None]).mul_(scale_OG[:, groups, None])
            if "mean" in packed:
                part.add_(packed["mean"][:, groups, None])
        return weight_OI

    # --- how many bits for which group -----------------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        pairs = self._pairs(step)
        packed = {}
        for name, linear in step.linears.items():
            job, stat = step.job(name), step.stats[name]
            assert isinstance(stat, Hessian)
            packed[name] = self._quantized(linear.weight.detach().float(), stat, pairs[name], job)
        return packed

    @torch.no_grad()
    def _pairs(self, step: Step) -> dict[str, int]:
        """By linear: how many groups give a bit to as many others."""
        most = {name: self._most_pairs(linear.in_features) for name, linear in step.linears.items()}
        searched = [name for name in most if most[name] and self.pairs == -1]
        if not searched:
            return most
        assert step.data is not None
        spreads: dict[Stat, Tensor] = {}
        searches = {}
        for name in searched:
            stat, linear = step.stats[name], step.linears[name]
            assert isinstance(stat, Hessian)
            if stat not in spreads:
                spreads[stat] = self._factor(stat, {}, allocating=True)[1]
            ranking = self._ranking(linear.weight.detach().float(), spreads[stat])
            searches[name] = Search(self, ranking, most[name], linear)
        handles = [step.linears[name].register_forward_hook(search.hook) for name, search in searches.items()]
        step.listener.stage("bit allocation", step.data.count)
        try:
            for rows in step.data.batches():
                hidden_BSD, kwargs = step.data.inputs(rows)
                step.block(hidden_BSD, **kwargs)
                step.listener.advance(len(hidden_BSD))
        finally:
            for handle in handles:
                handle.remove()
        return {**most, **{name: search.best() for name, search in searches.items()}}

    def _factor(self, stat: Hessian, notes: dict[str, Any], allocating: bool = False) -> tuple[Tensor | None, Tensor]:
        """(U_II or None, the divisor [I] of saliences W^2 / d^2)."""
        H_II = stat.H_II
        revive_dead(H_II)
        damp = self.damp
        if self.as_published:
            torch.diagonal(H_II).add_(0.01)
            damp = 0.0 if allocating else damp
        U_II = factorize(H_II, damp, notes, inverse=True)
        if U_II is None:
            return None, torch.diagonal(H_II).rsqrt()
        return U_II, torch.diagonal(U_II).clone()

    def _ranking(self, weight_OI: Tensor, spread_I: Tensor) -> list[int]:
        """The whole groups from least to most salient."""
        salience_OI = weight_OI.square() / spread_I.square()
        parts = salience_OI[:, : weight_OI.shape[1] // self.group_size * self.group_size].split(self.group_size, dim=1)
        ranking: list[int] = torch.argsort(torch.stack([part.sum() for part in parts]), stable=True).tolist()
        return ranking

    def _widths(self, ranking: list[int], pairs: int, in_features: int) -> list[int]:
        widths = [self.bits] * self._groups(in_features)
        for low, high in zip(ranking[:pairs], reversed(ranking), strict=False):
            widths[low], widths[high] = self.bits - 1, self.bits + 1
        return widths

    # --- grids -------------------------------------------------------------------------------------------------------

    def spanning(self, part_OB: Tensor, width: int) -> Levels:
        """Grids over the whole ranges of a group's rows: what the search rounds on."""
        if width == 1:
            return self._two_levels(part_OB)
        return self._ranged(*_range(part_OB), width, sym=False)

    def _two_levels(self, part_OB: Tensor) -> Levels:
        """mean +- mean|w|."""
        mean = part_OB.mean(1, keepdim=True)
        size = part_OB.abs().mean(1, keepdim=True)
        scale = self._uniform.stored(2 * size)
        if self._exact:
            zero, mean = torch.full_like(mean, 0.5), mean
        else:
            zero, mean = self._stored_zero(0.5 - mean / scale, 1), torch.zeros_like(mean)
        return Levels(scale, torch.where(size == 0, 0.0, zero), mean)

    def _ranged(self, low: Tensor, high: Tensor, width: int, sym: bool) -> Levels:
        scale = self._uniform.stored((high - low) / (2**width - 1))
        zero = torch.full_like(scale, 2.0 ** (width - 1)) if sym else torch.round(-low / scale)
        return Levels(scale, self._stored_zero(zero, width), torch.zeros_like(scale))

    def _stored_zero(self, zero: Tensor, width: int) -> Tensor:
        steps = 2.0 ** (self._zero_bits - width)
        return torch.round(zero * steps).clamp_(0, 2**self._zero_bits - 1) / steps

    def _fitted(self, part_OB: Tensor, width: int, spread_B: Tensor, sym: bool) -> Levels:
        """Salience-weighted quantizer calibration: of 101 shares of each row's range the one of least error."""
        if width == 1:
            return self._two_levels(part_OB)
        salient_OB = _salient(part_OB.square() / spread_B.square())
        low, high = _range(part_OB)
        best, least = None, torch.empty_like(low)
        for share in SHARES.tolist():
            levels = self._ranged(share * low, share * high, width, sym)
            error_OB = (levels.rounded(part_OB, width) - part_OB).abs_().pow_(2.4)
            error = (error_OB * ~salient_OB).sum(1, keepdim=True)
            error += self.lambda_salience * (error_OB * salient_OB).sum(1, keepdim=True)
            if best is None:
                best, least = levels, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = Levels(*(torch.where(better, new, old) for new, old in zip(levels, best, strict=True)))
        assert best is not None
        return best

    # --- rounding ----------------------------------------------------------------------------------------------------

    def _quantized(self, weight_OI: Tensor, stat: Hessian, pairs: int, job: Job) -> Packed:
        W_OI = weight_OI.clone()
        dead_I = torch.diagonal(stat.sum_II) == 0
        job.notes["dead_columns"] = int(dead_I.sum())
        if not self.as_published:
            W_OI[:, dead_I] = 0
        U_II, spread_I = self._factor(stat, job.notes)
        if U_II is None:
            job.notes["fallback"] = "rtn"
        widths = self._widths(self._ranking(W_OI, spread_I), pairs, W_OI.shape[1])
        job.notes["pairs"] = pairs
        codes_OI, levels_OG = self._solve(W_OI, U_II, spread_I, widths)
        return self._pack(codes_OI, levels_OG, widths)

    def _solve(
        self, W_OI: Tensor, U_II: Tensor | None, spread_I: Tensor, widths: list[int]
    ) -> tuple[Tensor, Levels]:
        codes_IO = torch.empty_like(W_OI.T)
        found: list[Levels] = []

        def begin(start: int, stop: int) -> None:
            group = start // self.group_size
            sym = self.as_published and all(width < self.bits for width in widths[: group + 1])
            found.append(self._fitted(W_OI[:, start:stop], widths[group], spread_I[start:stop], sym))

        def rounded(j: int, w_O: Tensor) -> Tensor:
            levels = Levels(*(part.flatten() for part in found[-1]))
            codes_IO[j] = code_O = levels.codes(w_O, widths[len(found) - 1])
            return levels.values(code_O)

        by_columns(W_OI, U_II, rounded, begin, block=self.group_size, fused=not self.as_published)
        return codes_IO.T, Levels(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


class Search:
    """Sums, for 1, 2, ... pairs, how far the outputs of a linear so rounded diverge from its own."""

    def __init__(self, method: SliMLLM, ranking: list[int], most: int, linear: nn.Linear) -> None:
        self.method, self.ranking, self.linear = method, ranking, linear
        self.divergence_P = torch.zeros(most, dtype=torch.float64, device=linear.weight.device)

    def best(self) -> int:
        sums = self.divergence_P.tolist()
        return sums.index(min(sums)) + 1

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x_TI, y_TO = args[0].flatten(0, -2), y.flatten(0, -2)
        base_OI, moves = self._rounded()
        size = max(1, CHUNK // y_TO.shape[1])
        for x_tI, y_tO in zip(x_TI.split(size), y_TO.split(size), strict=True):
            self._compare(x_tI.float(), y_tO.float(), base_OI, moves)

    def _rounded(self) -> tuple[Tensor, list[list[tuple[slice, Tensor]]]]:
        """The weight at N bits, and what each further pair changes of it: (columns, difference)."""
        method, W_OI = self.method, self.linear.weight.detach().float()
        size, bits = method.group_size, method.bits
        base_OI = torch.cat([method.spanning(p, bits).rounded(p, bits) for p in W_OI.split(size, dim=1)], dim=1)

        def move(group: int, width: int) -> tuple[slice, Tensor]:
            columns = slice(group * size, (group + 1) * size)
            part_OB = W_OI[:, columns]
            return columns, method.spanning(part_OB, width).rounded(part_OB, width) - base_OI[:, columns]

        pairs = zip(self.ranking[: len(self.divergence_P)], reversed(self.ranking), strict=False)
        return base_OI, [[move(low, bits - 1), move(high, bits + 1)] for low, high in pairs]

    def _compare(
        self, x_TI: Tensor, reference_TO: Tensor, base_OI: Tensor, moves: list[list[tuple[slice, Tensor]]]
    ) -> None:
        floor = math.log(1e-6)
        bias = None if self.linear.bias is None else self.linear.bias.detach().float()
        y_TO = F.linear(x_TI, base_OI, bias)
        target_TO = torch.log_softmax(reference_TO, dim=1).clamp_min_(floor)
        for pair, move in enumerate(moves):
            for columns, change_OB in move:
                y_TO.addmm_(x_TI[:, columns], change_OB.T)
            log_TO = torch.log_softmax(y_TO, dim=1).clamp_min_(floor)
            self.divergence_P[pair] += (log_TO.exp() * (log_TO - target_TO)).sum()


def _range(part_OB: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each row, with zero between them; -1 and 1 for rows of zeros."""
    low, high = part_OB.amin(1, keepdim=True).clamp_max(0), part_OB.amax(1, keepdim=True).clamp_min(0)
    empty = low == high
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def _salient(salience_OB: Tensor) -> Tensor:
    """Mask of what is at least as salient as the least outlier (beyond 2 standard deviations)."""
    outlier_OB = (salience_OB - salience_OB.mean()).abs() > 2 * salience_OB.std()
    least = torch.where(outlier_OB, salience_OB, math.inf).min()
    return salience_OB >= least
