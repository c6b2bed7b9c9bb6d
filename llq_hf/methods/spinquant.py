"""SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406), after facebookresearch/SpinQuant at 8f47aa3.

Outlier channels are what low-bit grids fail on, and a rotation spreads them. R1 turns the residual
stream and R2 the values of every head: both are merged into the weights (see `residual`), norm
gains folded first. R4, a Hadamard, turns the input of down_proj and R3, another, queries and keys
after the rotary embedding: these run with the model. R1 and R2 are random Hadamards, or learned
from there on the calibration data by Cayley SGD. The rotated weights are then rounded by GPTQ (or
to nearest) on symmetric grids; with a_bits < 16 the inputs of all linears, with kv_bits < 16 keys
and values are rounded token by token while the model runs.

Storage: rotations are merged or computed, none is stored. Tied heads get a matrix of their own.
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / I (per row), 16 / group_size

Departures: no mean is taken out of the embedding, which RMSNorm would not do either (theirs changes
the model); a bias of v_proj is turned, too; while a Hessian is gathered all linears before already
round their inputs, though not yet the one it is for (theirs puts activation rounding in after
GPTQ); the step on the orthogonal matrices is the exact Cayley transform (theirs five fixed-point
iterations of it), and what is learned is projected back in fp64; where activations stay 16 bits,
rotations are learned with rounded weights. R1 and R2 are drawn from `seed` (theirs ignores its
own). preset="best" has no level at zero but as many on either side: four useful levels at 2 bits
instead of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import PassListener
from ..method import Job, Method, Packed, Rewrite
from ..models.decoder import decoder_of, quantizable
from ..models.residual_stream import Residual, Turn, Turned, random_turns, residual_of
from ..numerics.activations import OFF, Attention, TokenQuant, pass_through
from ..numerics.cholesky import largest_first, prepare_hessian
from ..numerics.error_feedback import solve
from ..numerics.grids import Affine, Uniform
from ..numerics.rotations import cayley_step, hadamard, nearest_orthogonal
from ..numerics.stats import Hessian, Stat
from .options import check_choice, check_damp, check_least, check_positive
from .uniform import OnUniformGrid

ROTATIONS, SOLVERS = ("hadamard", "learned"), ("gptq", "rtn")
BATCH = 8  # sequences per learning step


@dataclass(frozen=True, kw_only=True)
class SpinQuant(OnUniformGrid):
    """a_bits, kv_bits 16: not quantized; key_heads: a grid per head of a key, as values have;
    solver gptq, rtn; levels absmax, full, halves (see `Uniform`); w_clip: search each range;
    rotations hadamard, learned; r4: turn down_proj's input; head_dim 0: filled in from the model.
    """

    name: ClassVar[str] = "spinquant"
    title: ClassVar[str] = "SpinQuant (Liu et al. 2025)"
    observes: ClassVar[type[Stat] | None] = Hessian
    best: ClassVar[dict[str, Any]] = {"levels": "halves", "act_order": True, "key_heads": True}

    bits: int = 4
    group_size: int = -1
    a_bits: int = OFF
    a_sym: bool = False
    kv_bits: int = OFF
    key_heads: bool = False
    solver: str = "gptq"
    levels: str = "absmax"
    w_clip: bool = True
    act_order: bool = False
    damp: float = 0.01
    scale_bits: int = 16
    rotations: str = "hadamard"
    r4: bool = True
    learn_steps: int = 100
    learn_rate: float = 1.5
    seed: int = 0
    head_dim: int = 0

    def check(self) -> None:
        _ = self.grid, self.attention, self.token_quant  # validate their fields
        check_choice(self, "rotations", ROTATIONS)
        check_choice(self, "solver", SOLVERS)
        check_damp(self)
        check_positive(self, "learn_steps", "learn_rate")
        check_least(self, 0, "head_dim")

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, True, self.w_clip, self.scale_bits, self.levels)

    # --- roles: o_proj is rounded in heads, down_proj reads a turned input ------------------------

    turns: ClassVar[bool] = False
    heads: ClassVar[bool] = False

    def for_linear(self, name: str) -> Method:
        return _role(self, name.rpartition(".")[2])

    @property
    def token_quant(self) -> TokenQuant:
        if (
            self.heads and self.head_dim
        ):  # a grid of its own for every head, which need not hold zero
            return TokenQuant(self.a_bits, self.a_sym, self.head_dim)
        return TokenQuant(self.a_bits, self.a_sym, zero_inside=True)

    @property
    def attention(self) -> Attention | None:
        if self.kv_bits == OFF:
            return None
        key, value = (
            TokenQuant(self.kv_bits, False, zero_inside=True),
            TokenQuant(self.kv_bits, False),
        )
        return Attention(key=key, value=value, joint_key=not self.key_heads, hadamard=True)

    @property
    def weight_only(self) -> bool:
        return not self.token_quant.on and self.attention is None

    def _input(self, x: Tensor) -> Tensor:
        """What the stored weight is multiplied with."""
        if self.turns:
            x = hadamard(x.shape[-1], x.device).apply(x).to(x.dtype)
        return self.token_quant(x)

    # --- one linear -------------------------------------------------------------------------------

    @property
    def sequential(self) -> bool:
        return self.calibrated

    @property
    def calibrated(self) -> bool:
        return self.solver == "gptq"

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        turn = hadamard(weight_OI.shape[1], weight_OI.device)
        W_OI = turn.apply(weight_OI) if self.turns else weight_OI
        # Of whole rows, the grids are found before dead columns are zeroed.
        static_OG = self.grid.grid(W_OI) if self.group_size == -1 else None
        order_I = torch.arange(W_OI.shape[1], device=W_OI.device)
        U_II = None
        if self.solver == "gptq":
            assert isinstance(stat, Hessian)
            H_II = turn.apply(turn.apply(stat.H_II).T) if self.turns else stat.H_II
            order = largest_first if self.act_order else None
            _, U_II, order_I, dead_I = prepare_hessian(H_II, self.damp, job.notes, order)
            W_OI = W_OI.masked_fill(dead_I, 0)
        if self.act_order and static_OG is None:
            # With an order of columns, groups of them are those of the weight as it was.
            static_OG = self.grid.grids(W_OI)
        group_I = order_I // self.grid.size(len(order_I))
        codes_OI, grid_OG, _ = solve(W_OI[:, order_I], U_II, self.grid, group_I, static_OG)
        packed = self.grid.pack(codes_OI[:, torch.argsort(order_I)], grid_OG)
        if self.levels == "halves":  # no level is zero: rows that are have no step
            packed["scale"] *= weight_OI.any(1, keepdim=True)
        return packed

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        return (
            hadamard(in_features, weight_OI.device).invert(weight_OI) if self.turns else weight_OI
        )

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        if self.turns:
            raise LLQError(
                f"{self.name} turns the input of down_proj while the model runs; quantize with r4=False"
            )
        return super().affine(packed, out_features, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return super().linear(self._input(x), packed, bias, out_features)

    # --- the whole model --------------------------------------------------------------------------

    def bound_to(self, model: nn.Module) -> Self:
        residual = residual_of(model)  # refuses models that cannot be turned
        if self.head_dim not in (0, residual.head_dim):
            raise LLQError(f"head_dim={self.head_dim}, but the model's is {residual.head_dim}")
        return replace(self, head_dim=residual.head_dim) if self.a_bits < OFF else self

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Rewrite:
        residual = residual_of(model)
        notes: dict[str, Any] = {
            "rotations": self.rotations,
            "seed": self.seed,
            "untied": residual.tied,
        }
        if not learned:
            return Turned(residual, *random_turns(residual, self.seed), notes=notes)
        losses = learned["losses"].tolist()
        notes["learning_loss"] = [losses[0], losses[-1]]
        return Turned(residual, *_matrices([learned["r1"], *learned["r2"]]), notes=notes)

    # --- learning the rotations -------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        return self.rotations == "learned"

    @torch.enable_grad()
    def learn(
        self,
        model: nn.Module,
        ids_NS: Tensor,
        attend: Callable[[nn.Module], Any],
        listener: PassListener,
    ) -> dict[str, Tensor]:
        """R1 and R2 of least next-token loss, in fp64, with activations (or else weights) rounded
        as they will be.

        Needs four times the model's memory: its tensors, the turned ones, their gradients, and room
        to turn in.
        """
        residual = residual_of(model)
        stream, heads = random_turns(residual, self.seed)
        device = ids_NS.device
        eyes = [
            torch.eye(n, device=device) for n in (residual.width, *[residual.head_dim] * len(heads))
        ]
        rotations = [turn(eye) for turn, eye in zip((stream, *heads), eyes, strict=True)]
        student = _Student(self, residual, model.requires_grad_(False), attend)
        losses = []
        listener.stage("learning rotations", self.learn_steps)
        for step in range(self.learn_steps):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH, device=device) % len(ids_NS)
            loss, gradients = student.gradients(rotations, ids_NS[rows])
            size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            rate = self.learn_rate * (1 + math.cos(math.pi * step / self.learn_steps)) / 2
            shrink = min(1.0, 1 / (size + 1e-6))  # the authors' trainer clips gradients to norm 1
            rotations = [
                cayley_step(R, g * shrink, rate) for R, g in zip(rotations, gradients, strict=True)
            ]
            losses.append(loss)
            listener.advance()
        r1, *r2 = [nearest_orthogonal(R).cpu() for R in rotations]
        return {"r1": r1, "r2": torch.stack(r2), "losses": torch.tensor(losses)}


class _Outputs(SpinQuant):
    heads: ClassVar[bool] = True


class _Down(SpinQuant):
    turns: ClassVar[bool] = True


@lru_cache(maxsize=64)
def _role(method: SpinQuant, projection: str) -> SpinQuant:
    kinds = {"o_proj": _Outputs, "down_proj": _Down if method.r4 else SpinQuant}
    return kinds.get(projection, SpinQuant)(**method.to_dict())


def _times(R: Tensor, x: Tensor) -> Tensor:
    return x @ R.to(x)


class _Student:
    """The model with rotations as its only parameters; everything else is held as it was."""

    def __init__(
        self,
        method: SpinQuant,
        residual: Residual,
        model: nn.Module,
        attend: Callable[[nn.Module], Any],
    ) -> None:
        self.method, self.residual, self.model = method, residual, model
        self.dense = {name: p.detach() for name, p in model.named_parameters()}
        self.dense |= {name: self.dense[source] for name, source in Turned(residual).untied.items()}
        self.roles = {name: _role(method, name.rpartition(".")[2]) for name in quantizable(model)}
        for name, role in self.roles.items():
            hook = partial(_read_rounded, role)
            model.get_submodule(name).register_forward_pre_hook(hook)
        attend(decoder_of(model)[1])

    def gradients(self, rotations: list[Tensor], ids_BS: Tensor) -> tuple[float, list[Tensor]]:
        """(mean next-token loss, its gradients)."""
        leaves = [R.detach().requires_grad_() for R in rotations]
        turned = Turned(self.residual, *_matrices(leaves), dtype=leaves[0].dtype)
        with torch.no_grad():
            weights = {name: self._weight(name, turned) for name in self.dense}
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        total = 0.0
        for ids_1S in torch.split(
            ids_BS, 1
        ):  # one sequence at a time: the logits are the largest tensor
            options = {"input_ids": ids_1S, "use_cache": False}
            logits = torch.func.functional_call(
                self.model, weights, (), options, tie_weights=False
            ).logits
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids_1S[0, 1:]) / len(ids_BS)
            torch.autograd.backward(loss)
            total += loss.item()
        for (
            name,
            weight,
        ) in weights.items():  # turned once more, with a graph: one tensor's at a time
            again = self._weight(name, turned)
            if again.requires_grad and weight.grad is not None:
                torch.autograd.backward(again, weight.grad)
        return total, [
            leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves
        ]

    def _weight(self, name: str, turned: Turned) -> Tensor:
        weight = turned(name, self.dense[name], self.dense.__getitem__)
        role = self.roles.get(name.removesuffix(".weight"))
        if role is None or not name.endswith(".weight"):
            return weight
        if role.turns:
            weight = hadamard(weight.shape[1], weight.device).apply(weight).to(weight.dtype)
        if role.a_bits < OFF:
            return weight  # GPTQ will do better than rounding here would tell
        spread = role.grid.spread(role.grid.grids(weight.detach().float()), weight.shape[1])
        return pass_through(weight, spread.values(spread.codes(weight.detach().float(), role.bits)))


def _read_rounded(role: SpinQuant, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    x = args[0]
    if role.turns:
        x = hadamard(x.shape[-1], x.device).apply(x).to(x.dtype)
    return pass_through(x, role.token_quant(x.detach()))


def _matrices(rotations: list[Tensor]) -> tuple[Turn, list[Turn]]:
    stream, *heads = [partial(_times, R) for R in rotations]
    return stream, list(heads)
