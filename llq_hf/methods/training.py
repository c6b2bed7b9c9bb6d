"""Training loops that methods share: epochs over one block, and steps over a whole model.

Legend: B sequences of a step, S tokens each, D hidden size, O out_features, I in_features, g group
size, G groups, K basis matrices.

A block is trained to reproduce the outputs of the full-precision block on the full-precision
model's activations, for several epochs over the calibration sequences in their order. The packed
model is trained as a whole, but only in the scales of its linears; codes stay. After a kill, both
resume from what their `State` saved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import LLQError
from ..common.prefix import below
from ..common.progress import PassListener
from ..method import BlockData, Method, State, Step
from ..models.decoder import hidden_of as first_output
from ..models.decoder import replace_module
from ..models.sequences import Batch, Sequences
from ..numerics.grids import grouped

MODEL_TOKENS = 2048  # of one forward pass of the whole model, to bound the memory of its logits
SAVED_EVERY = 32  # steps of whole-model training between two saved states


class Trained(NamedTuple):
    """Parameters and their optimizer, which can be saved and restored."""

    parameters: Sequence[Tensor]
    optimizer: torch.optim.Optimizer

    def snapshot(self) -> dict[str, Tensor]:
        """All tensors that are needed to resume, on the CPU."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}"] = parameter.detach().cpu()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{key}": tensor.cpu() for key, tensor in moments.items()}
        return tensors

    @torch.no_grad()
    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take over the tensors of a `snapshot`."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(saved[f"{i}"])
            own = below(f"{i}.", saved)
            # load_state_dict would cast. A fused optimizer wants its step counter on the device of
            # the parameter, others want it on the CPU.
            if own:
                fused = self.optimizer.defaults.get("fused")
                place = parameter.device if fused else torch.device("cpu")
                self.optimizer.state[parameter] = {
                    key: tensor.to(place if key == "step" else parameter.device)
                    for key, tensor in own.items()
                }


def cosine(done: float, floor: float = 0.0, warmup: float = 0.0) -> float:
    """Factor of the learning rate when `done` (0..1) of the steps are done: linearly up during
    `warmup`, then along a cosine down to `floor`.
    """
    if done < warmup:
        return done / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def settled_attention(device: torch.device) -> AbstractContextManager[None]:
    """Inside, the gradients of attention have the same bits in every run.

    On CUDA the fused kernels add them up by atomics, so torch's plain products take their place; it
    needs memory for S x S weights of each head. Elsewhere nothing changes.
    """
    if device.type != "cuda":
        return nullcontext()
    plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return plain


# --- a block --------------------------------------------------------------------------------------


def run_block(block: nn.Module, data: BlockData, rows: slice) -> Tensor:
    """fp32 output [B, S, D] of an fp32 block on the quantized inputs of `rows` (one row, if the
    sequences are image-text pairs).
    """
    hidden_BSD, kwargs = data.inputs(rows)
    return first_output(block(hidden_BSD.float(), **in_fp32(kwargs)))


def in_fp32(value: Any) -> Any:
    """`value` with all floating-point tensors in it (masks, rotary tables) in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_fp32(inner) for key, inner in value.items()}
    return tuple(map(in_fp32, value)) if isinstance(value, tuple) else value


def train_block(
    step: Step,
    trained: Trained,
    epochs: int,
    batch: int,
    descend: Callable[[slice, float], Tensor],
    cure: str,
) -> list[float]:
    """Train, or resume an interrupted training. Returns the mean loss of each epoch.

    descend(rows, done): makes one step on these sequences, when `done` (0..1) of the training is
        done, and returns the loss, a scalar on any device.
    cure: the end of the LLQError that is raised where a loss is not finite.
    """
    assert step.data is not None
    count = step.data.count
    parts = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    saved = step.state.load()
    losses: list[float] = [] if saved is None else saved["losses"].tolist()
    if saved is not None:
        trained.restore(saved)
    step.listener.stage("training", epochs * count)
    step.listener.advance(len(losses) * count)
    device = trained.parameters[0].device
    for epoch in range(len(losses), epochs):
        total = torch.zeros((), device=device)
        for i, rows in enumerate(parts):
            size = rows.stop - rows.start
            with settled_attention(device):
                loss = descend(rows, (epoch * len(parts) + i) / (epochs * len(parts)))
            total += loss * size
            step.listener.advance(size)
        losses.append(float(total) / count)
        # Only once per epoch, because reading a loss makes a GPU wait.
        if not math.isfinite(losses[-1]):
            raise LLQError(
                f"the training loss of {step.prefix} is not finite in epoch {epoch + 1}; {cure}"
            )
        step.state.save({"losses": torch.tensor(losses, dtype=torch.float64), **trained.snapshot()})
    return losses


# --- the whole model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How the scales of a whole model are trained.

    steps: of `batch` sequences each; every sequence is used before any comes again. seed: of their
    order. warmup: see `cosine`. clip: largest norm of the gradients; 0: no limit.
    """

    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: float = 0.0
    clip: float = 0.0

    def rows(self, count: int) -> Iterator[list[int]]:
        """Numbers of the sequences of each step, out of `count`.

        Each epoch has an order of its own, which is the same in every run.
        """
        random = torch.Generator().manual_seed(self.seed)
        rows = torch.empty(0, dtype=torch.long)
        for _ in range(self.steps):
            while len(rows) < self.batch:
                rows = torch.cat([rows, torch.randperm(count, generator=random)])
            yield rows[: self.batch].tolist()
            rows = rows[self.batch :]

    def run(
        self,
        linears: Sequence[ScaledLinear],
        loss_of: Callable[[Batch], Tensor],
        data: Sequences,
        listener: PassListener,
        state: State,
    ) -> None:
        """Train the factors of `linears` by AdamW on loss_of(batch), or resume an interrupted
        training. LLQError where a loss is not finite.

        Every sequence of a step counts alike, however long it is.
        """
        factors = [linear.factor.requires_grad_(True) for linear in linears]
        optimizer = torch.optim.AdamW(factors, lr=self.lr, weight_decay=0.0)
        trained = Trained(factors, optimizer)
        saved = state.load()
        if saved is not None:
            trained.restore(saved)
        done = 0 if saved is None else int(saved["step"])
        listener.stage("training the scales", self.steps)
        listener.advance(done)
        for step, rows in enumerate(self.rows(len(data))):
            if step < done:
                continue
            optimizer.param_groups[0]["lr"] = self.lr * cosine(
                step / self.steps, warmup=self.warmup
            )
            optimizer.zero_grad()
            with settled_attention(factors[0].device):
                self._descend(step, rows, data, loss_of)
            if self.clip:
                torch.nn.utils.clip_grad_norm_(factors, self.clip)
            optimizer.step()
            for linear in linears:
                linear.confine()
            listener.advance(1)
            if (step + 1) % SAVED_EVERY == 0 and step + 1 < self.steps:
                state.save({"step": torch.tensor(step + 1), **trained.snapshot()})

    def _descend(
        self, step: int, rows: list[int], data: Sequences, loss_of: Callable[[Batch], Tensor]
    ) -> None:
        for batch in data.batches(rows, MODEL_TOKENS):
            loss = loss_of(batch) * len(batch.ids_BS) / len(rows)
            if not torch.isfinite(loss):
                raise LLQError(
                    f"the training loss is {float(loss)} in step {step}; give a smaller lr than "
                    f"{self.lr}"
                )
            loss.backward()  # type: ignore[no-untyped-call]


