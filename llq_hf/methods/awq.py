"""draft"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LLQError
from ..feedback import by_columns
from ..grids import Grid, Spec, Uniform
from ..method import Flow, Job, Method, Packed, Step
from ..stats import Samples, Stat, factorize, revive_dead

CLIP_STEPS = 10  # ranges of 1.00, 0.95, .. 0.55 of the largest weight
SHRINK_STEPS = 16  # of `search_range`: 1.00, 0.95, .. 0.25 of both ends
ROWS = 1024  # whose ranges are searched together: bounds memory only
NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv")  # what they make is multiplied, not added: the authors leave them alone


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ (Lin et al. 2024)"
    observes: ClassVar[type[Stat] | None] = Samples
    best: ClassVar[dict[str, Any]] = {}

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    ratios: int = 20
    duo_scaling: bool = False
    gqa: str = "skip"
    clip: bool = True
    search_range: bool = False
    feedback: bool = False
    damp: float = 0.01
    search_tokens: int = 65536
    scale_bits: int = 16

    @property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, scale_bits=self.scale_bits)

    @property
    def flow(self) -> Flow:
        return Flow.DENSE

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {**self.grid.layout(out_features, in_features), "in_scale": Spec((in_features,), self.grid.scale_dtype)}

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        packed = {}
        step.listener.stage("scales", len(step.groups) * self.ratios)
        for group in step.groups:
            jobs = [step.job(name) for name in group]
            s_I = self._best_scale(step, group, jobs)
            for name, job in zip(group, jobs, strict=True):
                stat = step.stats[name]
                assert isinstance(stat, Samples)
                packed[name] = self._solve(step.linears[name].weight.detach().float(), s_I, stat, job)
        return packed

    def _best_scale(self, step, group, jobs) -> Tensor:
        stat = step.stats[group[0]]
        weights = {name: step.linears[name].weight.detach().float() for name in group}
        mean_I = self._magnitudes(step, group[0], stat.mean_I)
        if mean_I is None:
            step.listener.advance(self.ratios)
            return torch.ones_like(stat.mean_I)
        loss_of = self._parent_loss(step, group) if len(group) > 1 else _trace_loss(weights, stat.H_II)
        best = None
        for i in range(self.ratios):
            for duo in (False, True) if self.duo_scaling else (False,):
                ratio = i / self.ratios
                s_I = mean_I.pow(ratio)
                if duo:
                    s_I = s_I / (self._weight_share(weights).pow(1 - ratio) + 1e-4)
                s_I = _normalized(s_I).to(self.grid.scale_dtype).float()
                loss = loss_of({name: self._rounded(W_OI * s_I) / s_I for name, W_OI in weights.items()})
                if best is None or loss < best[0]:
                    best = (loss, ratio, s_I, duo)
            step.listener.advance(1)
        for job in jobs:
            job.notes["ratio"] = best[1]
            if best[3]:
                job.notes["duo"] = True
        return best[2]

    def _weight_share(self, weights):
        W_OGg = torch.cat([self._grouped(W) for W in weights.values()])
        share = W_OGg.abs() / (W_OGg.abs().amax(-1, keepdim=True) + 1e-6)
        I = next(iter(weights.values())).shape[1]
        return share.mean(0).flatten()[:I]

    def _magnitudes(self, step, name, mean_I):
        parent, _, leaf = name.rpartition(".")
        v = step.linears.get(f"{parent}.v_proj")
        if leaf == "o_proj" and v is not None and v.out_features != step.linears[name].in_features:
            if self.gqa == "skip":
                return None
            if self.gqa == "tie":
                d = step.block.get_submodule(parent).head_dim
                m = mean_I.view(v.out_features // d, -1, d)
                mean_I = m.mean(1, keepdim=True).expand_as(m).reshape(-1)
        alive = mean_I > 0
        if not alive.any():
            return torch.ones_like(mean_I)
        return torch.where(alive, mean_I, mean_I[alive].min())

    def _parent_loss(self, step, group):
        parent_name = _common_parent(group)
        parent = step.block.get_submodule(parent_name)
        calls = []

        def hook(module, args, kwargs, output):
            calls.append((args, kwargs, _first(output)))

        data = step.data
        stride = -(-data.count * data.length // self.search_tokens)
        size = data.batches()[0].stop
        h = parent.register_forward_hook(hook, with_kwargs=True)
        for start in range(0, data.count, size * stride):
            hidden, kwargs = data.inputs(slice(start, start + size * stride, stride))
            step.block(hidden, **kwargs)
        h.remove()

        def loss(weights):
            p = {f"{n.removeprefix(parent_name).lstrip('.')}.weight": W.to(step.linears[n].weight.dtype) for n, W in weights.items()}
            total = 0
            for args, kwargs, target in calls:
                out = _first(torch.func.functional_call(parent, p, args, kwargs))
                total += (out.float() - target.float()).square().sum()
            return float(total)

        return loss

    def _grouped(self, W_OI):
        size = W_OI.shape[1] if self.group_size == -1 else self.group_size
        return nn.functional.pad(W_OI, (0, -W_OI.shape[1] % size)).view(len(W_OI), -1, size)

    def _rounded(self, W_OI):
        W_OGg = self._grouped(W_OI)
        grid = self.grid.grid(W_OGg)
        return grid.values(grid.codes(W_OGg, self.bits)).flatten(1)[:, : W_OI.shape[1]]

    def _solve(self, W_OI, s_I, stat, job):
        scaled_OI = W_OI * s_I
        H_II = stat.H_II / torch.outer(s_I, s_I)
        W_OGg = self._grouped(scaled_OI)
        moments = (x := stat.rows_TI / s_I).T @ x if not self.search_range else H_II
        grid = self._best_grid(W_OGg, moments, job)
        I = W_OI.shape[1]
        if self.feedback:
            full = Grid(*(p.expand_as(W_OGg).flatten(1)[:, :I] for p in grid))
            codes_OI = self._feedback(scaled_OI, full, H_II, job)
        else:
            codes_OI = grid.codes(W_OGg, self.bits).flatten(1)[:, :I]
        return {**self.grid.pack(codes_OI, Grid(*(p.squeeze(-1) for p in grid))), "in_scale": s_I.to(self.grid.scale_dtype)}

    def _feedback(self, W_OI, grid_OI, H_II, job):
        revive_dead(H_II)
        order_I = torch.argsort(torch.diagonal(H_II), descending=True, stable=True)
        U_II = factorize(H_II[order_I][:, order_I], self.damp, job.notes, inverse=True)
        codes_IO = torch.empty_like(W_OI.T)
        g_IO = Grid(*(p.T[order_I].contiguous() for p in grid_OI))

        def rounded(i, w_O):
            g = Grid(g_IO.scale[i], g_IO.zero[i])
            codes_IO[i] = c = g.codes(w_O, self.bits)
            return g.values(c)

        by_columns(W_OI[:, order_I], U_II, rounded)
        return codes_IO.T[:, torch.argsort(order_I)]

    def _best_grid(self, W_OGg, H_II, job):
        leaf = job.name.rpartition(".")[2]
        if not self.search_range and (not self.clip or any(p in leaf for p in NOT_CLIPPED)):
            return self.grid.grid(W_OGg)
        H = _diagonal_blocks(H_II, W_OGg.shape[-1])
        best = None
        for grid in self._candidates(W_OGg):
            e = grid.values(grid.codes(W_OGg, self.bits)) - W_OGg
            err = (torch.einsum("ogi,gij->ogj", e, H) * e).sum(-1, keepdim=True)
            if best is None:
                best, be = grid, err
            else:
                better = err < be
                be = torch.where(better, err, be)
                best = Grid(*(torch.where(better, n, o) for n, o in zip(grid, best)))
        return best

    def _candidates(self, W_OGg):
        if not self.search_range:
            top = W_OGg.abs().amax(-1, keepdim=True)
            for i in range(CLIP_STEPS):
                l = top * (1 - i / 20)
                yield self.grid.grid(W_OGg.clamp(-l, l))
            return
        lo, hi = W_OGg.amin(-1, keepdim=True).clamp_max(0), W_OGg.amax(-1, keepdim=True).clamp_min(0)
        for i in range(SHRINK_STEPS):
            p = 1 - i / 20
            g = self.grid.grid(W_OGg.clamp(p * lo, p * hi))
            for off in (0,) if self.sym else (0, -1, 1):
                yield Grid(g.scale, (g.zero + off).clamp(0, 2**self.bits - 1))

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        return self.grid.unpack(packed, in_features) / packed["in_scale"].float()

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        z = (x / packed["in_scale"].float()).to(x.dtype)
        return nn.functional.linear(z, self.grid.unpack(packed, x.shape[-1]).to(x.dtype), bias)


def _normalized(s_I):
    s_I = s_I.clamp_min(1e-4)
    return (s_I / (s_I.max() * s_I.min()).sqrt()).clamp(1e-4, 6e4)


def _trace_loss(weights, H_II):
    def loss(cand):
        return sum(float(((d := cand[n] - W) @ H_II).mul_(d).sum()) for n, W in weights.items())
    return loss


def _first(o):
    return o[0] if isinstance(o, tuple) else o


def _common_parent(names):
    parts = [n.split(".")[:-1] for n in names]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _diagonal_blocks(H_II, size):
    pad = -len(H_II) % size
    H = nn.functional.pad(H_II, (0, pad, 0, pad))
    return H.view(len(H) // size, size, -1, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
