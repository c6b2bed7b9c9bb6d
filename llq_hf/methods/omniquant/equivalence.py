"""OmniQuant's learnable equivalent transformation: factors that move between neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...method import BlockData, Step
from ...models.decoder import hidden_of as first_output
from ...numerics.stats import AbsMax
from ..training import run_block
from .rounding import Factor, TrainedLinear

BAKED = ("o_proj", "down_proj")  # whose LET, if any, is in the weights on both sides
SMALLEST, LARGEST = 0.01, 6e4  # |s| of LET: the authors' floor; what fp16 holds


class ScalePair(NamedTuple):
    """Two linears of an attention between which channels can be scaled: s divides rows of one,
    multiplies the other.
    """

    divided: str
    rows: Tensor  # which s each row of it takes
    multiplied: str
    others: Tensor  # which s each row, or column, of the other takes
    by_columns: bool

    @property
    def width(self) -> int:
        """How many s there are."""
        return int(self.rows.max()) + 1


def equivalences(
    step: Step,
    twin: nn.Module,
    parts: dict[str, TrainedLinear],
    inputs: dict[str, _Channels],
    alpha: float,
) -> tuple[list[nn.Parameter], list[str]]:
    """Give `parts` their factors; every s there is, and the pairs left out. `twin` is the block as
    it was, in fp32.
    """
    scales, left_out = [], []
    for group in step.groups:
        members = [parts[name] for name in group if not name.endswith(BAKED)]
        if members:
            weights_I = torch.stack([part.weight_OI.abs().amax(0) for part in members]).amax(0)
            scales.append(s := _start(inputs[group[0]].max_I, weights_I, alpha))
            for part in members:
                part.divisor, part.columns = s, Factor(s, torch.arange(len(s), device=s.device))
    for name, module in twin.named_modules():
        for pair in _pairs(name, module, parts):
            if not _preserves(step, twin, module, pair):
                left_out.append(f"{pair.divided} and {pair.multiplied}")
                continue
            ones = torch.ones(pair.width, device=pair.rows.device)
            if pair.by_columns:
                x_I, w_I = (
                    inputs[pair.multiplied].max_I,
                    parts[pair.multiplied].weight_OI.abs().amax(0),
                )
                x, w = (
                    torch.zeros_like(ones).scatter_reduce(0, pair.others, t_I, "amax")
                    for t_I in (x_I, w_I)
                )
                s = _start(x, w, alpha)
                parts[pair.multiplied].columns = Factor(s, pair.others)
            else:
                s = nn.Parameter(ones)
                parts[pair.multiplied].rows = Factor(s, pair.others)
            parts[pair.divided].rows = Factor(s, pair.rows, inverse=True)
            scales.append(s)
    return scales, left_out


def _pairs(name: str, module: nn.Module, parts: dict[str, TrainedLinear]) -> list[ScalePair]:
    """q and k, v and o of an attention module with heads of `head_dim` channels; [] where `module`
    is none.
    """
    q, k, v, o = (f"{name}.{letter}_proj".lstrip(".") for letter in "qkvo")
    width: Any = getattr(module, "head_dim", None)
    if not {q, k, v, o} <= set(parts) or not isinstance(width, int):
        return []
    heads, shared = parts[q].out_features // width, parts[k].out_features // width
    channel_KD = torch.arange(shared * width, device=parts[q].weight_OI.device).view(shared, width)
    # RoPE rotates channels i and i + width / 2 of a head into each other.
    turning_KD = channel_KD[:, : width // 2].repeat(1, 2) - channel_KD[:, :1] // 2
    found = []
    for divided, multiplied, index_KD, by_columns in (
        (q, k, turning_KD, False),
        (v, o, channel_KD, True),
    ):
        index_HD = index_KD.repeat_interleave(heads // shared, dim=0)
        rows, others = (index_KD, index_HD) if by_columns else (index_HD, index_KD)
        found.append(ScalePair(divided, rows.flatten(), multiplied, others.flatten(), by_columns))
    return found


def _preserves(step: Step, twin: nn.Module, module: nn.Module, pair: ScalePair) -> bool:
    """Whether the attention `module` inside `twin` gives the same with the pair scaled: a trial on
    one sequence.
    """
    assert step.data is not None
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(
        lambda module, args, output: outputs.append(first_output(output))
    )
    first, second = twin.get_submodule(pair.divided), twin.get_submodule(pair.multiplied)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    before = first.weight.data, second.weight.data
    s = (
        0.5 + torch.arange(pair.width, device=pair.rows.device) * 0.618 % 1
    )  # any numbers that differ
    try:
        run_sequence(twin, step.data, 0)
        first.weight.data = first.weight.data / s[pair.rows, None]
        second.weight.data = second.weight.data * (
            s[pair.others] if pair.by_columns else s[pair.others, None]
        )
        run_sequence(twin, step.data, 0)
    finally:
        hook.remove()
        first.weight.data, second.weight.data = before
    return bool((outputs[1] - outputs[0]).norm() <= 1e-3 * outputs[0].norm())


def _start(inputs: Tensor, weights: Tensor, alpha: float) -> nn.Parameter:
    """s of SmoothQuant's form, from the largest magnitudes of each channel's inputs and weights."""
    return nn.Parameter(
        usable(inputs.clamp_min(1e-5).pow(alpha) / weights.clamp_min(1e-5).pow(1 - alpha))
    )


def usable(s: Tensor) -> Tensor:
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


def run_sequence(block: nn.Module, data: BlockData, i: int) -> Tensor:
    """fp32 output [1, S, D] of an fp32 block on the quantized inputs of sequence i."""
    return run_block(block, data, slice(i, i + 1))