class ScaledLinear(nn.Module, ABC):
    """A packed linear whose scales are trained: W^ = sum_k scale_k * basis_k, per group of a row.

    The parameter is `factor`, the scale in units of `unit_OGK`. The unit is the scale at the start,
    so that one learning rate suits all layers, or 1.
    """

    def __init__(self, packed: nn.Linear, size: int, start_OGK: Tensor, unit_OGK: Tensor) -> None:
        super().__init__()
        self.words = packed.weight
        self.bias = packed.bias
        self.size = size
        self.start_OGK = start_OGK
        self.unit_OGK = unit_OGK
        self.factor = nn.Parameter(start_OGK / unit_OGK)

    @abstractmethod
    def bases(self, in_features: int) -> list[Tensor]:
        """The K integer matrices [O, I] of the stored codes."""

    def scale(self) -> Tensor:
        """Scales [O, G, K] as trained so far."""
        return self.unit_OGK * self.factor

    @torch.no_grad()
    def confine(self) -> None:
        """Clamp every scale to between 1/16 and 16 times its start."""
        ends = self.start_OGK / self.unit_OGK / 16, self.start_OGK / self.unit_OGK * 16
        self.factor.clamp_(torch.minimum(*ends), torch.maximum(*ends))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Scaled.apply(x, self.scale(), self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def restored(self, scale_OGK: Tensor, in_features: int) -> Tensor:
        """fp32 weight [O, I] with these scales."""
        weight_OGg: Any = 0.0
        for basis_OI, scale_OG in zip(self.bases(in_features), scale_OGK.unbind(-1), strict=True):
            weight_OGg = weight_OGg + grouped(basis_OI, self.size) * scale_OG[..., None]
        weight_OI: Tensor = weight_OGg.flatten(1)[:, :in_features]
        return weight_OI


class _Scaled(torch.autograd.Function):
    """x W^^T with gradients of x and of the scales. The backward pass computes W^ again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_OGK: Tensor, linear: ScaledLinear) -> Tensor:
        ctx.save_for_backward(x, scale_OGK)
        ctx.linear = linear
        return F.linear(x, linear.restored(scale_OGK, x.shape[-1]).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_OGK = ctx.saved_tensors
        linear: ScaledLinear = ctx.linear
        weight_OI = linear.restored(scale_OGK, x.shape[-1]).to(x.dtype)
        gradient_OGg = grouped(
            (gradients[0].flatten(0, -2).T @ x.flatten(0, -2)).float(), linear.size
        )
        by_scale = [
            (gradient_OGg * grouped(basis_OI, linear.size)).sum(-1)
            for basis_OI in linear.bases(x.shape[-1])
        ]
        return gradients[0] @ weight_OI, torch.stack(by_scale, dim=-1), None


Kind = TypeVar("Kind", bound=ScaledLinear)


def scaled_linears(
    student: nn.Module, method: Method, wrap: Callable[[nn.Linear], Kind]
) -> dict[str, Kind]:
    """Replace every linear that `method` packed by the ScaledLinear that `wrap` makes of it.

    Returns them by name. All other parameters are frozen.
    """
    found = {}
    for name, module in list(student.named_modules()):
        if isinstance(module, nn.Linear) and getattr(module, "method", None) == method:
            found[name] = wrap(module)
            replace_module(student, name, found[name])
    student.requires_grad_(False)
    return found
