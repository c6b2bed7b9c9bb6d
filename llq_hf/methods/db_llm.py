"""DB-LLM: Accurate Dual-Binarization for Efficient LLMs (Chen et al., Findings of ACL 2024, arXiv
2402.11960).

Idea
    A 2-bit weight is the sum of two binary ones, w^ = a1 b1 + a2 b2, with b in {0, 1} and a pair of
    scales for each group of a row (flexible dual binarization).
    1. The scales start as a 2-bit grid of step s: a1 = 2s, a2 = -s, with levels -s, 0, s, 2s.
    2. Weights take the nearest levels, and these codes stay.
    3. The scales, and so the four levels, are trained on the whole model, to predict what the
       full-precision model predicts. The loss weighs each token by how uncertain that model is
       about it (deviation-aware distillation):
       L = CE(labels) + dad * mean_t H_t**gamma CE(teacher, student)_t.

preset="best"
    `feedback` chooses the first codes as GPTQ does: the error of each column is repaired in later
    ones.

Storage (G = ceil(I / group_size) groups)
    name    shape             dtype   bits per weight
    weight  [O, I * 2 / 32]   int32   2 (two planes, side by side in each packed block)
    scale   [O, G, 2]         fp16    32 / group_size (fp32, twice that, with scale_bits=32)

Departures
    There is no code of the authors. From the paper are: the two planes, the four levels and the
    thresholds between them, the frozen weights, the entropy-weighted distillation. Where the paper
    is silent or could not be verified, these choices are ours:
    * s has the least squared error of its group (80 shrunken ranges), and the mirrored levels are
      taken if they are nearer.
    * The codes stay as first chosen. If they followed the scales, the loss grew, because its
      gradient does not include a change of codes.
    * Scales are trained as factors of their start, so that one learning rate fits all layers.
      Training is AdamW with a cosine to zero.
    * The data are the calibration windows, or sequences that the model writes itself (`generated`:
      the paper's data-free way, after LLM-QAT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import LLQError
from ..common.progress import PassListener
from ..common.spec import Spec
from ..kernels import LevelCodes, once, product
from ..kernels.bitpack import pack, packed_words, unpack
from ..method import Job, Method, Packed, State
from ..models.sequences import Batch, Sequences, TextSequences
from ..numerics.cholesky import prepare_hessian
from ..numerics.error_feedback import by_columns
from ..numerics.grids import check_group_size, columns_per_group, grouped, scale_dtype
from ..numerics.stats import Hessian, Stat
from .options import check_least
from .training import ScaledLinear, Schedule, scaled_linears

_TINY = 2.0**-14  # smallest normal fp16, because smaller scales would have less than 11 bits


@dataclass(frozen=True, kw_only=True)
class DBLLM(Method):
    """group_size -1: one group per row; steps: of training, 0 is none; batch: sequences a step;
    lr: relative to the scales; dad, gamma: weight of the distillation, and of entropy in it;
    generated: how many sequences the model writes to train on, 0: the calibration windows.
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
        check_group_size(self.group_size)
        _ = self._scale_dtype  # validates scale_bits
        check_least(self, 1, "batch")
        check_least(self, 0, "steps", "dad", "gamma", "generated", "damp")
        if not 0 < self.lr <= 1:
            raise LLQError(f"lr={self.lr} must lie in 0..1, a share of the scales")
        if self.steps and not self.labels and not self.dad:
            raise LLQError(
                "labels=False and dad=0 leave nothing to train on; give steps=0 for no training"
            )

    @property
    def tunes(self) -> bool:
        return self.steps > 0

    @property
    def needs_text(self) -> bool:
        return self.tunes and self.generated > 0  # the model writes text, and draws no images

    @property
    def calibrated(self) -> bool:
        return self.feedback

    @property
    def _scale_dtype(self) -> torch.dtype:
        return scale_dtype(self.scale_bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        groups = -(-in_features // self._size(in_features))
        return {
            "weight": Spec((out_features, packed_words(in_features, 2)), torch.int32),
            "scale": Spec((out_features, groups, 2), self._scale_dtype),
        }

    # --- quantizing -------------------------------------------------------------------------------

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        """First codes and scales; `tune` trains the scales later."""
        # 1. Scales of the 2-bit grid.
        scale_OG2 = self._first_scales(weight_OI)
        # 2. Codes: the nearest levels, or with feedback of each column's error.
        U_II = None
        W_OI = weight_OI.clone()
        if self.feedback:
            assert isinstance(stat, Hessian)
            _, U_II, _, dead_I = prepare_hessian(
                stat.H_II, self.damp, job.notes, quick=True, fallback="nearest level"
            )
            W_OI.masked_fill_(dead_I, 0)
        codes_IO = torch.empty_like(W_OI.T)
        size = self._size(W_OI.shape[1])

        def round_column(i: int, w_O: Tensor) -> Tensor:
            scale_O2 = scale_OG2[:, i // size]
            first_O, second_O = planes(w_O, scale_O2)
            codes_IO[i] = first_O + 2 * second_O
            return first_O * scale_O2[:, 0] + second_O * scale_O2[:, 1]

        by_columns(W_OI, U_II, round_column)
        return {
            "weight": pack(codes_IO.T.contiguous(), 2),
            "scale": scale_OG2.to(self._scale_dtype),
        }

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        scale_OG2 = packed["scale"].float()
        return restore(packed["weight"], scale_OG2, in_features, self._size(in_features))

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        in_features = x.shape[-1]
        view = once(packed, lambda: self._view(packed, in_features))
        return product(x, view, lambda: self.dequantize(packed, out_features, in_features), bias)

    def _view(self, packed: Packed, in_features: int) -> LevelCodes:
        """The codes as kernels read them."""
        return LevelCodes(packed["weight"], in_features, packed["scale"], self._size(in_features))

    def _size(self, in_features: int) -> int:
        return columns_per_group(self.group_size, in_features)

    def _first_scales(self, weight_OI: Tensor) -> Tensor:
        """(a1, a2) [O, G, 2], rounded as stored: the levels -s, 0, s, 2s, or their mirror image, of
        least squared error.
        """
        weight_OGg = grouped(weight_OI, self._size(weight_OI.shape[1]))
        largest_OG1 = weight_OGg.abs().amax(-1, keepdim=True).clamp_min(_TINY)
        best_OG2, least_OG1 = None, None
        for step in range(80):
            for sign in (1.0, -1.0):
                s_OG1 = sign * (1 - step / 100) * largest_OG1 / 2
                scale_OG2 = torch.cat([2 * s_OG1, -s_OG1], dim=-1)
                error_OGg = round_to_levels(weight_OGg, scale_OG2) - weight_OGg
                error_OG1 = error_OGg.square().sum(-1, keepdim=True)
                if best_OG2 is None or least_OG1 is None:
                    best_OG2, least_OG1 = scale_OG2, error_OG1
                best_OG2 = torch.where(error_OG1 < least_OG1, scale_OG2, best_OG2)
                least_OG1 = torch.minimum(error_OG1, least_OG1)
        assert best_OG2 is not None
        return self._rounded(best_OG2)

    def _rounded(self, scale_OG2: Tensor) -> Tensor:
        """Scales as they will be stored, in fp32; LLQError if fp16 cannot hold them."""
        rounded = scale_OG2.to(self._scale_dtype).float()
        if not torch.isfinite(rounded).all():
            raise LLQError(
                f"a scale of {float(scale_OG2.abs().max()):g} does not fit fp16: "
                "the weights are too large"
            )
        return rounded

    # --- 3. training the scales -------------------------------------------------------------------

    def tune(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Sequences,
        listener: PassListener,
        state: State,
    ) -> Packed:
        duals = scaled_linears(
            student, self, lambda module: DualLinear(module, self._size(module.in_features))
        )
        if self.generated:
            data = TextSequences(self._generate(teacher, data.lengths[0], listener))
        schedule = Schedule(self.steps, self.batch, self.lr, self.seed)
        schedule.run(
            list(duals.values()),
            lambda batch: self._loss(student, teacher, batch),
            data,
            listener,
            state,
        )
        return {
            f"{name}.scale": self._rounded(linear.scale().detach()).to(self._scale_dtype).cpu()
            for name, linear in duals.items()
        }

    def _loss(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """CE(labels) + dad * mean_t H_t**gamma CE(teacher, student)_t, in nats."""
        loss = torch.zeros((), device=batch.ids_BS.device)
        student_BPV = batch.to_learn(student).log_softmax(-1)
        if self.labels:
            loss = loss + F.nll_loss(*batch.labelled(student_BPV))
        if self.dad:
            with torch.no_grad():
                teacher_BPV = batch.to_learn(teacher).log_softmax(-1)
            chance_BPV = teacher_BPV.exp()
            entropy_BP = -(chance_BPV * teacher_BPV).sum(-1)
            cross_BP = -(chance_BPV * student_BPV).sum(-1)
            loss = loss + self.dad * (entropy_BP.clamp_min(1e-6) ** self.gamma * cross_BP).mean()
        return loss

    @torch.no_grad()
    def _generate(self, teacher: nn.Module, length: int, listener: PassListener) -> Tensor:
        """`generated` sequences [N, S] that the full-precision model writes, as in LLM-QAT.

        They are as long as those of the calibration: a random first token, three greedy ones, then
        sampled ones.
        """
        random = torch.Generator().manual_seed(self.seed)
        embedding: Any = teacher.get_input_embeddings()  # type: ignore[operator]
        listener.stage("the model writes its training data", self.generated)
        sequences = []
        for start in range(0, self.generated, 16):
            rows = min(16, self.generated - start)
            first_B1 = torch.randint(embedding.num_embeddings, (rows, 1), generator=random)
            first_B1 = first_B1.to(embedding.weight.device)
            sequences.append(continue_ids(teacher, first_B1, length, random))
            listener.advance(rows)
        return torch.cat(sequences)


# --- the two planes -------------------------------------------------------------------------------


class Planes(NamedTuple):
    """Binary planes b1, b2 of a weight a1 b1 + a2 b2, as 0.0 and 1.0."""

    first: Tensor
    second: Tensor


def planes(weight: Tensor, scale_2: Tensor) -> Planes:
    """Planes of the nearest of the levels a2, 0, a1 + a2, a1, for weights [...], scales [..., 2].

    a1 and a2 must have opposite signs, and |a2| <= |a1|. Then two thresholds decide (paper, eq. 6
    and 7).
    """
    a1, a2 = scale_2[..., 0], scale_2[..., 1]
    sign = torch.where(a1 < 0, -1.0, 1.0)
    weight, a1, a2 = weight * sign, a1 * sign, a2 * sign
    first = (weight >= (a1 + a2) / 2).to(weight)
    second = (weight - a1 * first <= a2 / 2).to(weight)
    return Planes(first, second)


def round_to_levels(weight_OGg: Tensor, scale_OG2: Tensor) -> Tensor:
    """The nearest levels to grouped weights."""
    first, second = planes(weight_OGg, scale_OG2[..., None, :])
    return first * scale_OG2[..., :1] + second * scale_OG2[..., 1:]


def restore(words_OW: Tensor, scale_OG2: Tensor, in_features: int, size: int) -> Tensor:
    """fp32 weight [O, I] of packed codes in groups of `size` columns."""
    codes_OGg = grouped(unpack(words_OW, 2, in_features), size)
    weight_OGg = (codes_OGg & 1) * scale_OG2[..., :1] + (codes_OGg >> 1) * scale_OG2[..., 1:]
    return weight_OGg.flatten(1)[:, :in_features]


class DualLinear(ScaledLinear):
    """A packed linear whose scales are trained, as factors of their first values."""

    def __init__(self, packed: Any, size: int) -> None:
        start_OG2 = packed.scale.float()
        super().__init__(packed, size, start_OG2, start_OG2)

    def bases(self, in_features: int) -> list[Tensor]:
        codes_OI = unpack(self.words, 2, in_features)
        return [codes_OI & 1, codes_OI >> 1]


def continue_ids(model: nn.Module, ids_BS: Tensor, length: int, random: torch.Generator) -> Tensor:
    """ids [B, S] continued to `length` tokens.

    Up to the fourth token decoding is greedy; later ones are sampled.
    """
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
            output = model(
                input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True
            )
    return ids_BS
