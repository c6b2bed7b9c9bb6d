"""SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406), after facebookresearch/SpinQuant at 8f47aa3.

Idea
    Low-bit grids fail on outlier channels, and a rotation spreads outliers over all channels. R1
    rotates the residual stream and R2 the values of each head. Both are merged into the weights
    (models/residual_stream.py), after the norm gains. R4, a Hadamard transform, rotates the input
    of down_proj, and R3, another, queries and keys after the rotary embedding; these two are
    computed at run time. R1 and R2 are random Hadamard transforms, or are learned from there on the
    calibration data by Cayley SGD.

Steps of `quantize`, on the weights that R1 and R2 rotated
    1. Statistics: H of the inputs. `aim` finds another weight to begin with (numerics/aim).
    2. Order: as in the model, or by `act_order` largest H_ii first.
    3. Factor the damped Hessian (solver "gptq" only). R4 rotates it, and the weight, of down_proj.
    4. Grids that do not depend on the error feedback: of whole rows, or with `act_order` of all
       groups. Grids are symmetric.
    5. Solve: GPTQ's error feedback, or rounding to nearest (solver "rtn"). Then `refine` rounds of
       coordinate descent and scale refit (numerics/coordinate_descent).

    With a_bits < 16 the inputs of all linears are quantized token by token at run time, with
    kv_bits < 16 also keys and values (simulated: the cache itself stays as large as it is).

Storage (no rotation is stored; tied heads get a matrix of their own)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / I (per row), 16 / group_size

Departures
    No mean is subtracted from the embedding (theirs does, which changes a model with RMSNorm). A
    bias of v_proj is rotated, too. While a Hessian is gathered, all linears before already quantize
    their inputs, but the linear it is for does not yet (theirs starts to quantize activations after
    GPTQ). The step on the orthogonal matrices is the exact Cayley transform (theirs iterates five
    times towards it), and the result is projected back in fp64. Where activations stay at 16 bits,
    rotations are learned with quantized weights. R1 and R2 are drawn from `seed` (theirs ignores
    its seed).

Presets
    "best" uses levels="halves": as many levels above zero as below, and none at zero, which makes
    four useful levels at 2 bits instead of three. It also uses `act_order`, `key_heads`, `aim` and
    `refine`.
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
from ..method import Flow, Job, Method, Packed, Rewrite
from ..models.decoder import decoder_of, quantizable
from ..models.residual_stream import Residual, Rotate, RotatedStream, random_rotations, residual_of
from ..models.sequences import Sequences
from ..numerics.activations import OFF, Attention, TokenQuant, pass_through
from ..numerics.aim import aimed
from ..numerics.cholesky import largest_first, prepare_hessian
from ..numerics.coordinate_descent import Objective, refined
from ..numerics.error_feedback import solve
from ..numerics.grids import Affine, Uniform
from ..numerics.rotations import cayley_step, hadamard, nearest_orthogonal
from ..numerics.stats import Hessian, PairedHessian, Stat
from .options import check_aim, check_choice, check_damp, check_least, check_positive, check_refine
from .training import settled_attention
from .uniform import OnUniformGrid

ROTATIONS = ("hadamard", "learned")
SOLVERS = ("gptq", "rtn")
BATCH = 8  # sequences per learning step


@dataclass(frozen=True, kw_only=True)
class SpinQuant(OnUniformGrid):
    """a_bits, kv_bits: 16 is not quantized. kv_bits is simulated: keys and values are rounded where
    attention reads them, and the cache keeps the model's dtype. key_heads: a grid per head of a
    key, as values have. solver: gptq or rtn. levels: absmax, full or halves (see `Uniform`).
    w_clip: search each range. rotations: hadamard or learned. r4: rotate the input of down_proj.
    head_dim: 0 is filled in from the model.
    """

    name: ClassVar[str] = "spinquant"
    title: ClassVar[str] = "SpinQuant (Liu et al. 2025)"
    observes: ClassVar[type[Stat] | None] = PairedHessian
    best: ClassVar[dict[str, Any]] = {
        "levels": "halves",
        "act_order": True,
        "key_heads": True,
        "aim": 0.5,
        "refine": 2,
    }

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
    aim: float = 0.0
    refine: int = 0
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
        check_aim(self)
        check_refine(self)
        if self.solver != "gptq" and (self.aim or self.refine):
            raise LLQError(
                f"aim and refine need the statistics of solver=gptq; with solver={self.solver} "
                "give aim=0 and refine=0"
            )
        check_positive(self, "learn_steps", "learn_rate")
        check_least(self, 0, "head_dim")

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, True, self.w_clip, self.scale_bits, self.levels)

    # --- roles: o_proj has a grid per head, down_proj a rotated input -----------------------------

    turns: ClassVar[bool] = False
    heads: ClassVar[bool] = False

    def for_linear(self, name: str) -> Method:
        return _role(self, name.rpartition(".")[2])

    @property
    def token_quant(self) -> TokenQuant:
        """How the input of this linear is quantized."""
        if self.heads and self.head_dim:  # one grid per head, whose range need not contain zero
            return TokenQuant(self.a_bits, self.a_sym, self.head_dim)
        return TokenQuant(self.a_bits, self.a_sym, zero_inside=True)

    @property
    def attention(self) -> Attention | None:
        if self.kv_bits == OFF:
            return None
        key = TokenQuant(self.kv_bits, False, zero_inside=True)
        value = TokenQuant(self.kv_bits, False)
        return Attention(key=key, value=value, joint_key=not self.key_heads, hadamard=True)

    @property
    def weight_only(self) -> bool:
        return not self.token_quant.on and self.attention is None

    def _input(self, x: Tensor) -> Tensor:
        """x as the stored weight should get it: rotated and quantized."""
        if self.turns:
            x = hadamard(x.shape[-1], x.device).turned(x)
        return self.token_quant(x)

    # --- one linear -------------------------------------------------------------------------------

    @property
    def sequential(self) -> bool:
        return self.calibrated

    @property
    def calibrated(self) -> bool:
        return self.solver == "gptq"

    @property
    def flow(self) -> Flow:
        return Flow.BOTH if self.aim else Flow.QUANTIZED

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        # 1. statistics
        turn = hadamard(weight_OI.shape[1], weight_OI.device)
        order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
        U_II, dead_I = None, None
        aimed_OI = aimed(weight_OI, stat, self.aim)

        # 2. order, 3. factor
        if self.solver == "gptq":
            assert isinstance(stat, Hessian)
            H_II = turn.apply(turn.apply(stat.H_II).T) if self.turns else stat.H_II
            order = largest_first if self.act_order else None
            H_II, U_II, order_I, dead_I = prepare_hessian(
                H_II, self.damp, job.notes, order, fallback="rtn"
            )
        if U_II is not None:
            weight_OI = aimed_OI
        rotated_OI = turn.apply(weight_OI) if self.turns else weight_OI
        W_OI = rotated_OI if dead_I is None else rotated_OI.masked_fill(dead_I, 0)

        # 4. grids that do not depend on the feedback; None: found when a group is reached
        static_OG = None
        if self.group_size == -1:
            static_OG = self.grid.grid(rotated_OI)  # with dead columns, as theirs
        elif self.act_order:
            static_OG = self.grid.grids(W_OI)  # groups are of the model's columns

        # 5. solve, refine
        group_I = order_I // self.grid.size(len(order_I))
        W_OI = W_OI[:, order_I]
        used_OI = W_OI.clone() if self.refine else W_OI  # solve overwrites it
        solution = solve(used_OI, U_II, self.grid, group_I, static_OG)
        if self.refine and U_II is not None:
            objective = Objective.of(H_II, job.notes["damp"], H_II, W_OI, W_OI)
            solution = refined(objective, solution, self.grid, self.refine)
        codes_OI, grid_OG, _ = solution
        packed = self.grid.pack(codes_OI[:, torch.argsort(order_I)], grid_OG)
        if self.levels == "halves":  # no level is zero, so rows of zeros get the scale 0
            packed["scale"] *= weight_OI.any(1, keepdim=True)
        return packed

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = super().dequantize(packed, out_features, in_features)
        if not self.turns:
            return weight_OI
        return hadamard(in_features, weight_OI.device).invert(weight_OI)

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        if self.turns:
            raise LLQError(
                f"{self.name} rotates the input of down_proj at run time; quantize with r4=False"
            )
        return super().affine(packed, out_features, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return super().linear(self._input(x), packed, bias, out_features)

    # --- the whole model --------------------------------------------------------------------------

    def bound_to(self, model: nn.Module) -> Self:
        residual = residual_of(model)  # refuses models that cannot be rotated
        if self.head_dim not in (0, residual.head_dim):
            raise LLQError(f"head_dim={self.head_dim}, but the model's is {residual.head_dim}")
        return replace(self, head_dim=residual.head_dim) if self.a_bits < OFF else self

    def rewrite(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Rewrite:
        residual = residual_of(model)
        notes: dict[str, Any] = {
            "rotations": self.rotations,
            "seed": self.seed,
            "untied": residual.tied,
        }
        if not learned:
            return RotatedStream(residual, *random_rotations(residual, self.seed), notes=notes)
        losses = learned["losses"].tolist()
        notes["learning_loss"] = [losses[0], losses[-1]]
        return RotatedStream(residual, *_matrices([learned["r1"], *learned["r2"]]), notes=notes)

    # --- learning the rotations -------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        return self.rotations == "learned"

    @torch.enable_grad()
    def learn(
        self,
        model: nn.Module,
        data: Sequences,
        attend: Callable[[nn.Module], Any],
        listener: PassListener,
    ) -> dict[str, Tensor]:
        """R1 and R2 with the least next-token loss, in fp64. Activations, or else weights, are
        quantized meanwhile.

        This needs four times the model's memory: its tensors, the rotated ones, their gradients,
        and room for rotating.
        """
        residual = residual_of(model)
        stream, heads = random_rotations(residual, self.seed)
        device = next(model.parameters()).device
        eyes = [
            torch.eye(n, device=device) for n in (residual.width, *[residual.head_dim] * len(heads))
        ]
        rotations = [turn(eye) for turn, eye in zip((stream, *heads), eyes, strict=True)]
        student = _Student(self, residual, model.requires_grad_(False), attend)
        losses = []
        listener.stage("learning rotations", self.learn_steps)
        for step in range(self.learn_steps):
            rows = [(step * BATCH + i) % len(data) for i in range(BATCH)]
            with settled_attention(device):
                loss, gradients = student.gradients(rotations, data, rows)
            size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            rate = self.learn_rate * (1 + math.cos(math.pi * step / self.learn_steps)) / 2
            shrink = min(1.0, 1 / (size + 1e-6))  # as the authors' trainer, to norm 1
            rotations = [
                cayley_step(R, g * shrink, rate) for R, g in zip(rotations, gradients, strict=True)
            ]
            losses.append(loss)
            listener.advance()
        r1, *r2 = [nearest_orthogonal(R).cpu() for R in rotations]
        return {"r1": r1, "r2": torch.stack(r2), "losses": torch.tensor(losses)}


class _Outputs(SpinQuant):
    """SpinQuant of o_proj."""

    heads: ClassVar[bool] = True


class _Down(SpinQuant):
    """SpinQuant of down_proj, with R4."""

    turns: ClassVar[bool] = True


@lru_cache(maxsize=64)
def _role(method: SpinQuant, projection: str) -> SpinQuant:
    kinds = {"o_proj": _Outputs, "down_proj": _Down if method.r4 else SpinQuant}
    return kinds.get(projection, SpinQuant)(**method.to_dict())


def _times(R: Tensor, x: Tensor) -> Tensor:
    return x @ R.to(x)


class _Student:
    """The model with rotations as its only parameters; all other tensors stay."""

    def __init__(
        self,
        method: SpinQuant,
        residual: Residual,
        model: nn.Module,
        attend: Callable[[nn.Module], Any],
    ) -> None:
        self.method = method
        self.residual = residual
        self.model = model
        self.dense = {name: p.detach() for name, p in model.named_parameters()}
        self.dense |= {
            name: self.dense[source] for name, source in RotatedStream(residual).untied.items()
        }
        self.roles = {name: _role(method, name.rpartition(".")[2]) for name in quantizable(model)}
        for name, role in self.roles.items():
            hook = partial(_read_rounded, role)
            model.get_submodule(name).register_forward_pre_hook(hook)
        attend(decoder_of(model)[1])

    def gradients(
        self, rotations: list[Tensor], data: Sequences, rows: list[int]
    ) -> tuple[float, list[Tensor]]:
        """The mean next-token loss of these sequences, and its gradient in each rotation."""
        leaves = [R.detach().requires_grad_() for R in rotations]
        turned = RotatedStream(self.residual, *_matrices(leaves), dtype=leaves[0].dtype)
        with torch.no_grad():
            weights = {name: self._weight(name, turned) for name in self.dense}
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        total = 0.0

        def run(**options: Any) -> Any:
            return torch.func.functional_call(self.model, weights, (), options, tie_weights=False)

        # One sequence at a time, because the logits are the largest tensor.
        for batch in data.batches(rows):
            logits_1PV = batch.to_learn(self.model, run)
            loss = nn.functional.cross_entropy(*batch.labelled(logits_1PV)) / len(rows)
            torch.autograd.backward(loss)
            total += loss.item()
        # Rotate once more, now with a graph: that of one tensor at a time fits into memory.
        for name, weight in weights.items():
            again = self._weight(name, turned)
            if again.requires_grad and weight.grad is not None:
                torch.autograd.backward(again, weight.grad)
        return total, [
            leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves
        ]

    def _weight(self, name: str, turned: RotatedStream) -> Tensor:
        """The tensor of this name, rotated and, where activations are not, quantized."""
        weight = turned(name, self.dense[name], self.dense.__getitem__)
        role = self.roles.get(name.removesuffix(".weight"))
        if role is None or not name.endswith(".weight"):
            return weight
        if role.turns:
            weight = hadamard(weight.shape[1], weight.device).apply(weight).to(weight.dtype)
        if role.a_bits < OFF:
            return weight  # rounding to nearest here would be worse than GPTQ will be
        weight_OI = weight.detach().float()
        spread = role.grid.spread(role.grid.grids(weight_OI), weight.shape[1])
        return pass_through(weight, spread.values(spread.codes(weight_OI, role.bits)))


def _read_rounded(role: SpinQuant, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """Forward pre-hook: rotates and quantizes the input, and passes its gradient through."""
    x = args[0]
    if role.turns:
        x = hadamard(x.shape[-1], x.device).turned(x)
    return pass_through(x, role.token_quant(x.detach()))


def _matrices(rotations: list[Tensor]) -> tuple[Rotate, list[Rotate]]:
    stream, *heads = [partial(_times, R) for R in rotations]
    return stream, list(heads)
