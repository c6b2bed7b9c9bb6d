"""OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137), after OpenGVLab/OmniQuant at 95fae1b.

Idea
    Gradient descent, one block after the other, on what surrounds the rounding; the weights
    themselves do not change.

    Learnable weight clipping (LWC) shrinks the range [low, high] of each group to [sigmoid(l) low,
    sigmoid(u) high].

    Learnable equivalent transformation (LET), where activations are quantized too, divides the
    channels of a linear's input by s and multiplies the columns of its weight. Between v and o, and
    between q and k, s is merged into both weights.

    The loss is the mean squared error between the quantized block on quantized inputs and the
    full-precision block on full-precision inputs. `aug_loss` adds the error against the
    full-precision block on quantized inputs. A step is one sequence, the optimizer AdamW without
    decay, and gradients pass straight through the rounding. The authors' scripts train 20 epochs,
    and 40 with aug_loss for 2 bits.

    The study's rows are 4 bits in groups of 128, and W6A6 and W4A4 with group_size=-1. There the
    inputs of linears, and queries, keys (after RoPE) and values, are quantized per token and head
    on an asymmetric grid.

Steps of `quantize_block`
    1. Observe: the inputs of all linears (for LET and `search_range`).
    2. Transform: start LET (equivalence.py).
    3. Search: start from the ranges of least error (`search_range`).
    4. Train (block_training.py).
    5. Pack: codes are chosen (rounding.py).

Storage (uniform grid; G = ceil(I / group_size) groups)
    name      shape                 dtype   bits per weight
    weight    [O, I * bits / 32]    int32   bits
    scale     [O, G]                fp16    16 / group_size
    zero      [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    in_scale  [I]                   fp16    16 / O (LET only; o and down have none)

Departures
    Training is in fp32 (their AMP needs a GPU and a loss scaler), with scales as stored in fp16.
    Codes are chosen from fp32, not after a cast to half. Ranges always contain zero, so that zero
    points are codes (theirs leave the range of codes, which breaks packing). Gradients pass through
    the rounding of zero points, too (theirs stop there: perplexity 34.0 against 29.4 on
    stories260K at 2 bits). Scales below 1e-5 are kept.

    LET divides the input at run time instead of folding s into the norm, which stays bitwise that
    of the base. Heads that share keys and values share s (theirs fails on grouped queries), and so
    do the two channels that RoPE rotates together, because otherwise q and k would not be the same
    function. A pair that still would not be (because of a bias, or a norm after q) is left out and
    noted. LET starts from the magnitudes of all linears of the input (theirs: from the values of
    one). What LET merges into q, k, v and o counts as weight error in reports. A loss that is not
    finite is an error (theirs enters a debugger).

Presets
    "best" stores the same bits.
    search_range: starts from ranges with the least error, weighted by the squares of the inputs.
    decay: lowers the learning rates linearly to zero.
    rounding_lr: learns which way each weight rounds, as AutoRound (arXiv 2309.05516) does: an
        offset within half a step, moved by the sign of its gradient, by less and less. It takes one
        fp32 number per weight while training, and none is stored.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...common.spec import Spec
from ...method import Flow, Method, Packed, Step
from ...models.decoder import replace_module
from ...numerics.activations import OFF, Attention, TokenQuant
from ...numerics.grids import Uniform
from ..options import check_least, check_range
from ..uniform import OnUniformGrid
from .block_training import BlockTraining
from .equivalence import BAKED, equivalences, observe_inputs
from .rounding import TrainedLinear


@dataclass(frozen=True, kw_only=True)
class OmniQuant(OnUniformGrid):
    """a_bits: 16 is not quantized, and then `let` has no effect. alpha: LET starts at x**alpha /
    w**(1 - alpha).

    lwc_lr, let_lr, rounding_lr: learning rates of the logits, of s, and of the rounding in steps of
    the grid (0: round to nearest).
    """

    name: ClassVar[str] = "omniquant"
    title: ClassVar[str] = "OmniQuant (Shao et al. 2024)"
    best: ClassVar[dict[str, Any]] = {
        "aug_loss": True,
        "search_range": True,
        "rounding_lr": 5e-3,
        "decay": True,
    }
    # twin, weights, learned rounding and its gradients, one in the forward pass
    training_copies: ClassVar[int] = 5
    divides_input: ClassVar[bool] = True  # under LET

    bits: int = 4
    a_bits: int = OFF
    group_size: int = 128
    sym: bool = False
    epochs: int = 20
    lwc_lr: float = 1e-2
    let: bool = True
    let_lr: float = 5e-3
    alpha: float = 0.5
    aug_loss: bool = False
    search_range: bool = False
    rounding_lr: float = 0.0
    decay: bool = False

    def check(self) -> None:
        _ = self.grid, self.tokens  # validate group_size and a_bits
        check_least(self, 0, "epochs", "lwc_lr", "let_lr", "rounding_lr")
        check_range(self, "alpha", 0, 1)

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym)

    @property
    def tokens(self) -> TokenQuant:
        """How activations are quantized."""
        return TokenQuant(self.a_bits, sym=False)

    @property
    def transforms(self) -> bool:
        """Whether LET is used."""
        return self.let and self.tokens.on

    @property
    def weight_only(self) -> bool:
        return not self.tokens.on

    @property
    def flow(self) -> Flow:
        return Flow.BOTH

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def attention(self) -> Attention | None:
        return Attention(self.tokens, self.tokens, self.tokens) if self.tokens.on else None

    def for_linear(self, name: str) -> Method:
        return _Baked(**self.to_dict()) if self.transforms and name.endswith(BAKED) else self

    # --- what is stored ---------------------------------------------------------------------------

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = super().layout(out_features, in_features)
        if self.transforms and self.divides_input:
            layout["in_scale"] = Spec((in_features,), torch.float16)
        return layout

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        return weight_OI / packed["in_scale"].float() if "in_scale" in packed else weight_OI

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if not self.tokens.on:
            return super().linear(x, packed, bias, out_features)
        z = x / packed["in_scale"].float() if "in_scale" in packed else x
        return super().linear(self.tokens(z).to(x.dtype), packed, bias, out_features)

    # --- training ---------------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        twin = copy.deepcopy(step.block).float().requires_grad_(False)
        parts = {name: TrainedLinear(linear, self) for name, linear in step.linears.items()}

        # 1. observe
        inputs = observe_inputs(step) if self.transforms or self.search_range else {}

        # 2. transform
        scales: list[nn.Parameter] = []
        left_out: list[str] = []
        if self.transforms:
            scales, left_out = equivalences(step, twin, parts, inputs, self.alpha)

        # 3. search
        if self.search_range:
            step.listener.stage("searching ranges", len(parts))
            for name, part in parts.items():
                part.search(inputs[name].square_I)
                step.listener.advance(1)

        # 4. train
        for name, part in parts.items():
            replace_module(twin, name, part)
        step.attend(twin)
        losses = BlockTraining(self, step, twin, list(parts.values()), scales).run()
        for s in scales:
            s.copy_(s.half())  # rounded to what is stored, before any code is chosen

        # 5. pack
        packed = {}
        for name, part in parts.items():
            job = step.job(name)
            job.notes.update({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})
            job.notes.update({"let_left_out": left_out} if left_out else {})
            layout = self.for_linear(job.name).layout(part.out_features, part.in_features)
            packed[name] = part.packed(layout)
        return packed


class _Baked(OmniQuant):
    """OmniQuant of a linear whose input is not divided."""

    divides_input: ClassVar[bool] = False
