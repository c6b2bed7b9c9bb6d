"""OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137), after OpenGVLab/OmniQuant at 95fae1b.

Block by block, gradient descent on what surrounds the rounding; the weights themselves never change. Learnable weight
clipping (LWC): every group's range [low, high] shrinks to [sigmoid(l) low, sigmoid(u) high]. Learnable equivalent
transformation (LET, where activations are quantized too): channels of a linear's input are divided by s, the weight's
columns multiplied; between v and o, and q and k, s is baked into the two weights. The loss is the mean square between
the quantized block on quantized inputs and the full-precision block on its own; `aug_loss` adds the distance to the
full-precision block on quantized inputs. One sequence a step, AdamW without decay, gradients straight through the
rounding. The authors' scripts train 20 epochs, and 40 with aug_loss for 2 bits. The study's rows are 4 bits in groups
of 128, and W6A6 and W4A4 with group_size=-1, where inputs of linears, and queries, keys (after RoPE) and values, are
quantized per token and head on an asymmetric grid.

Storage (uniform grid; G = ceil(I / group_size) groups)
    name      shape                 dtype   bits per weight
    weight    [O, I * bits / 32]    int32   bits
    scale     [O, G]                fp16    16 / group_size
    zero      [O * G * bits / 32]   int32   bits / group_size (absent if sym)
    in_scale  [I]                   fp16    16 / O (LET only; not in o and down, whose inputs nobody divides)

Departures: training is fp32 (their AMP needs a GPU and a loss scaler) and sees scales as stored in fp16; codes are
decided from fp32, not after a cast to half. Ranges always hold zero, so zero points are codes (theirs leave the code
range, which breaks packing), and gradients pass the rounding of zero points too (theirs stop there: 34.0 against 29.4
on stories260K at 2 bits). Scales below 1e-5 are kept. LET divides the input at run time instead of folding s into the
norm, which stays bitwise the base's; heads that share keys and values share s (theirs fails on grouped queries), and
so do the two channels that RoPE rotates together, or q and k would not be the same function. A pair that still would
not be (a bias, a norm after q) is left out and noted. Where LET starts, weights of all linears of the input count, by
magnitude (theirs: of one, by value). A loss that is not finite is an error; theirs enters a debugger. What LET bakes
into q, k, v and o counts as weight error in reports.

preset="best" starts from ranges searched for the least error weighted by the inputs' squares (`search_range`), lowers
the learning rates linearly to zero (`decay`), and learns which way each weight rounds (`rounding_lr`): an offset within
half a step, moved by the sign of its gradient, ever slower, as AutoRound (arXiv 2309.05516) does; it is one fp32 number
a weight while training, and nothing stored.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import LLQError
from ...method import BlockData, Flow, Method, Packed, Step
from ...models.decoder import hidden_of as first_output
from ...numerics.activations import OFF, Attention, TokenQuant, round_through
from ...numerics.grids import Affine, Grid, Spec, Uniform
from ...numerics.stats import AbsMax
from ..training import Trained, run_block, train_block

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: clips a little from the start
SEARCHED = [0.998, *(1 - i / 20 for i in range(1, 15))]  # shares of a range's end: down to 0.3
SMALLEST, LARGEST = 0.01, 6e4  # |s| of LET: the authors' floor; what fp16 holds
TINY_SCALE = 2.0**-24  # the smallest fp16 above zero
BAKED = ("o_proj", "down_proj")  # whose LET, if any, is in the weights on both sides


@dataclass(frozen=True, kw_only=True)
class OmniQuant(Method):
    """a_bits 16: activations stay as they are, and `let` means nothing; alpha: LET starts at x**alpha / w**(1 - alpha).

    lwc_lr, let_lr, rounding_lr: learning rates, of logits, of s, of rounding in grid steps (0: to nearest).
    """

    name: ClassVar[str] = "omniquant"
    title: ClassVar[str] = "OmniQuant (Shao et al. 2024)"
    best: ClassVar[dict[str, Any]] = {"aug_loss": True, "search_range": True, "rounding_lr": 5e-3, "decay": True}
    training_copies: ClassVar[int] = 5  # twin, weights, learned rounding and its gradients, one in the forward pass
    divides_input: ClassVar[bool] = True

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
        if self.epochs < 0:
            raise LLQError(f"epochs={self.epochs} must not be negative")
        for option in ("lwc_lr", "let_lr", "rounding_lr"):
            if not 0 <= getattr(self, option) < math.inf:
                raise LLQError(f"{option}={getattr(self, option)} must be a number of at least 0")
        if not 0 <= self.alpha <= 1:
            raise LLQError(f"alpha={self.alpha} must lie in 0..1")

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym)

    @property
    def tokens(self) -> TokenQuant:
        return TokenQuant(self.a_bits, sym=False)

    @property
    def transforms(self) -> bool:
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

    def at(self, name: str) -> Method:
        return _Baked(**self.to_dict()) if self.transforms and name.endswith(BAKED) else self

    # --- what is stored ----------------------------------------------------------------------------------------

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        layout = self.grid.layout(out_features, in_features)
        if self.transforms and self.divides_input:
            layout["in_scale"] = Spec((in_features,), torch.float16)
        return layout

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        weight_OI = self.grid.unpack(packed, in_features)
        return weight_OI / packed["in_scale"].float() if "in_scale" in packed else weight_OI

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        return self.grid.affine(packed, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        if not self.tokens.on:
            return self.grid.linear(x, packed, bias)
        z = x / packed["in_scale"].float() if "in_scale" in packed else x
        return self.grid.linear(self.tokens(z).to(x.dtype), packed, bias)

    # --- training ----------------------------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        twin = copy.deepcopy(step.block).float().requires_grad_(False)
        parts = {name: _Linear(linear, self) for name, linear in step.linears.items()}
        inputs = _observed(step) if self.transforms or self.search_range else {}
        scales, left_out = _equivalences(step, twin, parts, inputs, self.alpha) if self.transforms else ([], [])
        if self.search_range:
            step.listener.stage("searching ranges", len(parts))
            for name, part in parts.items():
                part.search(inputs[name].square_I)
                step.listener.advance(1)
        for name, part in parts.items():
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, part)
        step.attend(twin)
        losses = _Training(self, step, twin, list(parts.values()), scales).run()
        for s in scales:
            s.copy_(s.half())  # as the file will hold it, before any code is chosen

        packed = {}
        for name, part in parts.items():
            job = step.job(name)
            job.notes.update({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})
            job.notes.update({"let_left_out": left_out} if left_out else {})
            packed[name] = part.packed(self.at(job.name).layout(part.out_features, part.in_features))
        return packed


class _Baked(OmniQuant):
    """OmniQuant for a linear whose input nobody divides."""

    divides_input: ClassVar[bool] = False


# --- one linear under training -------------------------------------------------------------------------------------


class _Factor(NamedTuple):
    """What LET multiplies the rows or the columns of a weight by: entries of s, or of 1 / s."""

    s: nn.Parameter
    picks: Tensor  # of s, for every row or column
    inverse: bool = False

    def __call__(self) -> Tensor:
        picked = self.s[self.picks]
        return 1 / picked if self.inverse else picked


class _Linear(nn.Module):
    """A linear that rounds its weight and its inputs anew at every forward pass, on grids under training."""

    def __init__(self, linear: nn.Linear, method: OmniQuant) -> None:
        super().__init__()
        self.method, self.levels = method, 2**method.bits - 1
        self.out_features, self.in_features = linear.weight.shape
        self.size = self.in_features if method.group_size == -1 else method.group_size
        groups = -(-self.in_features // self.size)
        self.weight_OI = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        whole, device = (self.out_features, groups, self.size), linear.weight.device
        self.clip_2OG = nn.Parameter(torch.full((2, *whole[:2]), INITIAL_LOGIT, device=device))  # upper, lower ends
        self.drift_OGg = nn.Parameter(torch.zeros(whole, device=device)) if method.rounding_lr else None
        self.rows: _Factor | None = None
        self.columns: _Factor | None = None
        self.divisor: nn.Parameter | None = None  # the input's
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor is not None:
            x = x / self.divisor
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        scale, zero = self._grid(low_OG1, high_OG1)
        values_OGg = (self._codes(weight_OGg, scale, zero) - zero) * scale
        return F.linear(self.method.tokens(x), self._whole(values_OGg), self.bias)

    def packed(self, layout: dict[str, Spec]) -> Packed:
        """The tensors of `layout`. Codes are decided here."""
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        grid = self._grid(low_OG1, high_OG1)
        codes_OI = self._whole(self._codes(weight_OGg, *grid))
        packed = self.method.grid.pack(codes_OI, Grid(grid.scale[..., 0], grid.zero[..., 0]))
        if "in_scale" in layout:
            assert self.divisor is not None
            packed["in_scale"] = self.divisor.detach().half()
        return packed

    def search(self, squares_I: Tensor) -> None:
        """Start from the two ends of each range that make sum(squares * error**2) least; squares: of the inputs."""
        weight_OGg, low_OG1, high_OG1 = self._grouped()
        if self.columns is not None:
            squares_I = squares_I / self.columns().square()
        squares_Gg = F.pad(squares_I, (0, -self.in_features % self.size)).view(-1, self.size)
        best_2OG, least_OG = self.clip_2OG.clone(), torch.full_like(self.clip_2OG[0], torch.inf)
        for up, down in itertools.product(SEARCHED, repeat=2):
            self.clip_2OG[0], self.clip_2OG[1] = math.log(up / (1 - up)), math.log(down / (1 - down))
            grid = self._grid(low_OG1, high_OG1)
            values_OGg = grid.values(grid.codes(weight_OGg, self.method.bits))
            error_OG = (values_OGg - weight_OGg).square_().mul_(squares_Gg).sum(-1)
            best_2OG = torch.where(error_OG < least_OG, self.clip_2OG, best_2OG)
            least_OG = torch.minimum(error_OG, least_OG)
        self.clip_2OG.copy_(best_2OG)

    def _codes(self, weight_OGg: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps_OGg = weight_OGg / scale
        if self.drift_OGg is not None:
            steps_OGg = steps_OGg + self.drift_OGg
        return (round_through(steps_OGg) + zero).clamp(0, self.levels)

    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transformed weight in groups [O, G, g], the last one filled up with its last weight; their ranges."""
        if self._fixed is not None:
            return self._fixed
        weight_OI = self.weight_OI
        if self.rows is not None:
            weight_OI = weight_OI * self.rows()[:, None]
        if self.columns is not None:
            weight_OI = weight_OI * self.columns()
        missing = -self.in_features % self.size
        padded_OI = F.pad(weight_OI, (0, missing), mode="replicate") if missing else weight_OI
        weight_OGg = padded_OI.view(self.out_features, -1, self.size)
        low_OG1 = weight_OGg.amin(-1, keepdim=True).clamp_max(0)
        high_OG1 = weight_OGg.amax(-1, keepdim=True).clamp_min(0)
        found = weight_OGg, low_OG1, high_OG1
        if self.rows is None and self.columns is None:
            self._fixed = found
        return found

    def _whole(self, weight_OGg: Tensor) -> Tensor:
        return weight_OGg.flatten(1)[:, : self.in_features]

    def _grid(self, low_OG1: Tensor, high_OG1: Tensor) -> Grid:
        """Clipped ranges -> scales as the file will hold them, and zero points; both [O, G, 1] and differentiable."""
        up_OG1, down_OG1 = torch.sigmoid(self.clip_2OG).unsqueeze(-1)
        low_OG1, high_OG1 = low_OG1 * down_OG1, high_OG1 * up_OG1
        if self.method.sym:
            high_OG1 = torch.maximum(high_OG1, -low_OG1)
            low_OG1 = -high_OG1
        scale = ((high_OG1 - low_OG1) / self.levels).clamp_min(TINY_SCALE)
        stored = scale.detach().half().float()
        scale = scale + (stored - scale).detach() if scale.requires_grad else stored
        if self.method.sym:
            return Grid(scale, torch.full_like(scale, float(2 ** (self.method.bits - 1))))
        return Grid(scale, round_through(-low_OG1 / scale).clamp(0, self.levels))


