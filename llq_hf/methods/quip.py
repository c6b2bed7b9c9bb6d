"""QuIP (Chee et al., NeurIPS 2023, arXiv 2307.13304), after Cornell-RelaxML/QuIP at ac92cfc.

Idea
    Rounding hurts least if neither weights nor Hessian concentrate on single coordinates
    (incoherence).
    1. Columns are rescaled by s = (diag H / diag W^T W)^(1/4).
    2. Both sides are rotated by random orthogonal matrices: W~ = U (W s) V^T,
       H~ = V (H / s s^T) V^T. The output error stays the same, and W~ looks Gaussian.
    3. One range for the whole matrix, +-2.4 sigma, holds 2**bits levels.
    4. LDLQ rounds the columns from last to first, and feeds back the errors of those already
       rounded through L, the unit lower Cholesky factor of H~: k_i = round(t_i + (t - k) L)_i.
    5. `greedy_passes` revisit each code.
    At run time y = U^T (What (V (x / s))): codes stay packed, and U and V come from their seeds.

preset="best"
    `search_range` solves for several ranges and keeps the one of least tr(dW H dW^T), because 2.4
    sigma is right only near 4 bits. Five greedy passes follow. `aim` begins with another weight,
    which aims at the outputs of the full-precision model (numerics/aim), and `true_sequential`
    calibrates q/k/v, o, gate/up and down one after the other.

Storage
    name      shape               dtype   bits per weight
    weight    [O, I * bits / 32]  int32   bits
    scale     [1]                 fp32    32 / (O I)
    in_scale  [I]                 fp16    16 / O (absent if not rescale): s
    seeds     [2]                 int32   64 / (O I): of V and of U
    With incoherence=False, instead of scale and seeds, a grid per row:
    scale     [O, 1]              fp16    16 / I
    zero      [O * bits / 32]     int32   bits / I

Departures
    * U and V are Kronecker products, as the paper and the authors' docstring say. Their code runs
      the default of a misspelt flag, an orthogonal matrix of its own for each slice
      (`blocked=True`: about sqrt(n) times the memory at run time).
    * Seeds are drawn per (layer, linear, side) and stored; theirs are unseeded.
    * Their fp16 roundings between the steps are left out.
    * The greedy passes clamp each code at once (theirs clamps at the end of a pass and leaves the
      error uncorrected), and use H before `damp` (theirs after).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import (
    Part,
    UniformCodes,
    backward_rounder,
    divided,
    once,
    product,
    transformed,
)
from ..kernels.bitpack import pack, packed_words, unpack
from ..method import Flow, Job, Method, Packed
from ..numerics.aim import aimed
from ..numerics.cholesky import prepare_hessian
from ..numerics.grids import Affine, Uniform
from ..numerics.rotations import Rotation, rotation
from ..numerics.stats import Hessian, PairedHessian, Stat
from .options import check_aim, check_damp, check_least, check_positive

BLOCK = 128  # columns whose errors are fed back together; affects speed only
SEARCH_STEPS = 6
# Half-ranges to search, in sigmas, by bits. They start near the optimum of a unit Gaussian (1.49,
# 2.05, 2.51, 3.9 at 2, 3, 4, 8 bits) and go up, because LDLQ's feedback widens the distribution.
SEARCH_SPAN = {
    1: (0.8, 1.6),
    2: (1.4, 2.4),
    3: (2.0, 2.8),
    4: (2.3, 3.1),
    5: (2.6, 3.6),
    6: (3.0, 4.0),
    7: (3.3, 4.3),
    8: (3.5, 5.0),
}


@dataclass(frozen=True, kw_only=True)
class QuIP(Method):
    """range_sigma: half-range of the grid in standard deviations; search_range: search it;
    incoherence: rotate; rescale: step 1; blocked: the authors' default rotations; damp: a share of
    mean(diag H); seed: of the rotations.
    """

    name: ClassVar[str] = "quip"
    title: ClassVar[str] = "QuIP (Chee et al. 2023)"
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {
        "search_range": True,
        "greedy_passes": 5,
        "true_sequential": True,
        "aim": 0.5,
    }

    bits: int = 4
    range_sigma: float = 2.4
    search_range: bool = False
    incoherence: bool = True
    rescale: bool = True
    blocked: bool = False
    greedy_passes: int = 0
    true_sequential: bool = False
    aim: float = 0.0
    damp: float = 0.01
    seed: int = 0

    def check(self) -> None:
        check_positive(self, "range_sigma")
        check_least(self, 0, "greedy_passes")
        check_damp(self)
        check_aim(self)

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.aim else Flow.QUANTIZED

    @cached_property
    def row_grid(self) -> Uniform:
        """The grid of `incoherence=False`, one per row: the authors' qfn "a"."""
        return Uniform(self.bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        if self.incoherence:
            layout = {
                "weight": Spec((out_features, packed_words(in_features, self.bits)), torch.int32),
                "scale": Spec((1,), torch.float32),
                "seeds": Spec((2,), torch.int32),
            }
        else:
            layout = self.row_grid.layout(out_features, in_features)
        if self.rescale:
            layout["in_scale"] = Spec((in_features,), torch.float16)
        return layout

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        assert isinstance(stat, Hessian)
        W_OI, H_II = aimed(weight_OI, stat, self.aim), stat.H_II
        extra = {}
        # 1. Rescale columns.
        if self.rescale:
            s_I = _balance(W_OI, H_II)
            extra["in_scale"] = s_I.half()
            W_OI = W_OI * s_I
            H_II = H_II / H_II.abs().max().clamp_min(1e-30) / torch.outer(s_I, s_I)
        if not self.incoherence:
            # 3. to 5. on a grid per row.
            H_II, L_II = self._prepare(H_II, job)
            grid = self.row_grid.grid(W_OI)
            t_OI = (W_OI / grid.scale + grid.zero).clamp_(0, 2**self.bits - 1)
            codes_OI = self._round(t_OI, H_II, L_II)
            return {**self.row_grid.pack(codes_OI, grid), **extra}

        # 2. Rotate both sides.
        seeds = job.seeds(self.seed, 2)
        extra["seeds"] = torch.tensor(seeds, dtype=torch.int32, device=W_OI.device)
        V, U = self._sides(extra["seeds"], *W_OI.shape)
        W_OI = U.apply(V.apply(W_OI).T).T.contiguous()
        H_II = V.apply(V.apply(H_II).T)
        H_II = H_II * (len(H_II) / (torch.trace(H_II) + 1e-8))
        torch.diagonal(H_II).add_(0.01)  # the authors' first damping; `damp` is the second
        # 3. Range. 4. LDLQ. 5. Greedy passes.
        H_II, L_II = self._prepare(H_II, job)
        codes_OI, half_range = self._best_range(W_OI, H_II, L_II, job)
        return {"weight": pack(codes_OI, self.bits), "scale": half_range, **extra}

    def _prepare(self, H_II: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        """The Hessian with dead channels revived, and the strictly lower feedback matrix of its LDL
        decomposition.
        """
        H_II, L_II, _, _ = prepare_hessian(
            H_II, self.damp, job.notes, inverse=False, fallback="rtn"
        )
        if L_II is None:  # no feedback, which is rounding to nearest
            return H_II, torch.zeros_like(H_II)
        return H_II, (L_II / torch.diagonal(L_II)).tril_(-1)

    def _best_range(
        self, W_OI: Tensor, H_II: Tensor, L_II: Tensor, job: Job
    ) -> tuple[Tensor, Tensor]:
        """Codes [O, I] and half-range [1]: at `range_sigma`, or with `search_range` at the best of
        several ranges.
        """
        factors = [self.range_sigma]
        if self.search_range:
            factors += torch.linspace(*SEARCH_SPAN[self.bits], SEARCH_STEPS).tolist()
        sigma = W_OI.square().mean().sqrt()
        top = 2**self.bits - 1
        best: tuple[float, float, Tensor, Tensor] | None = None
        for factor in factors:
            half_range = (factor * sigma + 1e-16).reshape(1)
            t_OI = ((W_OI / half_range + 1) / 2 * top).clamp_(0, top)
            codes_OI = self._round(t_OI, H_II, L_II)
            if len(factors) == 1:
                return codes_OI, half_range
            error_OI = W_OI - half_range * (2 * codes_OI / top - 1)
            loss = float((error_OI @ H_II).mul_(error_OI).sum())
            if best is None or loss < best[0]:
                best = (loss, factor, codes_OI, half_range)
        assert best is not None
        job.notes["range_sigma"] = round(best[1], 4)
        return best[2], best[3]

    def _round(self, t_OI: Tensor, H_II: Tensor, L_II: Tensor) -> Tensor:
        """Integer codes from continuous ones: LDLQ, then greedy passes until no code changes."""
        codes_OI = ldlq(t_OI, L_II, 2**self.bits - 1)
        for _ in range(self.greedy_passes):
            if not greedy_pass(codes_OI, t_OI, H_II, 2**self.bits - 1):
                break
        return codes_OI

    def _sides(
        self, seeds: Tensor, out_features: int, in_features: int
    ) -> tuple[Rotation, Rotation]:
        """V and U from their seeds."""
        seed_in, seed_out = seeds.tolist()
        V = rotation(seed_in, in_features, self.blocked, seeds.device)
        U = rotation(seed_out, out_features, self.blocked, seeds.device)
        return V, U

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        if self.incoherence and not (packed["seeds"] >= 0).all():
            raise LLQError("seeds holds a number below zero")

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        if self.incoherence:
            V, U = self._sides(packed["seeds"], out_features, in_features)
            levels_OI = self._odd_levels(packed, in_features).float() * self._step(packed)
            weight_OI = V.invert(U.invert(levels_OI.T).T)
        else:
            weight_OI = self.row_grid.unpack(packed, in_features)
        return self._scaled(weight_OI, packed)

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        if self.incoherence:
            raise LLQError(
                f"{self.name} rotates inputs and outputs while the model runs; "
                "quantize with incoherence=False"
            )
        return self.row_grid.affine(packed, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if not self.incoherence:
            z = divided(x, packed, "in_scale") if self.rescale else x
            return self.row_grid.linear(z, packed, bias)
        in_features, top = x.shape[-1], 2**self.bits - 1
        V, U = once(
            packed, lambda: self._sides(packed["seeds"], out_features, in_features), "sides"
        )
        step = once(packed, lambda: self._step(packed), "step")
        s_I = packed["in_scale"] if self.rescale else None
        # Scaled before the product: fp16 must not overflow.
        z = transformed(
            x, V.forth, lambda: (V.apply(self._scaled(x, packed)) * step).to(x.dtype), s_I, step
        )
        part = Part(self.bits, in_features)
        stored = once(
            packed,
            lambda: UniformCodes(packed["weight"], in_features, (part,), 2.0, top / 2, in_features),
        )
        y = product(z, stored, lambda: self._odd_levels(packed, in_features))
        y = transformed(y, U.back, lambda: U.invert(y).to(x.dtype))
        return y if bias is None else y + bias

    def _scaled(self, x: Tensor, packed: Packed) -> Tensor:
        return x / packed["in_scale"].float() if self.rescale else x

    def _odd_levels(self, packed: Packed, in_features: int) -> Tensor:
        """2 k - (2**bits - 1), int16: exact in bf16 at every width."""
        codes_OI = unpack(packed["weight"], self.bits, in_features).to(torch.int16)
        return codes_OI.mul_(2).sub_(2**self.bits - 1)

    def _step(self, packed: Packed) -> Tensor:
        return packed["scale"].div(2**self.bits - 1)


def _balance(W_OI: Tensor, H_II: Tensor) -> Tensor:
    """s [I] = (diag H / diag W^T W)^(1/4), with H scaled to a maximum of 1, rounded to fp16."""
    h_I = (torch.diagonal(H_II) / H_II.abs().max().clamp_min(1e-30)).clamp_min(1e-8)
    w_I = W_OI.square().sum(0).clamp_min(1e-8)
    return (h_I / w_I).pow(0.25).clamp(1e-4, 6e4).half().float()


def ldlq(t_OI: Tensor, L_II: Tensor, top: int) -> Tensor:
    """Round t_OI to 0..top, from the last column to the first, with linear feedback L_II.

    L_II is strictly lower triangular. Halves are rounded up.
    """
    t_OI = t_OI.contiguous()
    codes_OI = torch.empty_like(t_OI)
    error_OI = torch.zeros_like(t_OI)
    columns, rounder = t_OI.shape[1], backward_rounder(codes_OI)
    for stop in range(columns, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        target_OB = t_OI[:, start:stop] + error_OI[:, stop:] @ L_II[stop:, start:stop]
        if rounder is not None:
            rounder(target_OB, t_OI, L_II, codes_OI, error_OI, start, top, greedy=False)
            continue
        for i in range(stop - 1, start - 1, -1):
            codes_OI[:, i] = (target_OB[:, i - start] + 0.5).floor_().clamp_(0, top)
            error_OI[:, i] = t_OI[:, i] - codes_OI[:, i]
            target_OB[:, : i - start].addmm_(error_OI[:, i, None], L_II[i, None, start:i])
    return codes_OI


def greedy_pass(codes_OI: Tensor, t_OI: Tensor, H_II: Tensor, top: int) -> bool:
    """Set each code to its best given all others, from the last column to the first, in place.

    Returns whether a code changed.
    """
    error_OI = codes_OI - t_OI
    before_OI = codes_OI.clone()
    columns, rounder = t_OI.shape[1], backward_rounder(codes_OI)
    for stop in range(columns, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        slope_OB = error_OI @ H_II[:, start:stop]
        if rounder is not None:
            rounder(slope_OB, t_OI, H_II, codes_OI, error_OI, start, top, greedy=True)
            continue
        for i in range(stop - 1, start - 1, -1):
            new_O = (codes_OI[:, i] - slope_OB[:, i - start] / H_II[i, i]).round_().clamp_(0, top)
            move_O = new_O - codes_OI[:, i]
            codes_OI[:, i] = new_O
            error_OI[:, i] += move_O
            slope_OB.addmm_(move_O[:, None], H_II[i, None, start:stop])
    # Read once a pass: at every read a GPU has to wait.
    return bool((codes_OI != before_OI).any())
