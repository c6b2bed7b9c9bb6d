"""BiLLM (Huang et al., ICML 2024, arXiv 2402.04291), after Aaronhuang-778/BiLLM at dc137eb (its
method "braq").

Idea
    Blocks of 128 columns are binarized from left to right. Each block's error is repaired in the
    later blocks as GPTQ does, but nothing is repaired inside a block. For each block:
    1. Salience S is w^2 / U_jj^2 (or w, with salience="magnitude").
    2. A few *columns* are salient, and their weights get two signs: m +- a1 +- a2, the second sign
       for the error of the first. They are the first 1..49 columns in the order of sum_rows |S|;
       the number of least squared error is taken.
    3. One threshold on |S| splits the other weights, for all rows, into a low and a mid group; it
       is the one of least squared error among 81 quantiles, 0.10..0.90.
    4. Low and mid weights get one sign each: mu +- a. Averages are per row.
    `bits` is the paper's figure 1.1. It counts 1 + r signs, with r the share of salient columns,
    but neither the groups nor the averages. The notes give the measured 1 + r as "signs".

preset="best"
    The searches of 2 and 3 look at w instead of S (`search_on`). When the levels of a block are
    found, they get `arb_rounds` of alternating refits (ARB, Li et al. 2024, arXiv 2410.03129).
    5. `refine` rounds over the whole linear follow: each code is set to the best of its row's four
       levels given all others, then the levels to their best given the codes. They lower the output
       error. The outputs aimed at are by `dense_share` those of the full-precision model, else
       those of the original weight on the quantized model's activations.
    The storage is the same.

    Perplexity     full precision   study   search and ARB   best
    stories260K    3.66             157     38               12     rounds and share chosen on it
    babyllama      2.98             26      11.8             4.3    not used to choose anything

Storage (G = ceil(I / block_size) blocks)
    name     shape         dtype   bits per weight
    weight   [O, I / 16]   int32   2: a salient weight's two signs; else whether it is mid, and sign
    salient  [I / 32]      int32   1 / O: which columns are salient
    scale    [O, G, 4]     fp16    64 / block_size: a of low, mid; a1, a2
    mean     [O, G, 3]     fp16    48 / block_size: mu of low, mid; m = mu1 + mu2
    These are 2.88 bits at block 128. scale_bits=32 stores fp32, and mu1 and mu2 apart.

Departures
    * A last block of less than 50 columns tries fewer salient counts (theirs crashes), and a block
      of one column has none.
    * A weight equal to its mean is coded as above it (theirs: as the mean, a third level).
    * Averages are rounded to the stored fp16 before signs are chosen, and those of the two salient
      signs are added up.
    * A Hessian that will not factorize is damped more. If nothing helps, salience is w^2 and
      nothing is repaired; the notes say "fallback".
    * Their code searches how well S is approximated (search_on="salience"), the paper how well W is
      (search_on="weight"). Published numbers come from the former.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..common.spec import Spec
from ..kernels import LevelCodes, once, product
from ..kernels.bitpack import pack, packed_words, unpack
from ..method import Flow, Job, Method, Packed
from ..numerics.cholesky import prepare_hessian
from ..numerics.coordinate_descent import Objective, descend, refit_levels
from ..numerics.error_feedback import by_blocks
from ..numerics.grids import at_once, checked_scale, scale_dtype
from ..numerics.stats import PairedHessian, Stat
from .options import check_choice, check_damp, check_least, check_range, check_refine

SALIENCES = ("hessian", "magnitude")
SEARCHES = ("salience", "weight")
MOST_SALIENT = 50  # a block has fewer salient columns than this
QUANTILES = [percent / 100 for percent in range(10, 91)]


@dataclass(frozen=True, kw_only=True)
class BiLLM(Method):
    """block_size: in columns; salience: "hessian" or "magnitude"; search_on: "salience" or
    "weight"; arb_rounds, refine, dense_share: see above; feedback: repair later blocks; damp: a
    share of mean(diag H).
    """

    name: ClassVar[str] = "billm"
    title: ClassVar[str] = "BiLLM (Huang et al. 2024)"
    bits_range: ClassVar[tuple[float, ...]] = (1.1,)
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {"search_on": "weight", "arb_rounds": 15, "refine": 5}

    bits: float = 1.1
    block_size: int = 128
    salience: str = "hessian"
    search_on: str = "salience"
    arb_rounds: int = 0
    refine: int = 0
    dense_share: float = 0.5
    feedback: bool = True
    damp: float = 0.01
    scale_bits: int = 16

    def check(self) -> None:
        _ = self._scale_dtype  # validates scale_bits
        check_least(self, 1, "block_size")
        check_least(self, 0, "arb_rounds")
        check_choice(self, "salience", SALIENCES)
        check_choice(self, "search_on", SEARCHES)
        check_refine(self)
        check_range(self, "dense_share", 0, 1)
        check_damp(self)

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.refine and self.dense_share else Flow.QUANTIZED

    @property
    def _scale_dtype(self) -> torch.dtype:
        return scale_dtype(self.scale_bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        blocks = -(-in_features // self.block_size)
        means = 3 if self._merged else 4
        return {
            "weight": Spec((out_features, packed_words(in_features, 2)), torch.int32),
            "salient": Spec((packed_words(in_features, 1),), torch.int32),
            "scale": Spec((out_features, blocks, 4), self._scale_dtype),
            "mean": Spec((out_features, blocks, means), self._scale_dtype),
        }

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        assert isinstance(stat, PairedHessian)
        # Without a factor of the Hessian, salience is w^2 and nothing is repaired.
        H_II, U_II, _, dead_I = prepare_hessian(stat.H_II, self.damp, job.notes, fallback="rtn")
        W_OI = weight_OI.masked_fill(dead_I, 0)
        d_I = torch.ones_like(W_OI[0]) if U_II is None else torch.diagonal(U_II)
        codes_OI = torch.empty_like(W_OI, dtype=torch.uint8)
        code = Code([], [], codes_OI, torch.zeros_like(dead_I), self.block_size)

        def round_block(start: int, stop: int, w_OB: Tensor) -> Tensor:
            w_OB = w_OB.contiguous()
            # 1. Salience.
            salience_OB = w_OB
            if self.salience == "hessian":
                salience_OB = w_OB.square() / d_I[start:stop].square()
            target_OB = salience_OB if self.search_on == "salience" else w_OB
            # 2. Salient columns. 3. Mid weights.
            salient_B = salient_columns(target_OB, salience_OB)
            mid_OB = mid_weights(target_OB, salience_OB, salient_B)
            # 4. Levels and signs.
            scale_O4, mean_O4, codes_OB = self._binarize(w_OB, salient_B, mid_OB)
            code.scales.append(scale_O4)
            code.means.append(mean_O4)
            code.salient_I[start:stop] = salient_B
            code.codes_OI[:, start:stop] = codes_OB
            return code.block(start // self.block_size)

        by_blocks(W_OI.clone(), U_II if self.feedback else None, round_block, self.block_size)
        job.notes["signs"] = round(1 + float(code.salient_I.float().mean()), 4)
        # 5. Refinement.
        if self.refine and U_II is not None:
            share = self.dense_share if self.flow is Flow.BOTH else 0.0
            target_II = torch.lerp(stat.H_II, stat.C_II.T, share)
            self._refine(code, Objective.of(H_II, job.notes["damp"], target_II, weight_OI, W_OI))
        return self._pack(code)

    def _refine(self, code: Code, objective: Objective) -> None:
        """`refine` rounds: set each code to its best given all others, then the levels of each
        block to theirs.
        """
        size = self.block_size
        salient = code.salient_I.tolist()

        def nearest(j: int, w_O: Tensor) -> Tensor:
            levels_O8 = tables[j // size]
            levels_O4 = levels_O8[:, 4:] if salient[j] else levels_O8[:, :4]
            code_O = (levels_O4 - w_O[:, None]).abs().argmin(1)
            code.codes_OI[:, j] = code_O
            return levels_O4.gather(1, code_O[:, None])[:, 0]

        for _ in range(self.refine):
            tables = [level_table(*pair) for pair in zip(code.scales, code.means, strict=True)]
            values_OI = torch.cat([code.block(g) for g in range(len(tables))], dim=1)
            values_OI = descend(objective, values_OI, nearest)
            for g, start in enumerate(range(0, values_OI.shape[1], size)):
                part = slice(start, start + size)
                levels_O8 = torch.cat([code.scales[g], code.means[g]], dim=1)
                basis_O8B = basis(code.codes_OI[:, part], code.salient_I[part])
                levels_O8 = refit_levels(
                    objective, values_OI, start, basis_O8B, levels_O8, self._rounded
                )
                code.scales[g], code.means[g] = levels_O8[:, :4], levels_O8[:, 4:]
                values_OI[:, part] = code.block(g)

    def _pack(self, code: Code) -> Packed:
        mean_OGm = torch.stack(code.means, dim=1)
        if self._merged:
            mean_OGm = mean_OGm[..., [0, 1, 3]]
        return {
            "weight": pack(code.codes_OI, 2),
            "salient": pack(code.salient_I.to(torch.uint8), 1),
            "scale": checked_scale(torch.stack(code.scales, dim=1), self._scale_dtype),
            "mean": checked_scale(mean_OGm, self._scale_dtype),
        }

    @property
    def _merged(self) -> bool:
        """Whether the two means of salient weights are stored as their sum.

        In fp32 they are stored apart, so that values are the authors' to the last bit.
        """
        return self.scale_bits == 16

    def _binarize(
        self, w_OB: Tensor, salient_B: Tensor, mid_OB: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales [O, 4] and means [O, 4], rounded as stored, and codes [O, B] of a block.

        The four are of low weights, mid weights, first and second sign of salient weights.
        """
        # Levels: averages of the weights, rounded.
        salient_OB = salient_B.expand_as(w_OB)
        low = fit(w_OB, ~(salient_OB | mid_OB), self.arb_rounds)
        mid = fit(w_OB, mid_OB, self.arb_rounds)
        first = fit(w_OB, salient_OB)
        second = fit(w_OB - one_sign(w_OB, *first), salient_OB)
        split_O1 = first[1]  # above it, the first sign is +
        if self._merged or self.arb_rounds:
            sum_O1 = first[1] + second[1]
            first = (first[0], torch.zeros_like(first[1]))
            second = (second[0], sum_O1)
        if self.arb_rounds:
            first, second = refit_two(w_OB, salient_OB, first, second, self.arb_rounds)
        (a_O4, mu_O4) = (
            self._rounded(torch.cat(parts, dim=1))
            for parts in zip(low, mid, first, second, strict=True)
        )
        # Codes: the signs of what is left of each weight.
        if self.arb_rounds:
            split_O1 = mu_O4[:, 3:]
        mean_OB = torch.where(mid_OB, mu_O4[:, 1:2], mu_O4[:, 0:1])
        above_OB = w_OB >= torch.where(salient_OB, split_O1, mean_OB)
        rest_OB = w_OB - (torch.where(above_OB, a_O4[:, 2:3], -a_O4[:, 2:3]) + mu_O4[:, 2:3])
        codes_OB = torch.where(
            salient_OB,
            2 * above_OB.byte() + (rest_OB >= mu_O4[:, 3:]).byte(),
            2 * mid_OB.byte() + above_OB.byte(),
        )
        return a_O4, mu_O4, codes_OB

    def _rounded(self, levels: Tensor) -> Tensor:
        """Levels as they will be stored, in fp32.

        Where they overflow they are the largest number of the dtype, which `_pack` refuses.
        """
        largest = torch.finfo(self._scale_dtype).max
        return levels.clamp(-largest, largest).to(self._scale_dtype).float()

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        mean_OG4 = packed["mean"].float()
        if self._merged:
            both = mean_OG4[..., 2:]
            mean_OG4 = torch.cat([mean_OG4[..., :2], torch.zeros_like(both), both], dim=-1)
        codes_OI = unpack(packed["weight"], 2, in_features)
        salient_I = unpack(packed["salient"], 1, in_features)
        return look_up(packed["scale"].float(), mean_OG4, codes_OI, salient_I, self.block_size)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        view = once(packed, lambda: self._view(packed, in_features))
        return product(x, view, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _view(self, packed: Packed, in_features: int) -> LevelCodes:
        """The codes as kernels read them."""
        return LevelCodes(
            packed["weight"],
            in_features,
            packed["scale"],
            self.block_size,
            packed["mean"],
            packed["salient"],
        )


class Code(NamedTuple):
    """The choices made for a linear so far: scales and means [O, 4] of each block, codes, mask of
    salient columns, and block size.
    """

    scales: list[Tensor]
    means: list[Tensor]
    codes_OI: Tensor
    salient_I: Tensor
    size: int

    def block(self, g: int) -> Tensor:
        """Values [O, B] of block g."""
        part = slice(g * self.size, (g + 1) * self.size)
        table = (self.scales[g][:, None], self.means[g][:, None])
        return look_up(*table, self.codes_OI[:, part], self.salient_I[part], self.size)


def look_up(
    scale_OG4: Tensor, mean_OG4: Tensor, codes_OI: Tensor, salient_I: Tensor, size: int
) -> Tensor:
    """Values [O, I] of 2-bit codes: one gather from the eight levels of each row and block."""
    columns_I = torch.arange(len(salient_I), device=salient_I.device)
    first_I = columns_I.div_(size, rounding_mode="floor").mul_(8)
    first_I += 4 * salient_I
    levels_OK = level_table(scale_OG4, mean_OG4).flatten(1)
    return torch.gather(levels_OK, 1, codes_OI.long().add_(first_I))


def basis(codes_OB: Tensor, salient_B: Tensor) -> Tensor:
    """[O, 8, B]: the factor of each level in each value.

    The eight are the scales of low, mid, first and second sign, then the means of the same four.
    """
    first_OB = (codes_OB >> 1).float()
    second_OB = (codes_OB & 1).float() * 2 - 1
    plain_B = (~salient_B).float()
    salient_B = salient_B.float()
    low_OB = (1 - first_OB) * plain_B
    mid_OB = first_OB * plain_B
    signs = [
        low_OB * second_OB,
        mid_OB * second_OB,
        (2 * first_OB - 1) * salient_B,
        second_OB * salient_B,
    ]
    ones_OB = salient_B.expand_as(low_OB)
    return torch.stack([*signs, low_OB, mid_OB, torch.zeros_like(ones_OB), ones_OB], dim=1)


def level_table(scale: Tensor, mean: Tensor) -> Tensor:
    """Levels [..., 8] from scales and means [..., 4].

    They are low -+, mid -+, and of salient weights --, -+, +-, ++.
    """
    a_low, a_mid, a1, a2 = scale.unbind(-1)
    mu_low, mu_mid, mu1, mu2 = mean.unbind(-1)
    plain = [mu_low - a_low, mu_low + a_low, mu_mid - a_mid, mu_mid + a_mid]
    salient = [(mu1 + s1 * a1) + (mu2 + s2 * a2) for s1 in (-1, 1) for s2 in (-1, 1)]
    return torch.stack(plain + salient, dim=-1)


# --- binary approximation -------------------------------------------------------------------------


def masked_mean(x_OB: Tensor, mask_OB: Tensor) -> Tensor:
    """Mean [O, 1] over the masked entries of each row; 0 if there are none."""
    return (x_OB * mask_OB).sum(-1, keepdim=True) / mask_OB.sum(-1, keepdim=True).clamp_min(1)


def fit(x_OB: Tensor, mask_OB: Tensor, rounds: int = 0) -> tuple[Tensor, Tensor]:
    """(a, mu), both [O, 1], of x ~ mu +- a over the masked entries.

    They are refitted to their own signs `rounds` times.
    """
    mu_O1 = masked_mean(x_OB, mask_OB)
    a_O1 = masked_mean((x_OB - mu_O1).abs(), mask_OB)
    for _ in range(rounds):
        sign_OB = torch.where(x_OB >= mu_O1, 1.0, -1.0)
        mu_O1 = masked_mean(x_OB - a_O1 * sign_OB, mask_OB)
        a_O1 = masked_mean(sign_OB * (x_OB - mu_O1), mask_OB)
    return a_O1, mu_O1


def refit_two(
    x_OB: Tensor,
    mask_OB: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    rounds: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Refit x ~ m +- a1 +- a2: set m, a1, a2 in turn to their best for the others and the present
    signs.
    """
    (a1_O1, zero_O1), (a2_O1, m_O1) = first, second
    for _ in range(rounds):
        s1_OB = torch.where(x_OB >= m_O1, 1.0, -1.0)
        s2_OB = torch.where(x_OB - a1_O1 * s1_OB >= m_O1, 1.0, -1.0)
        m_O1 = masked_mean(x_OB - a1_O1 * s1_OB - a2_O1 * s2_OB, mask_OB)
        a1_O1 = masked_mean(s1_OB * (x_OB - m_O1 - a2_O1 * s2_OB), mask_OB)
        a2_O1 = masked_mean(s2_OB * (x_OB - m_O1 - a1_O1 * s1_OB), mask_OB)
    return (a1_O1, zero_O1), (a2_O1, m_O1)


def one_sign(x_OB: Tensor, a_O1: Tensor, mu_O1: Tensor) -> Tensor:
    """x rounded to mu +- a."""
    return torch.sign(x_OB - mu_O1) * a_O1 + mu_O1


def approximate(x_OB: Tensor, mask_OB: Tensor, signs: int) -> Tensor:
    """x approximated by one or two signs per entry where masked; 0 elsewhere.

    Masks [C, O, B] give C approximations.
    """
    sum_OB = torch.zeros_like(x_OB)
    for _ in range(signs):
        rest_OB = x_OB - sum_OB
        sum_OB = sum_OB + one_sign(rest_OB, *fit(rest_OB, mask_OB)) * mask_OB
    return sum_OB


# --- salient columns and mid weights --------------------------------------------------------------


def salient_columns(target_OB: Tensor, salience_OB: Tensor) -> Tensor:
    """Mask [B] of the salient columns: the first n by sum of |salience|.

    n has the least squared error of `target` if both parts get two signs.
    """
    rank_B = torch.argsort(salience_OB.abs().sum(0), descending=True, stable=True).argsort()
    count_C = torch.arange(1, min(MOST_SALIENT, len(rank_B)), device=rank_B.device)
    if not len(count_C):  # a block of one column
        return torch.zeros_like(rank_B, dtype=torch.bool)
    mask_CB = rank_B < count_C[:, None]
    errors = []
    for mask_COB in torch.split(mask_CB[:, None], candidates_at_once(target_OB)):
        both_COB = approximate(target_OB, mask_COB, 2) + approximate(target_OB, ~mask_COB, 2)
        errors.append((target_OB - both_COB).square_().mean((1, 2)))
    return mask_CB.index_select(0, torch.cat(errors).argmin(0, keepdim=True))[0]


def candidates_at_once(target_OB: Tensor) -> int:
    """How many candidates to compare together.

    On CPUs one, if its block is not small: torch sums a large one up by several threads.
    """
    return max(1, at_once(target_OB.device, cpu=1 << 15) // target_OB.numel())


def mid_weights(target_OB: Tensor, salience_OB: Tensor, salient_B: Tensor) -> Tensor:
    """Mask [O, B] of mid weights: outside salient columns, with |salience| at or above a threshold.

    The threshold has the least squared error of `target`.
    """
    # Zeros of the salient columns stay in the sample of the quantiles, as in the authors' code.
    size_OB = salience_OB.abs() * ~salient_B
    rest_OB = target_OB - approximate(target_OB, salient_B.expand_as(target_OB), 2)
    threshold_C = quantiles(size_OB.flatten(), QUANTILES)
    errors = []
    for threshold_COB in torch.split(threshold_C[:, None, None], candidates_at_once(target_OB)):
        mid_COB = ~salient_B & (size_OB >= threshold_COB)
        low_COB = ~(salient_B | mid_COB)
        split_COB = approximate(target_OB, low_COB, 1) + approximate(target_OB, mid_COB, 1)
        errors.append((rest_OB - split_COB).square_().mean((1, 2)))
    best = torch.cat(errors).argmin(0, keepdim=True)
    return ~salient_B & (size_OB >= threshold_C.index_select(0, best))


def quantiles(x_N: Tensor, shares: list[float]) -> Tensor:
    """Linearly interpolated quantiles; torch.quantile takes no more than 2**24 values."""
    sorted_N = x_N.sort().values
    rank = torch.tensor(shares, device=x_N.device) * (len(x_N) - 1)
    below = rank.long()
    above = (below + 1).clamp_max(len(x_N) - 1)
    return torch.lerp(sorted_N[below], sorted_N[above], rank - below)