# --- the equivalent transformation ---------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Two linears of an attention between which channels can be scaled: s divides rows of one, multiplies the other."""

    divided: str
    rows: Tensor  # which s each row of it takes
    multiplied: str
    others: Tensor  # which s each row, or column, of the other takes
    by_columns: bool

    @property
    def width(self) -> int:
        """How many s there are."""
        return int(self.rows.max()) + 1


def _equivalences(
    step: Step, twin: nn.Module, parts: dict[str, _Linear], inputs: dict[str, _Channels], alpha: float
) -> tuple[list[nn.Parameter], list[str]]:
    """Give `parts` their factors; every s there is, and the pairs left out. `twin` is the block as it was, in fp32."""
    scales, left_out = [], []
    for group in step.groups:
        members = [parts[name] for name in group if not name.endswith(BAKED)]
        if members:
            weights_I = torch.stack([part.weight_OI.abs().amax(0) for part in members]).amax(0)
            scales.append(s := _start(inputs[group[0]].max_I, weights_I, alpha))
            for part in members:
                part.divisor, part.columns = s, _Factor(s, torch.arange(len(s), device=s.device))
    for name, module in twin.named_modules():
        for pair in _pairs(name, module, parts):
            if not _preserves(step, twin, module, pair):
                left_out.append(f"{pair.divided} and {pair.multiplied}")
                continue
            ones = torch.ones(pair.width, device=pair.rows.device)
            if pair.by_columns:
                x_I, w_I = inputs[pair.multiplied].max_I, parts[pair.multiplied].weight_OI.abs().amax(0)
                x, w = (torch.zeros_like(ones).scatter_reduce(0, pair.others, t_I, "amax") for t_I in (x_I, w_I))
                s = _start(x, w, alpha)
                parts[pair.multiplied].columns = _Factor(s, pair.others)
            else:
                s = nn.Parameter(ones)
                parts[pair.multiplied].rows = _Factor(s, pair.others)
            parts[pair.divided].rows = _Factor(s, pair.rows, inverse=True)
            scales.append(s)
    return scales, left_out


