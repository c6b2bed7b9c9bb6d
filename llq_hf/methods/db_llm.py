"""DB-LLM: Accurate Dual-Binarization for Efficient LLMs (Chen et al., Findings of ACL 2024, arXiv 2402.11960).

A 2-bit weight is the sum of two binary ones: w^ = a1 b1 + a2 b2 with b in {0, 1} and a scale each for every group of a
row (flexible dual binarization). Born from a 2-bit grid of step s as a1 = 2s, a2 = -s, the four levels -s, 0, s, 2s
are then free to move: weights stay frozen, and the scales are trained on the whole model, so that it predicts what the
full-precision one predicts. The loss weighs each token by how uncertain the teacher is about it (deviation-aware
distillation): L = CE(labels) + dad * mean_t H_t**gamma CE(teacher, student)_t.

There is no code of the authors. The paper's: the two planes, the four levels and the thresholds between them, frozen
weights, the entropy-weighted distillation. Ours, where the paper is silent or could not be verified: s minimizes the
squared error of its group (80 shrunken ranges), and the mirrored levels are taken where they are nearer; the codes
stay as first chosen (letting them follow the scales made the loss grow: its gradient does not see a code change);
scales are trained as factors of their start, so one learning rate serves every layer; AdamW, cosine to zero;
calibration windows as data, or sequences that the model itself writes (`generated`: the paper's data-free way, after
LLM-QAT). `feedback` (preset="best") chooses the first codes as GPTQ does, each column's error handed on.

Storage (G = ceil(I / group_size) groups)
    name    shape             dtype   bits per weight
    weight  [O, I * 2 / 32]   int32   2 (two planes, side by side in each packed block)
    scale   [O, G, 2]         fp16    32 / group_size (fp32, twice that, with scale_bits=32)
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
from ..grids import Spec
from ..kernels import LevelCodes, product
from ..method import Job, Method, Packed, PassListener, State
from ..stats import Hessian, Stat, factorize, revive_dead

_TINY = 2.0**-14  # the smallest normal fp16: scales below it are stored with less than 11 bits


@dataclass(frozen=True, kw_only=True)
class DBLLM(Method):
    """group_size -1: one group per row; steps: of training, 0 is none; lr: relative to the scales.

    dad, gamma: weight of the distillation, and of entropy in it; generated: sequences the model writes to train on,
    0 = the calibration windows.
    """

    name: ClassVar[str] = "db_llm"
    title: ClassVar[str] = "DB-LLM (Chen et al. 2024)"
    bits_range: ClassVar[tuple[int, ...]] = (2,)
    observes: ClassVar[type[Stat] | None] = Hessian
    best: ClassVar[dict[str, Any]] = {"feedback": True}

    bits: int = 2
    group_size: int = 128
    steps: int = 256
    batch: int = 4
    lr: float = 0.02
    dad: float = 1.0
    gamma: float = 0.1
    labels: bool = True
    generated: int = 0
    feedback: bool = False
    damp: float = 0.01
    seed: int = 0
    scale_bits: int = 16

    def check(self) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise LLQError(f"group_size={self.group_size} must be -1 (one group per row) or at least 1")
        if self.scale_bits not in (16, 32):
            raise LLQError(f"scale_bits={self.scale_bits} must be 16 (stored as fp16) or 32 (fp32)")
        for option, least in (("steps", 0), ("batch", 1), ("dad", 0), ("gamma", 0), ("generated", 0), ("damp", 0)):
            if not least <= getattr(self, option) < math.inf:
                raise LLQError(f"{option}={getattr(self, option)} must be at least {least}")
        if not 0 < self.lr <= 1:
            raise LLQError(f"lr={self.lr} must lie in 0..1, a share of the scales")
        if self.steps and not self.labels and not self.dad:
            raise LLQError("labels=False and dad=0 leave nothing to train on; give steps=0 for no training")

    @property
    def tunes(self) -> bool:
        return self.steps > 0

    @property
    def calibrated(self) -> bool:
        return self.feedback

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)
        dtype = torch.float16 if self.scale_bits == 16 else torch.float32
        return {
            "weight": Spec((out_features, packed_words(in_features, 2)), torch.int32),
            "scale": Spec((out_features, groups, 2), dtype),
        }

    # --- quantizing -------------------------------------------------------------------------------------------------

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        """Codes on the stored scales of the start: nearest levels, or with every column's error handed on."""
        scale_OG2 = self._start(weight_OI)
        U_II, W_OI = None, weight_OI.clone()
        if self.feedback:
            assert isinstance(stat, Hessian)
            H_II = stat.H_II
            dead_I = revive_dead(H_II)
            W_OI[:, dead_I] = 0
            U_II = factorize(H_II, self.damp, job.notes, inverse=True, quick=True)
            if U_II is None:
                job.notes["fallback"] = "nearest level"
        codes_IO, size = torch.empty_like(W_OI.T), self._size(W_OI.shape[1])

        def rounded(i: int, w_O: Tensor) -> Tensor:
            scale_O2 = scale_OG2[:, i // size]
            first_O, second_O = planes(w_O, scale_O2)
            codes_IO[i] = first_O + 2 * second_O
            return first_O * scale_O2[:, 0] + second_O * scale_O2[:, 1]

        by_columns(W_OI, U_II, rounded)
        dtype = torch.float16 if self.scale_bits == 16 else torch.float32
        return {"weight": pack(codes_IO.T.contiguous(), 2), "scale": scale_OG2.to(dtype)}

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        return restored(packed["weight"], packed["scale"].float(), in_features, self._size(in_features))

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        stored = LevelCodes(packed["weight"], in_features, packed["scale"], self._size(in_features))
        return product(x, stored, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def _start(self, weight_OI: Tensor) -> Tensor:
        """(a1, a2) [O, G, 2], as stored: of the levels -s, 0, s, 2s, or their mirror, nearest in squared error."""
        weight_OGg = grouped(weight_OI, self._size(weight_OI.shape[1]))
        largest_OG1 = weight_OGg.abs().amax(-1, keepdim=True).clamp_min(_TINY)
        best_OG2, least_OG1 = None, None
        for step in range(80):
            for sign in (1.0, -1.0):
                s_OG1 = sign * (1 - step / 100) * largest_OG1 / 2
                scale_OG2 = torch.cat([2 * s_OG1, -s_OG1], dim=-1)
                error_OG1 = (dual(weight_OGg, scale_OG2) - weight_OGg).square().sum(-1, keepdim=True)
                if best_OG2 is None or least_OG1 is None:
                    best_OG2, least_OG1 = scale_OG2, error_OG1
                best_OG2 = torch.where(error_OG1 < least_OG1, scale_OG2, best_OG2)
                least_OG1 = torch.minimum(error_OG1, least_OG1)
        assert best_OG2 is not None
        return self._stored(best_OG2)

    def _stored(self, scale_OG2: Tensor) -> Tensor:
        """Scales as the file will hold them, in fp32. LLQError where fp16 cannot."""
        stored = scale_OG2.half().float() if self.scale_bits == 16 else scale_OG2
        if not torch.isfinite(stored).all():
            raise LLQError(f"a scale of {float(scale_OG2.abs().max()):g} does not fit fp16: the weights are too large")
        return stored

    # --- training the scales ------------------------------------------------------------------------------------------

    def tune(
        self, student: nn.Module, teacher: nn.Module, ids_NS: Tensor, listener: PassListener, state: State
    ) -> Packed:
        duals = {}
        for name, module in list(student.named_modules()):
            if isinstance(module, nn.Linear) and getattr(module, "method", None) == self:
                duals[name] = DualLinear(module, self._size(module.in_features))
                owner, _, attribute = name.rpartition(".")
                setattr(student.get_submodule(owner), attribute, duals[name])
        student.requires_grad_(False)
        if self.generated:
            ids_NS = self._written(teacher, ids_NS, listener)
        self._distill(student, teacher, [module.factor for module in duals.values()], ids_NS, listener, state)
        dtype = torch.float16 if self.scale_bits == 16 else torch.float32
        return {f"{name}.scale": self._stored(m.scale().detach()).to(dtype).cpu() for name, m in duals.items()}

    def _distill(
        self,
        student: nn.Module,
        teacher: nn.Module,
        factors: list[nn.Parameter],
        ids_NS: Tensor,
        listener: PassListener,
        state: State,
    ) -> None:
        for factor in factors:
            factor.requires_grad_(True)
        optimizer = torch.optim.AdamW(factors, lr=self.lr, weight_decay=0.0)
        training = Training(factors, optimizer)
        done = training.load(state)
        listener.stage("distilling into the scales", self.steps)
        listener.advance(done)
        for step, rows_BS in enumerate(self._batches(ids_NS)):
            if step < done:
                continue
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.zero_grad()
            for part_BS in torch.split(rows_BS, max(1, 2048 // ids_NS.shape[1])):  # logits of a whole batch may not fit
                loss = self._loss(student, teacher, part_BS) * len(part_BS) / len(rows_BS)
                if not torch.isfinite(loss):
                    raise LLQError(
                        f"the distillation loss is {float(loss)} in step {step}; give a smaller lr than {self.lr}"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for factor in factors:
                    factor.clamp_(1 / 16, 16)
            listener.advance(1)
            if (step + 1) % 32 == 0 and step + 1 < self.steps:
                training.save(state, step + 1)

    def _loss(self, student: nn.Module, teacher: nn.Module, ids_BS: Tensor) -> Tensor:
        """CE(labels) + dad * mean_t H_t**gamma CE(teacher, student)_t, in nats."""
        loss = torch.zeros((), device=ids_BS.device)
        student_BSV = student(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        if self.labels:
            loss = loss + F.nll_loss(student_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
        if self.dad:
            with torch.no_grad():
                teacher_BSV = teacher(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
            chance_BSV = teacher_BSV.exp()
            entropy_BS = -(chance_BSV * teacher_BSV).sum(-1)
            cross_BS = -(chance_BSV * student_BSV).sum(-1)
            loss = loss + self.dad * (entropy_BS.clamp_min(1e-6) ** self.gamma * cross_BS).mean()
        return loss

    def _batches(self, ids_NS: Tensor) -> Iterator[Tensor]:
        """`steps` batches of rows: every epoch in an order of its own, the same in every run."""
        random, rows = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.long)
        for _ in range(self.steps):
            while len(rows) < self.batch:
                rows = torch.cat([rows, torch.randperm(len(ids_NS), generator=random)])
            yield ids_NS[rows[: self.batch].to(ids_NS.device)]
            rows = rows[self.batch :]

    @torch.no_grad()
    def _written(self, teacher: nn.Module, ids_NS: Tensor, listener: PassListener) -> Tensor:
        """`generated` sequences by the full-precision model, as long as the calibration's: a random first token, three
        greedy ones, then sampled (LLM-QAT).
        """
        random, length = torch.Generator().manual_seed(self.seed), ids_NS.shape[1]
        embedding: Any = teacher.get_input_embeddings()  # type: ignore[operator]
        listener.stage("the model writes its training data", self.generated)
        written = []
        for start in range(0, self.generated, 16):
            rows = min(16, self.generated - start)
            first_B1 = torch.randint(embedding.num_embeddings, (rows, 1), generator=random)
            written.append(sampled(teacher, first_B1.to(ids_NS.device), length, random))
            listener.advance(rows)
        return torch.cat(written)


# --- the two planes --------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """Binary planes b1, b2 of the nearest level a1 b1 + a2 b2."""

    first: Tensor
    second: Tensor


def planes(weight: Tensor, scale_2: Tensor) -> Levels:
    """Nearest of the levels a2, 0, a1 + a2, a1 to weights [...], scale [..., 2]; as 0.0 and 1.0.

    Needs a1 and a2 of opposite signs and |a2| <= |a1|: then two thresholds decide (paper, eq. 6 and 7).
    """
    a1, a2 = scale_2[..., 0], scale_2[..., 1]
    sign = torch.where(a1 < 0, -1.0, 1.0)
    weight, a1, a2 = weight * sign, a1 * sign, a2 * sign
    first = (weight >= (a1 + a2) / 2).to(weight)
    second = (weight - a1 * first <= a2 / 2).to(weight)
    return Levels(first, second)


def dual(weight_OGg: Tensor, scale_OG2: Tensor) -> Tensor:
    """What grouped weights become on these scales."""
    first, second = planes(weight_OGg, scale_OG2[..., None, :])
    return first * scale_OG2[..., :1] + second * scale_OG2[..., 1:]


def grouped(matrix_OI: Tensor, size: int) -> Tensor:
    """[O, I] -> [O, G, size]; a last group that is shorter is filled up with zeros."""
    return F.pad(matrix_OI, (0, -matrix_OI.shape[1] % size)).view(len(matrix_OI), -1, size)


class _Dual(torch.autograd.Function):
    """x W^^T with the gradient of x and of the scales; W^ is made again for the way back, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words_OW: Tensor, scale_OG2: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, words_OW, scale_OG2)
        ctx.size = size
        return F.linear(x, restored(words_OW, scale_OG2, x.shape[-1], size).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, words_OW, scale_OG2 = ctx.saved_tensors
        weight_OI = restored(words_OW, scale_OG2, x.shape[-1], ctx.size).to(x.dtype)
        gradient_OGg = grouped((gradients[0].flatten(0, -2).T @ x.flatten(0, -2)).float(), ctx.size)
        codes_OGg = grouped(unpack(words_OW, 2, x.shape[-1]), ctx.size)
        scale_gradients = [(gradient_OGg * plane).sum(-1) for plane in (codes_OGg & 1, codes_OGg >> 1)]
        return gradients[0] @ weight_OI, None, torch.stack(scale_gradients, dim=-1), None


def restored(words_OW: Tensor, scale_OG2: Tensor, in_features: int, size: int) -> Tensor:
    """fp32 weight [O, I] of packed codes."""
    codes_OGg = grouped(unpack(words_OW, 2, in_features), size)
    weight_OGg = (codes_OGg & 1) * scale_OG2[..., :1] + (codes_OGg >> 1) * scale_OG2[..., 1:]
    return weight_OGg.flatten(1)[:, :in_features]


class DualLinear(nn.Module):
    """A packed linear whose scales are trained, as factors of what they are."""

    def __init__(self, packed: nn.Linear, size: int) -> None:
        super().__init__()
        self.words, self.bias, self.size = packed.weight, packed.bias, size
        scale: Any = packed.scale
        self.start: Tensor = scale.float()
        self.factor = nn.Parameter(torch.ones_like(self.start))

    def scale(self) -> Tensor:
        return self.start * self.factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Dual.apply(x, self.words, self.scale(), self.size)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class Training(NamedTuple):
    """What a killed training goes on from."""

    factors: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def save(self, state: State, step: int) -> None:
        moments = self.optimizer.state
        tensors = {"step": torch.tensor(step)}
        for i, factor in enumerate(self.factors):
            tensors |= {f"{i}.factor": factor.detach()}
            tensors |= {f"{i}.{key}": moments[factor][key] for key in ("step", "exp_avg", "exp_avg_sq")}
        state.save({name: tensor.cpu() for name, tensor in tensors.items()})

    def load(self, state: State) -> int:
        """The step to go on with; 0 where nothing was kept."""
        saved = state.load()
        if saved is None:
            return 0
        with torch.no_grad():
            for i, factor in enumerate(self.factors):
                factor.copy_(saved[f"{i}.factor"])
                self.optimizer.state[factor] = {
                    key: saved[f"{i}.{key}"].to(factor.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(saved["step"])


def sampled(model: nn.Module, ids_BS: Tensor, length: int, random: torch.Generator) -> Tensor:
    """ids [B, S] continued to `length` tokens: the first three greedily, the others drawn."""
    output = model(input_ids=ids_BS, use_cache=True)
    while ids_BS.shape[1] < length:
        logits_BV = output.logits[:, -1].float().cpu()
        if ids_BS.shape[1] < 4:
            next_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            next_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=random)
        next_B1 = next_B1.to(ids_BS.device)
        ids_BS = torch.cat([ids_BS, next_B1], dim=1)
        if ids_BS.shape[1] < length:
            output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)
    return ids_BS
