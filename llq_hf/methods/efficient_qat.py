"""EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062), after OpenGVLab/EfficientQAT at 78fd3fb.

Idea
    Quantization-aware training in two phases that both need little memory.

    Block-AP trains all parameters of one block after the other (weights, scales s, zero points z),
    so that the quantized block on quantized inputs reproduces the outputs of the full-precision
    block on full-precision inputs. The loss is the mean squared error, the optimizer AdamW without
    decay; the authors train 2 epochs of 4096 sequences, 2 per step. In every forward pass a weight
    is w^ = s (c - z) with c = clamp(round(w / s) + z, 0, 2**bits - 1). Gradients pass straight
    through the roundings, but not through the clamp: a clipped weight stays, and moves z instead.

    E2E-QP freezes codes and zero points, and trains the scales of the whole model on the next
    token; of image-text pairs on the answers' tokens.

Steps of `quantize_block` (Block-AP)
    1. Start: each linear gets its weights and its grids.
    2. Train.
    3. Pack: codes are chosen.

Storage (uniform grid; G = ceil(I / group_size) groups)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / group_size
    zero    [O * G * bits / 32]   int32   bits / group_size

Departures
    Everything that is not a linear stays as in the base model, also the norm gains, which the
    authors' Block-AP trains. Ranges contain zero at the start, and zero points are codes (theirs
    may leave the range of codes, and packing does not clamp them). Training is in fp32 with scales
    as stored in fp16, and codes are chosen from fp32 weights, not from weights cast to half. Scales
    down to the smallest fp16 are kept (theirs: 1e-4). As in theirs, gradients of E2E-QP are clipped
    to a norm of 0.3, and those of Block-AP are not clipped.

Presets
    "best" is for a calibration set of a few hundred sequences.
    rotated: the model is rotated first. Random Hadamard transforms of the residual stream and of
        the values of each head are merged into the weights, as in SpinQuant, so that the grids
        meet no outlier channels. A tied head gets a matrix of its own.
    solved: Block-AP starts at the codes and scales of GPTQ's error feedback with searched ranges
        and `refine` rounds of coordinate descent and refit. Each weight starts at the point of its
        code's cell that is nearest to its value.
    relative: learning rates are relative to the scales at the start, so that one rate suits every
        layer. They are also larger, because there are fewer steps.
    distill: E2E-QP learns the predictions of the full-precision model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.progress import PassListener
from ..kernels import bitpack
from ..method import Flow, Job, Packed, Rewrite, State, Step
from ..models.decoder import replace_module
from ..models.residual_stream import RotatedStream, random_rotations, residual_of
from ..models.sequences import Batch, Sequences
from ..numerics.activations import pass_through, round_through
from ..numerics.cholesky import prepare_hessian
from ..numerics.coordinate_descent import Objective, refined
from ..numerics.error_feedback import BLOCK, Solution, group_aware_order, solve
from ..numerics.grids import Grid, Uniform, checked_scale, grouped
from ..numerics.stats import PairedHessian, Stat
from .options import check_least
from .training import (
    ScaledLinear,
    Schedule,
    Trained,
    cosine,
    run_block,
    scaled_linears,
    train_block,
)
from .uniform import OnUniformGrid

TINY_SCALE = 2.0**-24  # the smallest fp16 above zero
FLOOR = 1 / 20  # the share of Block-AP's learning rates that is left at its end
WARMUP = 0.03  # share of the steps of E2E-QP
CLIP = 0.3  # largest norm of E2E-QP's gradients
DAMP = 0.01  # of the Hessian, a share of its mean diagonal
EDGE = 0.45  # a weight starts at most this far from the middle of its code's cell, in steps


@dataclass(frozen=True, kw_only=True)
class EfficientQAT(OnUniformGrid):
    """epochs, batch, weight_lr, grid_lr (of scales and zero points): Block-AP. tune_*: E2E-QP.

    weight_lr, tune_lr: 0 is the authors' value, 2e-5 at 2 bits and 1e-5 above. tune_epochs: 0 is no
    E2E-QP. seed: of the rotations and of the order of E2E-QP's sequences. The others: see the head
    of this file.
    """

    name: ClassVar[str] = "efficient_qat"
    title: ClassVar[str] = "EfficientQAT (Chen et al. 2025)"
    # With more bits, their learning rates are larger than a step of the grid.
    bits_range: ClassVar[range] = range(2, 5)
    observes: ClassVar[type[Stat] | None] = PairedHessian
    # twin, weights, gradients, two moments, two in the forward pass
    training_copies: ClassVar[int] = 7
    best: ClassVar[dict[str, Any]] = {
        "rotated": True,
        "solved": True,
        "relative": True,
        "epochs": 4,
        "weight_lr": 4e-3,
        "grid_lr": 1e-3,
        "tune_epochs": 4,
        "tune_batch": 4,
        "tune_lr": 5e-3,
        "distill": True,
    }

    bits: int = 2
    group_size: int = 64
    epochs: int = 2
    batch: int = 2
    weight_lr: float = 0.0
    grid_lr: float = 1e-4
    solved: bool = False
    relative: bool = False
    refine: int = 2
    tune_epochs: int = 1
    tune_batch: int = 32
    tune_lr: float = 0.0
    rotated: bool = False
    distill: bool = False
    seed: int = 0

    def check(self) -> None:
        _ = self.grid  # validates group_size
        check_least(self, 1, "batch", "tune_batch")
        check_least(self, 0, "epochs", "refine", "tune_epochs")
        check_least(self, 0, "weight_lr", "grid_lr", "tune_lr")

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, search=self.solved)

    @property
    def flow(self) -> Flow:
        return Flow.BOTH

    @property
    def tunes(self) -> bool:
        return self.tune_epochs > 0

    @property
    def published_lr(self) -> float:
        """The authors' learning rate of weights, and of scales in E2E-QP."""
        return 2e-5 if self.bits == 2 else 1e-5

    @property
    def rewrites(self) -> bool:
        return self.rotated

    def rewrite(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Rewrite | None:
        if not self.rotated:
            return None
        residual = residual_of(model)  # refuses models that cannot be rotated
        notes = {"rotations": "hadamard", "seed": self.seed, "untied": residual.tied}
        return RotatedStream(residual, *random_rotations(residual, self.seed), notes=notes)

    # --- Block-AP ---------------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        # 1. start
        jobs = {name: step.job(name) for name in step.linears}
        twin = copy.deepcopy(step.block).float().requires_grad_(False)
        parts = {
            name: self._started(linear, step.stats[name], jobs[name])
            for name, linear in step.linears.items()
        }
        for name, part in parts.items():
            replace_module(twin, name, part)
        # 2. train
        losses = self._train(step, twin, list(parts.values()))
        # 3. pack
        for job in jobs.values():
            job.notes.update({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})
        return {name: part.packed() for name, part in parts.items()}

    def _started(self, linear: nn.Linear, stat: Stat, job: Job) -> _Linear:
        """The linear with the weights and grids that training starts from."""
        weight_OI = linear.weight.detach().float()
        bias = None if linear.bias is None else linear.bias.detach().float()
        if not self.solved:
            return _Linear(weight_OI, self.grid.grids(weight_OI), bias, self)
        assert isinstance(stat, PairedHessian)
        solution = self._solution(weight_OI, stat, job)
        return _Linear(nearest_of_cells(weight_OI, solution), solution.grid_OG, bias, self)

    def _solution(self, weight_OI: Tensor, stat: PairedHessian, job: Job) -> Solution:
        """GPTQ's solution on searched grids, refined; columns in the model's order."""
        size = self.grid.size(weight_OI.shape[1])
        order = partial(group_aware_order, size=size)
        H_II, U_II, order_I, dead_I = prepare_hessian(
            stat.H_II, DAMP, job.notes, order, quick=True, fallback="rtn"
        )
        W_OI = weight_OI.masked_fill(dead_I, 0)[:, order_I]
        importance_I = stat.diagonal_I[order_I]
        group_I = torch.arange(len(order_I), device=order_I.device) // size
        block = size if size < BLOCK or size % BLOCK else BLOCK
        solution = solve(W_OI.clone(), U_II, self.grid, group_I, None, importance_I, block)
        if self.refine and U_II is not None:
            C_II = stat.C_II[order_I][:, order_I]
            objective = Objective.of(H_II, job.notes["damp"], C_II.T, weight_OI[:, order_I], W_OI)
            solution = refined(objective, solution, self.grid, self.refine)
        back_G = torch.argsort(order_I[::size] // size)
        grid_OG = Grid(*(part[:, back_G] for part in solution.grid_OG))
        return Solution(solution.codes_OI[:, torch.argsort(order_I)], grid_OG, group_I)

    def _train(self, step: Step, twin: nn.Module, parts: list[_Linear]) -> list[float]:
        """Train `parts`, which are linears of `twin`. Returns the mean loss of each epoch."""
        assert step.data is not None
        data = step.data
        weights = [part.weight_OGg for part in parts]
        grids = [p for part in parts for p in part.grid_parameters]
        rates = self.weight_lr or self.published_lr, self.grid_lr
        groups = [{"params": weights, "lr": rates[0]}, {"params": grids, "lr": rates[1]}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

        def descend(rows: slice, done: float) -> Tensor:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(done, floor=FLOOR)
            optimizer.zero_grad()
            total = torch.zeros((), device=weights[0].device)
            # One by one, because image-text pairs differ in length.
            for i in range(rows.start, rows.stop):
                one = slice(i, i + 1)
                with torch.enable_grad():
                    out_BSD = run_block(twin, data, one)
                    loss = F.mse_loss(out_BSD, data.targets(one).to(out_BSD))
                    loss = loss / (rows.stop - rows.start)
                    loss.backward()
                total += loss.detach()
            optimizer.step()
            return total

        trained = Trained([*weights, *grids], optimizer)
        return train_block(
            step,
            trained,
            self.epochs,
            self.batch,
            descend,
            "lower weight_lr or grid_lr, or run in float32",
        )

    # --- E2E-QP -----------------------------------------------------------------------------------

    def tune(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Sequences,
        listener: PassListener,
        state: State,
    ) -> Packed:
        linears = scaled_linears(student, self, lambda packed: UniformLinear(packed, self))
        steps = -(-self.tune_epochs * len(data) // self.tune_batch)
        lr = self.tune_lr or self.published_lr
        schedule = Schedule(steps, self.tune_batch, lr, self.seed, warmup=WARMUP, clip=CLIP)

        def loss_of(batch: Batch) -> Tensor:
            student_BPV = batch.to_learn(student)
            if not self.distill:
                return F.cross_entropy(*batch.labelled(student_BPV))
            with torch.no_grad():
                teacher_BPV = batch.to_learn(teacher)
            return divergence(student_BPV, teacher_BPV)

        schedule.run(list(linears.values()), loss_of, data, listener, state)
        return {f"{name}.scale": linear.stored() for name, linear in linears.items()}


def divergence(student_BPV: Tensor, teacher_BPV: Tensor) -> Tensor:
    """Mean KL divergence of the student's predictions from the teacher's, in nats per token."""
    student_TV, teacher_TV = (
        part.log_softmax(-1).flatten(0, 1) for part in (student_BPV, teacher_BPV)
    )
    return F.kl_div(student_TV, teacher_TV, reduction="batchmean", log_target=True)


# --- one linear under training --------------------------------------------------------------------


def nearest_of_cells(weight_OI: Tensor, solution: Solution) -> Tensor:
    """The weights nearest to `weight_OI` that round to the codes of the solution."""
    grid_OI = solution.columns()
    steps_OI = weight_OI / grid_OI.scale
    middle_OI = solution.codes_OI - grid_OI.zero
    return steps_OI.clamp(middle_OI - EDGE, middle_OI + EDGE) * grid_OI.scale


class _Linear(nn.Module):
    """A linear that quantizes its weight in every forward pass, on grids trained with it."""

    def __init__(
        self, weight_OI: Tensor, grid_OG: Grid, bias: Tensor | None, method: EfficientQAT
    ) -> None:
        super().__init__()
        self.method = method
        self.bias = bias
        self.levels = 2**method.bits - 1
        self.size = method.grid.size(weight_OI.shape[1])
        # Parameters are weights and scales in units of the scales at the start, or of 1.
        start_OG1 = grid_OG.scale[..., None].clone()
        self.unit_OG1 = start_OG1 if method.relative else torch.ones_like(start_OG1)
        self.shape = weight_OI.shape
        self.weight_OGg = nn.Parameter(grouped(weight_OI, self.size) / self.unit_OG1)
        self.scale_OG1 = nn.Parameter(start_OG1 / self.unit_OG1)
        self.zero_OG1 = nn.Parameter(grid_OG.zero[..., None].clone())

    @property
    def grid_parameters(self) -> list[nn.Parameter]:
        return [self.scale_OG1, self.zero_OG1]

    def forward(self, x: Tensor) -> Tensor:
        codes_OGg, grid = self._rounded()
        weight_OGg = grid.scale * self.unit_OG1 * (codes_OGg - grid.zero)
        return F.linear(x, weight_OGg.flatten(1)[:, : self.shape[1]], self.bias)

    def _rounded(self) -> tuple[Tensor, Grid]:
        """Codes [O, G, g], and the grid rounded to what is stored, both differentiable."""
        scale_OG1 = self.scale_OG1.clamp_min(TINY_SCALE)
        stored_OG1 = (scale_OG1.detach() * self.unit_OG1).half().clamp_min(TINY_SCALE).float()
        stored_OG1 = stored_OG1 / self.unit_OG1
        scale_OG1 = pass_through(scale_OG1, stored_OG1)
        zero_OG1 = round_through(self.zero_OG1).clamp(0, self.levels)
        codes_OGg = (round_through(self.weight_OGg / scale_OG1) + zero_OG1).clamp(0, self.levels)
        return codes_OGg, Grid(scale_OG1, zero_OG1)

    @torch.no_grad()
    def packed(self) -> Packed:
        """The tensors of the layout. Codes are chosen here."""
        codes_OGg, grid = self._rounded()
        codes_OI = codes_OGg.flatten(1)[:, : self.shape[1]]
        grid_OG = Grid((grid.scale * self.unit_OG1)[..., 0], grid.zero[..., 0])
        return self.method.grid.pack(codes_OI, grid_OG)


class UniformLinear(ScaledLinear):
    """A linear packed on uniform grids whose scales are trained."""

    def __init__(self, packed: Any, method: EfficientQAT) -> None:
        size = method.grid.size(packed.in_features)
        start_OG1 = packed.scale.float()[..., None]
        unit_OG1 = start_OG1 if method.relative else torch.ones_like(start_OG1)
        super().__init__(packed, size, start_OG1, unit_OG1)
        self.method = method
        zeros_N = bitpack.unpack(packed.zero, method.bits, start_OG1.numel())
        self.zero_OG1 = zeros_N.view_as(start_OG1).float()

    def bases(self, in_features: int) -> list[Tensor]:
        codes_OI = bitpack.unpack(self.words, self.method.bits, in_features).float()
        codes_OGg = grouped(codes_OI, self.size)
        return [(codes_OGg - self.zero_OG1).flatten(1)[:, :in_features]]

    def stored(self) -> Tensor:
        """fp16 scales [O, G], as they are stored."""
        scale_OG = self.method.grid.stored(self.scale().detach()[..., 0])
        return checked_scale(scale_OG, torch.float16).cpu()