def _pairs(name: str, module: nn.Module, parts: dict[str, _Linear]) -> list[_Pair]:
    """q and k, v and o of an attention module with heads of `head_dim` channels; [] where `module` is none."""
    q, k, v, o = (f"{name}.{letter}_proj".lstrip(".") for letter in "qkvo")
    width: Any = getattr(module, "head_dim", None)
    if not {q, k, v, o} <= set(parts) or not isinstance(width, int):
        return []
    heads, shared = parts[q].out_features // width, parts[k].out_features // width
    channel_KD = torch.arange(shared * width, device=parts[q].weight_OI.device).view(shared, width)
    # RoPE rotates channels i and i + width / 2 of a head into each other.
    turning_KD = channel_KD[:, : width // 2].repeat(1, 2) - channel_KD[:, :1] // 2
    found = []
    for divided, multiplied, index_KD, by_columns in ((q, k, turning_KD, False), (v, o, channel_KD, True)):
        index_HD = index_KD.repeat_interleave(heads // shared, dim=0)
        rows, others = (index_KD, index_HD) if by_columns else (index_HD, index_KD)
        found.append(_Pair(divided, rows.flatten(), multiplied, others.flatten(), by_columns))
    return found


def _preserves(step: Step, twin: nn.Module, module: nn.Module, pair: _Pair) -> bool:
    """Whether the attention `module` inside `twin` gives the same with the pair scaled: a trial on one sequence."""
    assert step.data is not None
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(first_output(output)))
    first, second = twin.get_submodule(pair.divided), twin.get_submodule(pair.multiplied)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    before = first.weight.data, second.weight.data
    s = 0.5 + torch.arange(pair.width, device=pair.rows.device) * 0.618 % 1  # any numbers that differ
    try:
        _run(twin, step.data, 0)
        first.weight.data = first.weight.data / s[pair.rows, None]
        second.weight.data = second.weight.data * (s[pair.others] if pair.by_columns else s[pair.others, None])
        _run(twin, step.data, 0)
    finally:
        hook.remove()
        first.weight.data, second.weight.data = before
    return bool((outputs[1] - outputs[0]).norm() <= 1e-3 * outputs[0].norm())


def _start(inputs: Tensor, weights: Tensor, alpha: float) -> nn.Parameter:
    """s of SmoothQuant's form, from the largest magnitudes of each channel's inputs and weights."""
    return nn.Parameter(_usable(inputs.clamp_min(1e-5).pow(alpha) / weights.clamp_min(1e-5).pow(1 - alpha)))


def _usable(s: Tensor) -> Tensor:
    """s kept away from zero and inside fp16; its sign is its own."""
    return torch.where(s < 0, -1.0, 1.0) * s.abs().clamp(SMALLEST, LARGEST)


class _Channels(AbsMax):
    """The largest magnitude of every input channel, and the sum of its squares."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.square_I = torch.zeros(in_features, device=device)

    def update(self, x_TI: Tensor, sequences: int) -> None:
        super().update(x_TI, sequences)
        self.square_I += x_TI.float().square().sum(0)


def _observed(step: Step) -> dict[str, _Channels]:
    """What every linear of the full-precision block sees of the quantized stream."""
    assert step.data is not None
    found: dict[str, _Channels] = {}
    hooks = []
    for names in step.groups:
        first = step.linears[names[0]]
        stat = _Channels(first.in_features, first.weight.device)
        found.update(dict.fromkeys(names, stat))

        def watch(module: nn.Module, args: tuple[Tensor, ...], stat: _Channels = stat) -> None:
            stat.update(args[0].flatten(0, -2), 1)

        hooks.append(first.register_forward_pre_hook(watch))
    try:
        step.run("statistics")
    finally:
        for hook in hooks:
            hook.remove()
    for name, stat in found.items():
        stat.check(f"{step.prefix}.{name}")
    return found


# --- training ------------------------------------------------------------------------------------------------------


class _Training:
    """The training of one block: clips and s by AdamW, drifts by the signs of their gradients."""

    def __init__(
        self, method: OmniQuant, step: Step, twin: nn.Module, parts: list[_Linear], scales: list[nn.Parameter]
    ) -> None:
        assert step.data is not None
        self.method, self.step, self.data, self.twin, self.scales = method, step, step.data, twin, scales
        clips = [part.clip_2OG for part in parts]
        self.drifts = [part.drift_OGg for part in parts if part.drift_OGg is not None]
        self.parameters = clips + scales + self.drifts
        self.rates = method.lwc_lr, method.let_lr
        groups = [{"params": p, "lr": rate} for p, rate in zip((clips, scales), self.rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def run(self) -> list[float]:
        """Train, or go on where an interrupted run was; the mean loss of each epoch."""
        dense = _dense_outputs(self.step) if self.method.aug_loss and self.method.epochs else []

        def descend(rows: slice, done: float) -> Tensor:
            return self._descend(rows.start, dense[rows.start] if dense else None, 1 - done)

        trained = Trained(self.parameters, self.optimizer)
        return train_block(
            self.step, trained, self.method.epochs, 1, descend, "lower lwc_lr or let_lr, or run in float32"
        )

    def _descend(self, i: int, dense_BSD: Tensor | None, left: float) -> Tensor:
        """A step against the gradients on sequence i; the loss before it. left: falls from 1 to 0 over the training."""
        with torch.enable_grad():
            out_BSD = _run(self.twin, self.data, i)
            loss = F.mse_loss(out_BSD, self.data.targets(slice(i, i + 1)).to(out_BSD))
            if dense_BSD is not None:
                loss = loss + F.mse_loss(out_BSD, dense_BSD.to(out_BSD))
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
        if self.method.decay:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * left
        self.optimizer.step()
        for s in self.scales:
            s.copy_(_usable(s))
        for drift in self.drifts:
            assert drift.grad is not None
            drift.sub_(drift.grad.sign_(), alpha=self.method.rounding_lr * left).clamp_(-0.5, 0.5)
        return loss.detach()


def _run(block: nn.Module, data: BlockData, i: int) -> Tensor:
    """fp32 output [1, S, D] of an fp32 block on the quantized inputs of sequence i."""
    return run_block(block, data, slice(i, i + 1))


def _dense_outputs(step: Step) -> list[Tensor]:
    """What the full-precision block makes of the quantized inputs, per sequence [1, S, D] on the CPU."""
    assert step.data is not None
    found: list[Tensor] = []
    for rows in step.data.batches():
        hidden_BSD, kwargs = step.data.inputs(rows)
        out_BSD = first_output(step.block(hidden_BSD, **kwargs)).cpu()
        found += [out_BSD[i : i + 1] for i in range(len(out_BSD))]
    return found
