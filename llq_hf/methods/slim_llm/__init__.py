"""SliM-LLM (Huang et al., ICML 2025, arXiv 2405.14917), after Aaronhuang-778/SliM-LLM at cfdf5ff.

Idea
    Groups of columns need different widths.
    1. Bit allocation. The salience of a group is the sum of W^2 / d^2, where d is the diagonal of
       U, the upper Cholesky factor of H^-1. For i = 1, 2, ... the i least salient groups of a
       linear give one bit each to the i most salient ones, so the mean stays `bits`. The outputs of
       each choice are compared with the true ones, both as distributions over the output channels.
       The i of least KL divergence wins. This takes a second pass over the calibration data.
    2. Grids. The range of each row in a group is scaled by one of 101 shares: the one of least
       sum |error|**2.4, in which errors of salient weights count `lambda_salience` times.
    3. GPTQ's error feedback, with the groups as its blocks.
    A group of 1 bit has the levels mean +- mean|w|. In a linear of fewer than 4 groups all have
    `bits`, and the notes say so.

SliM-LLM+
    `plus` replaces 2 and 3 by OmniQuant's learnable clipping, trained on the block's output.

preset="best"
    All of these cost no stored bit. `search_range` tries wider spans of ranges, and zeros between
    whole steps, with each column's error weighted by H_ii; the allocation uses it too.
    `try_uniform` lets the allocation also choose i = 0. `act_group_aware`, `true_sequential`, `aim`
    and `refine` are GPTQ's (methods/gptq.py), and so is `gptaq`, which "best" does not use.

Storage (n = ceil(I / group_size) groups); value = scale * (code - zero)
    name    shape          dtype   bits per weight
    weight  [O, I*bits/32] int32   bits
    scale   [O, n]         fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O*n*4 / 32]   int32   4 / group_size (8 bits, twice that, with scale_bits=32)
    widths  [n]            uint8   8 / (O * group_size)
    mean    [O, n]         fp32    only at 2 bits with scale_bits=32: it is added to the value

    A short last group keeps `bits`. storage.py describes how codes and zeros lie.

Departures
    * Saliences come from the factor that the feedback uses, dead columns are zeroed, and each zero
      follows its range. The authors rank by a factor of H + 0.01 I, leave the 0.01 in H, keep dead
      columns, and give leading groups of bits - 1 (>= 2) the zero of a symmetric range.
      `as_published=True` does all that, and rounds where they round.
    * Their packed files round the mean of 1-bit groups to an integer; these do not.
    * A short last group keeps its width.
    * SliM-LLM+: the mean is added back in 1-bit groups (theirs only compare with it). These start
      at mean|w| (theirs at 1.48 times it). Ranges always hold zero. The allocation is searched in
      the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import LLQError
from ...common.spec import Spec
from ...kernels import BlockRounder, block_rounder, once, product
from ...method import Flow, Job, Method, Packed, Step
from ...numerics.aim import aimed
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
from .grid_fit import GridFit
from .levels import Factor, Levels, most_salient
from .plus import Clipping, train
from .storage import FEWEST_GROUPS, Storage


@dataclass(frozen=True, kw_only=True)
class SliMLLM(Method):
    """bits: the mean width; damp: a share of mean(diag H); pairs: how many groups have bits - 1,
    and as many bits + 1 (-1: searched for). For plus: epochs, learning_rate, aug_loss (also aim at
    the full-precision block on quantized inputs).
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
        "aim": 0.5,
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
    aim: float = 0.0
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
            "aim",
            "refine",
        )
        if self.plus and any(getattr(self, option) for option in feedback):
            raise LLQError(
                "plus=True trains ranges instead of searching them: "
                f"it goes without {', '.join(feedback)}"
            )

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.gptaq or self.aim or self.plus else Flow.QUANTIZED

    @property
    def uniform(self) -> Uniform:
        return Uniform(self.bits, scale_bits=self.scale_bits)

    @cached_property
    def grid_fit(self) -> GridFit:
        return GridFit(self.uniform, self.storage, self.search_range, self.lambda_salience)

    # --- storage ----------------------------------------------------------------------------------

    @cached_property
    def storage(self) -> Storage:
        return Storage(self.bits, self.group_size, self.scale_bits, self.pairs)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return self.storage.layout(out_features, in_features)

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        self.storage.widths(packed, in_features)

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        return self.storage.unpack(packed, out_features, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        view = once(packed, lambda: self.storage.view(packed, in_features))
        return product(x, view, lambda: self.dequantize(packed, out_features, in_features), bias)

    # --- 1. bit allocation ------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        if self.plus:
            return self._train_block(step)
        # 1. How many pairs of groups move a bit, in each linear.
        pairs = self._pairs(step)
        # 2. and 3. Grids and codes of each linear.
        packed = {}
        for name, linear in step.linears.items():
            job, stat = step.job(name), step.stats[name]
            assert isinstance(stat, PairedHessian)
            weight_OI = linear.weight.detach().float()
            packed[name] = self._quantize_linear(weight_OI, stat, pairs[name], job)
        return packed

    @torch.no_grad()
    def _pairs(self, step: Step) -> dict[str, int]:
        """For each linear: how many groups give a bit to as many others."""
        pairs = {
            name: self.storage.most_pairs(linear.in_features)
            for name, linear in step.linears.items()
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
        with ExitStack() as hooks:
            for name, search in searches.items():
                hooks.enter_context(step.linears[name].register_forward_hook(search.hook))
            step.run("bit allocation")
        return {**pairs, **{name: search.best() for name, search in searches.items()}}

    def _factor(
        self, stat: PairedHessian, notes: dict[str, Any], allocating: bool = False
    ) -> Factor:
        """The factor of a linear's Hessian. allocating: undamped if the authors' is."""
        size = self.group_size
        H_II, U_II, order_I, dead_I = prepare_hessian(
            stat.H_II,
            0.0 if self.as_published and allocating else self.damp,
            notes,
            partial(group_aware_order, size=size) if self.act_group_aware else None,
            quick=not self.as_published,
            ridge=0.01 if self.as_published else 0.0,
            fallback="rtn",
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
        """The width of each group, after `pairs` of them moved a bit."""
        widths = [self.bits] * self.storage.groups(weight_OI.shape[1])
        ranking = self._ranking(weight_OI, spread_I)
        for low, high in zip(ranking[:pairs], reversed(ranking), strict=False):
            widths[low], widths[high] = self.bits - 1, self.bits + 1
        return widths

    def _note(self, widths: list[int], job: Job) -> None:
        """Write the allocation into the job's notes."""
        job.notes["pairs"] = widths.count(self.bits + 1)
        if self.pairs == -1 and len(widths) < FEWEST_GROUPS:
            job.notes["allocation"] = f"uniform: {len(widths)} groups are too few to move bits"

    # --- 2. grids and 3. codes --------------------------------------------------------------------

    def _quantize_linear(
        self, weight_OI: Tensor, stat: PairedHessian, pairs: int, job: Job
    ) -> Packed:
        # The factor of the Hessian; columns that never fired are zeroed.
        factor = self._factor(stat, job.notes)
        if factor.U_II is not None:
            weight_OI = aimed(weight_OI, stat, self.aim)
        W_OI = weight_OI if self.as_published else weight_OI.masked_fill(factor.dead_I, 0)
        # 1. The width of each group.
        widths = self._widths(W_OI, factor.spread_I, pairs)
        self._note(widths, job)
        # 2. and 3. Grids and codes, with the columns in the order of solving.
        order_I = factor.order_I
        ordered_widths = [widths[group] for group in factor.groups]
        W_OI = W_OI[:, order_I]
        drift_II, target_II = None, factor.H_II
        if self.gptaq and factor.U_II is not None:
            C_II = stat.C_II[order_I][:, order_I]
            drift_II = drift(factor.H_II, C_II, factor.U_II, self.gptaq)
            target_II = torch.lerp(factor.H_II, C_II.T, self.gptaq)
        codes_OI, levels_OG = self._solve(W_OI.clone(), factor, drift_II, ordered_widths)
        if self.refine and factor.U_II is not None:
            objective = Objective.of(factor.H_II, job.notes["damp"], target_II, W_OI, W_OI)
            codes_OI, levels_OG = self._refine(objective, codes_OI, levels_OG, ordered_widths)
        # Back into the model's order.
        back_G = torch.argsort(torch.tensor(factor.groups, device=codes_OI.device))
        levels_OG = levels_OG.map(lambda t: t[:, back_G])
        return self.storage.pack(codes_OI[:, torch.argsort(order_I)], levels_OG, widths)

    def _solve(
        self, W_OI: Tensor, factor: Factor, drift_II: Tensor | None, widths: list[int]
    ) -> tuple[Tensor, Levels]:
        """Codes and grids: round the columns of W_OI one by one, with GPTQ's feedback.

        All is in the order of solving. W_OI is overwritten.
        """
        U_II = factor.U_II
        diagonal_I = torch.diagonal(factor.H_II)
        spread_I = factor.spread_I[factor.order_I]
        codes_IO = torch.empty_like(W_OI.T)
        grids: list[Levels] = []  # of the groups so far

        def begin(start: int, stop: int) -> None:
            """2. Fit the grid of a group, to weights as repaired so far."""
            group = start // self.group_size
            part_OB = W_OI[:, start:stop]
            importance_B = diagonal_I[start:stop]
            if not self.search_range:
                importance_B = torch.ones_like(importance_B)
            sym = self.as_published and all(width < self.bits for width in widths[: group + 1])
            salient_OB = most_salient(part_OB.square() / spread_I[start:stop].square())
            grids.append(self.grid_fit.fit(part_OB, widths[group], importance_B, salient_OB, sym))

        def round_column(j: int, w_O: Tensor) -> Tensor:
            """3. The codes of a column, on the grid of its group."""
            levels_O = grids[-1].map(Tensor.flatten)
            codes_IO[j] = code_O = levels_O.codes(w_O, widths[len(grids) - 1])
            return levels_O.values(code_O)

        rounder = None
        if U_II is not None:
            W_OI = W_OI.contiguous()
            rounder = block_rounder(W_OI, U_II, self.bits, self.group_size, drift_II)
        if rounder is not None:
            self._by_kernel(rounder, begin, grids, widths)
            codes_IO = rounder.codes_IO.float()
        else:
            by_columns(
                W_OI,
                U_II,
                round_column,
                begin,
                block=self.group_size,
                drift_II=drift_II,
                fused=not self.as_published,
            )
        levels_OG = Levels(*(torch.cat(parts, dim=1) for parts in zip(*grids, strict=True)))
        return codes_IO.T.contiguous(), levels_OG

    def _by_kernel(
        self,
        rounder: BlockRounder,
        begin: Callable[[int, int], None],
        grids: list[Levels],
        widths: list[int],
    ) -> None:
        """The loop of `by_columns` on a GPU, one launch for a group."""
        rows, columns = rounder.W_OI.shape
        for group, start in enumerate(range(0, columns, self.group_size)):
            stop = min(start + self.group_size, columns)
            begin(start, stop)
            scale_BO, zero_BO, mean_BO = (part.T.expand(stop - start, rows) for part in grids[-1])
            rounder(start, stop, scale_BO, zero_BO, False, mean_BO, widths[group])
        rounder.check()

    def _refine(
        self, objective: Objective, codes_OI: Tensor, levels_OG: Levels, widths: list[int]
    ) -> tuple[Tensor, Levels]:
        """`refine` rounds: set each code to its best given all others, then each scale to its
        best.
        """
        group_I = torch.arange(codes_OI.shape[1], device=codes_OI.device) // self.group_size
        codes_IO = codes_OI.T.contiguous()
        for _ in range(self.refine):

            def nearest(j: int, w_O: Tensor, levels_OG: Levels = levels_OG) -> Tensor:
                group = j // self.group_size
                levels_O = levels_OG.map(lambda t: t[:, group])
                codes_IO[j] = levels_O.codes(w_O, widths[group])
                return levels_O.values(codes_IO[j])

            values_OI = levels_OG.map(lambda t: t[:, group_I]).values(codes_IO.T)
            descend(objective, values_OI, nearest)
            # Means stay, so scales are refitted to what the means leave.
            mean_OI = levels_OG.mean[:, group_I]
            rest = Objective(objective.H_II, objective.B_OI - mean_OI @ objective.H_II)
            solution = Solution(codes_IO.T, Grid(levels_OG.scale, levels_OG.zero), group_I)
            levels_OG = levels_OG._replace(scale=refitted(rest, solution, self.uniform).scale)
        return codes_IO.T.contiguous(), levels_OG

    # --- SliM-LLM+ --------------------------------------------------------------------------------

    def _train_block(self, step: Step) -> dict[str, Packed]:
        """Train the clipping of all linears of a block together, towards the full-precision block's
        output.
        """
        jobs = {name: step.job(name) for name in step.linears}
        # 1. Bit allocation, unless a killed run has saved its own.
        saved = step.state.load()
        pairs = self._pairs(step) if saved is None else {}
        clippings = {}
        for name, linear in step.linears.items():
            if saved is None:
                stat = step.stats[name]
                assert isinstance(stat, PairedHessian)
                weight_OI = linear.weight.detach().float()
                spread_I = self._factor(stat, {}).spread_I
                widths = self._widths(weight_OI, spread_I, pairs[name])
            else:
                widths = saved[f"{name}.widths"].tolist()
            self._note(widths, jobs[name])
            clippings[name] = Clipping(self, linear, widths)
        # In place of 2. and 3.: train the ranges, then round to nearest.
        losses = train(self, step, clippings, saved)
        for job in jobs.values():
            job.notes["loss"] = [losses[0], losses[-1]]
        with torch.no_grad():
            return {name: clipping.pack() for name, clipping in clippings.items()}
