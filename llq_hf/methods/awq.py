"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978), after mit-han-lab/llm-awq at d6e797a.

Idea
    About 1 % of the input channels carry most of the output, and their columns deserve finer steps.
    So columns are multiplied by s before they are rounded to nearest, and inputs are divided by s.

Steps of `quantize_block`, for the linears that read the same input
    1. Scales: s_j = mean|x_j|**r, normalized to sqrt(max s * min s) = 1, for the r of 0, .05, ..
       .95 that changes the outputs least. The linears share s. Their outputs are those of the
       smallest module that holds them all (attention for q/k/v, the MLP for gate/up), on
       `search_tokens` tokens, the authors' number. A linear that is alone is measured by tr(dW H
       dW^T) on all tokens.
    2. Ranges: the largest weight of each group is clipped to 1.00, .95, .. .55 of itself, whichever
       changes the group's own outputs on 512 tokens least. q and k are not clipped, because their
       outputs are multiplied with each other.
    3. Codes: weights are rounded to nearest.

    Activations are those of the full-precision model.

Storage (G = ceil(I / group_size) groups)
    name      shape                 dtype   bits per weight
    weight    [O, I * bits / 32]    int32   bits
    scale     [O, G]                fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero      [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    in_scale  [I]                   fp16    16 / O, likewise: s

Departures
    s is stored beside each linear, which divides its input by it, instead of being folded into the
    norm before it. Scales and s are rounded to what is stored before they are compared and before
    codes are chosen. Ranges always contain zero (theirs cut off the top of a group without negative
    weights). The clip search also works per row and with few tokens (theirs stops with an error). A
    channel that never fired is scaled like the weakest one that did.

Options
    gqa: where several query heads share a value head, the authors leave o_proj alone, because s
        cannot be folded into v_proj ("skip"). "tie" gives those heads one s, which could be folded;
        "free" treats o_proj like any other linear.
    duo_scaling: also tries s_j / (mean share of |W_:j| in its group)**(1 - r) for each r. (AutoAWQ
        tries nothing else.)
    ranges: "clip" is step 2; "full" leaves it out. "search" tries 16 ranges shrunk at both ends,
        1.00 .. .25, and the neighbours of their zero points, also for q and k, and takes those of
        least tr(dW H dW^T) of the group.
    feedback: chooses codes with GPTQ's error feedback instead of rounding to nearest, columns of
        largest H_jj first. Activations are then those of the blocks quantized so far.

Presets
    "best" is ranges="search" and `feedback`. It stores the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.spec import Spec
from ..kernels import divided
from ..method import Flow, Job, Packed, Step
from ..models.decoder import hidden_of
from ..numerics.cholesky import largest_first, prepare_hessian
from ..numerics.error_feedback import solve
from ..numerics.grids import Grid, Uniform, grouped
from ..numerics.stats import Samples, Stat
from .options import check_choice, check_damp, check_least
from .uniform import OnUniformGrid

Weights = dict[str, Tensor]  # by name inside the block

NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv")  # parts of the linear's own name
ROWS = 1024  # rows whose ranges are searched together, to bound memory


@dataclass(frozen=True, kw_only=True)
class AWQ(OnUniformGrid):
    """group_size: -1 is one group per row. ratios: number of r tried. gqa: skip, tie or free.
    ranges: full, clip or search. damp: of `feedback`, a share of mean(diag H).
    """

    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ (Lin et al. 2024)"
    observes: ClassVar[type[Stat] | None] = Samples
    best: ClassVar[dict[str, Any]] = {"ranges": "search", "feedback": True}

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    ratios: int = 20
    duo_scaling: bool = False
    gqa: str = "skip"
    ranges: str = "clip"
    feedback: bool = False
    damp: float = 0.01
    search_tokens: int = 65536
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid  # validates group_size and scale_bits
        check_least(self, 1, "ratios", "search_tokens")
        check_choice(self, "gqa", ("skip", "tie", "free"))
        check_choice(self, "ranges", ("full", "clip", "search"))
        check_damp(self)

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, scale_bits=self.scale_bits)

    @property
    def flow(self) -> Flow:
        # Error feedback also corrects the errors of earlier blocks.
        return Flow.QUANTIZED if self.feedback else Flow.DENSE

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = super().layout(out_features, in_features)
        layout["in_scale"] = Spec((in_features,), self.grid.scale_dtype)
        return layout

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        packed = {}
        step.listener.stage("scales", len(step.groups) * self.ratios)
        for group in step.groups:
            jobs = [step.job(name) for name in group]
            weights = {name: step.linears[name].weight.detach().float() for name in group}
            stat = step.stats[group[0]]
            assert isinstance(stat, Samples)
            # 1. scales
            s_I, notes = self._best_scale(step, weights, stat)
            for job, (name, weight_OI) in zip(jobs, weights.items(), strict=True):
                job.notes.update(notes)
                # 2. ranges, 3. codes
                packed[name] = self._solve(weight_OI * s_I, s_I, stat, job)
        return packed

    # --- scales -----------------------------------------------------------------------------------

    def _best_scale(
        self, step: Step, weights: Weights, stat: Samples
    ) -> tuple[Tensor, dict[str, Any]]:
        """s [I] that linears of one input share, and the notes about it."""
        mean_I = self._magnitudes(step, list(weights), stat)
        if mean_I is None:
            step.listener.advance(self.ratios)
            return torch.ones_like(stat.mean_I), {"scaled": False}
        alone = len(weights) == 1
        loss_of = _trace_loss(stat.H_II) if alone else self._output_loss(step, list(weights))
        share_I = self._share(weights) if self.duo_scaling else torch.ones_like(mean_I)
        best: tuple[float, Tensor, dict[str, Any]] = (float("inf"), mean_I, {})
        for i in range(self.ratios):
            ratio = i / self.ratios
            for duo in (False, True) if self.duo_scaling else (False,):
                s_I = mean_I.pow(ratio)
                s_I = self._stored(s_I / (share_I.pow(1 - ratio) + 1e-4) if duo else s_I)
                tried = {name: self._rounded(W_OI * s_I) / s_I for name, W_OI in weights.items()}
                loss = loss_of(weights, tried)
                if loss < best[0]:
                    best = (loss, s_I, {"ratio": ratio, **({"duo": True} if duo else {})})
            step.listener.advance(1)
        if not best[2]:
            name = f"{step.prefix}.{next(iter(weights))}"
            raise LLQError(f"no scale of {name} gives finite outputs; use dtype float32")
        return best[1:]

    def _magnitudes(self, step: Step, group: list[str], stat: Samples) -> Tensor | None:
        """Mean |x| [I] that s is made from; None: these linears are not scaled."""
        mean_I = stat.mean_I
        parent = _parent(group[:1])
        values = step.linears.get(_inside(parent, "v_proj"))
        is_output = group == [_inside(parent, "o_proj")]
        if values is not None and is_output and values.out_features != len(mean_I):
            if self.gqa == "skip":
                return None
            if self.gqa == "tie":
                attention: Any = step.block.get_submodule(parent)
                mean_I = _tied(mean_I, values.out_features, int(attention.head_dim))
        alive_I = mean_I > 0
        if not alive_I.any():
            return torch.ones_like(mean_I)
        return torch.where(alive_I, mean_I, mean_I[alive_I].min())

    def _stored(self, s_I: Tensor) -> Tensor:
        """s normalized to sqrt(max s * min s) = 1, and rounded to what is stored."""
        s_I = s_I.clamp_min(1e-4)
        s_I = (s_I / (s_I.max() * s_I.min()).sqrt()).clamp(1e-4, 6e4)
        return s_I.to(self.grid.scale_dtype).float()

    def _share(self, weights: Weights) -> Tensor:
        """[I]: |w| divided by the largest |w| of its group; mean over all rows of all linears."""
        W_OGg = torch.cat([self._grouped(W_OI) for W_OI in weights.values()])
        share_OGg = W_OGg.abs() / (W_OGg.abs().amax(-1, keepdim=True) + 1e-6)
        return share_OGg.mean(0).flatten()[: next(iter(weights.values())).shape[1]]

    def _output_loss(self, step: Step, group: list[str]) -> Callable[[Weights, Weights], float]:
        """The squared error of the common parent's outputs on calibration data, as a function of
        the weights of `group`.
        """
        parent = _parent(group)
        module = step.block.get_submodule(parent)
        dtype = step.linears[group[0]].weight.dtype
        calls = self._calls(step, module)

        def loss(weights: Weights, candidates: Weights) -> float:
            replaced = {
                f"{name.removeprefix(parent + '.')}.weight": W.to(dtype)
                for name, W in candidates.items()
            }
            total = torch.zeros((), device=step.linears[group[0]].weight.device)
            for args, kwargs, target in calls:
                output = hidden_of(torch.func.functional_call(module, replaced, args, kwargs))
                total += (output.float() - target.float()).square().sum()
            return float(total)

        return loss

    def _calls(self, step: Step, module: nn.Module) -> list[tuple[Any, dict[str, Any], Tensor]]:
        """(arguments, keyword arguments, output) of `module` on evenly spaced sequences, which have
        about `search_tokens` tokens at most.
        """
        calls: list[tuple[Any, dict[str, Any], Tensor]] = []
        data = step.data
        assert data is not None
        stride = -(-data.count * data.length // self.search_tokens)  # of the sequences
        batch = data.batches()[0].stop * stride

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args, kwargs, hidden_of(output)))

        with module.register_forward_hook(record, with_kwargs=True):
            for start in range(0, data.count, batch):
                hidden_BSD, kwargs = data.inputs(
                    slice(start, min(start + batch, data.count), stride)
                )
                step.block(hidden_BSD, **kwargs)
        return calls

    # --- grids and codes --------------------------------------------------------------------------

    def _grouped(self, W_OI: Tensor) -> Tensor:
        """[O, G, g]. Padding the last group with zeros changes no range: all contain zero."""
        return grouped(W_OI, self.grid.size(W_OI.shape[1]))

    def _rounded(self, W_OI: Tensor) -> Tensor:
        """The weight rounded to nearest, on the grid of full ranges."""
        W_OGg = self._grouped(W_OI)
        grid = self.grid.grid(W_OGg)
        return grid.values(grid.codes(W_OGg, self.bits)).flatten(1)[:, : W_OI.shape[1]]

    def _solve(self, W_OI: Tensor, s_I: Tensor, stat: Samples, job: Job) -> Packed:
        """The tensors of the scaled weight W_OI: find ranges, then codes."""
        clipped = self.ranges == "clip" and not any(
            part in job.name.rpartition(".")[2] for part in NOT_CLIPPED
        )
        W_OGg = self._grouped(W_OI)
        H_II = stat.H_II / torch.outer(s_I, s_I)
        if self.ranges == "search" or clipped:
            x_TI = stat.rows_TI / s_I
            H_Ggg = _diagonal_blocks(x_TI.T @ x_TI if clipped else H_II, W_OGg.shape[-1])
            parts = [self._best_grid(part_OGg, H_Ggg) for part_OGg in torch.split(W_OGg, ROWS)]
            grid_OG = Grid(*(torch.cat(found) for found in zip(*parts, strict=True)))
        else:
            grid_OG = Grid(*(part.squeeze(-1) for part in self.grid.grid(W_OGg)))
        if self.feedback:
            codes_OI = self._fed_back(W_OI, grid_OG, H_II, job)
        else:
            codes_OI = self.grid.spread(grid_OG, W_OI.shape[1]).codes(W_OI, self.bits)
        return {**self.grid.pack(codes_OI, grid_OG), "in_scale": s_I.to(self.grid.scale_dtype)}

    def _best_grid(self, W_OGg: Tensor, H_Ggg: Tensor) -> Grid:
        """The candidate [O, G] with the least error in each group's own part of the outputs; of
        equal ones, the first.
        """
        best: Grid | None = None
        for grid in self._candidates(W_OGg):
            error_OGg = grid.values(grid.codes(W_OGg, self.bits)) - W_OGg
            loss_OG1 = (
                torch.einsum("ogi,gij->ogj", error_OGg, H_Ggg).mul_(error_OGg).sum(-1, keepdim=True)
            )
            if best is None:
                best, least_OG1 = grid, loss_OG1
                continue
            better_OG1 = loss_OG1 < least_OG1
            least_OG1 = torch.where(better_OG1, loss_OG1, least_OG1)
            best = Grid(
                *(torch.where(better_OG1, new, old) for new, old in zip(grid, best, strict=True))
            )
        assert best is not None
        return Grid(*(part.squeeze(-1) for part in best))

    def _candidates(self, W_OGg: Tensor) -> Iterator[Grid]:
        """Grids [O, G, 1] of shrunken ranges, the full one first."""
        if self.ranges == "clip":
            high = W_OGg.abs().amax(-1, keepdim=True)
            low = -high
            steps = 10
            neighbours = False
        else:
            low = W_OGg.amin(-1, keepdim=True).clamp_max(0)
            high = W_OGg.amax(-1, keepdim=True).clamp_min(0)
            steps = 16
            neighbours = not self.sym
        for i in range(steps):
            share = 1 - i / 20
            grid = self.grid.grid(W_OGg.clamp(share * low, share * high))
            for move in (0, -1, 1) if neighbours else (0,):
                yield Grid(grid.scale, (grid.zero + move).clamp(0, 2**self.bits - 1))

    def _fed_back(self, W_OI: Tensor, grid_OG: Grid, H_II: Tensor, job: Job) -> Tensor:
        """Codes [O, I] with GPTQ's error feedback. H_II is overwritten."""
        # Unlike in GPTQ, dead columns keep their weights.
        _, U_II, order_I, _ = prepare_hessian(
            H_II, self.damp, job.notes, largest_first, fallback="rtn"
        )
        group_I = order_I // self.grid.size(len(order_I))
        solution = solve(W_OI[:, order_I], U_II, self.grid, group_I, grid_OG)
        return solution.codes_OI[:, torch.argsort(order_I)]

    # --- meaning ----------------------------------------------------------------------------------

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        return weight_OI / packed["in_scale"].float()

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return super().linear(divided(x, packed, "in_scale"), packed, bias, out_features)


def _trace_loss(H_II: Tensor) -> Callable[[Weights, Weights], float]:
    """The loss tr(dW H dW^T): the squared error of the linears' own outputs."""

    def loss(weights: Weights, candidates: Weights) -> float:
        errors = [candidates[name] - W_OI for name, W_OI in weights.items()]
        return sum(float((error_OI @ H_II).mul_(error_OI).sum()) for error_OI in errors)

    return loss


def _tied(mean_I: Tensor, value_features: int, head_dim: int) -> Tensor:
    """mean_I averaged over the query heads that share a value head."""
    # [value heads, queries per value, head_dim]
    heads = mean_I.view(value_features // head_dim, -1, head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).flatten()


def _parent(names: list[str]) -> str:
    """Name of the smallest module that holds all of these linears; "" for the block itself."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _inside(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _diagonal_blocks(H_II: Tensor, size: int) -> Tensor:
    """[G, g, g]: the blocks of H along the diagonal, one per group of channels."""
    fill = -len(H_II) % size
    H_II = nn.functional.pad(H_II, (0, fill, 0, fill))
    return H_II.view(len(H_II) // size, size, -1, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
