"""OmniQuant's learnable equivalent transformation (LET): factors that move between linears."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...method import BlockData, Step
from ...models.decoder import hidden_of as first_output
from ...models.decoder import watch_inputs
from ...numerics.stats import AbsMax
from ..training import run_block
from .rounding import Factor, TrainedLinear

BAKED = ("o_proj", "down_proj")  # their inputs are not divided; LET, if any, is in the weights
SMALLEST, LARGEST = 0.01, 6e4  # |s|: the authors' least value, and about the largest fp16


class ScalePair(NamedTuple):
    """Two linears of an attention module between which channels can be scaled: s divides the rows
    of one, and multiplies rows or columns of the other.
    """

    divided: str  # name inside the block
    rows: Tensor  # index into s of each row of it
    multiplied: str
    others: Tensor  # index into s of each row, or column, of it
    by_columns: bool  # columns of `multiplied`, else rows

    @property
    def width(self) -> int:
        """Number of entries of s."""
        return int(self.rows.max()) + 1


def equivalences(
    step: Step,
    twin: nn.Module,
    parts: dict[str, TrainedLinear],
    inputs: dict[str, Channels],
    alpha: float,
) -> tuple[list[nn.Parameter], list[str]]:
    """Set the factors of `parts`. Returns every s, and the pairs that are left out.

    twin: the original block in fp32. inputs: observed at each linear, by name.
    """
    scales = []
    left_out = []
    for group in step.groups:
        members = [parts[name] for name in group if not name.endswith(BAKED)]
        if members:
            weights_I = torch.stack([part.weight_OI.abs().amax(0) for part in members]).amax(0)
            scales.append(s := _start(inputs[group[0]].max_I, weights_I, alpha))
            for part in members:
                part.divisor = s
                part.columns = Factor(s, torch.arange(len(s), device=s.device))
    for name, module in twin.named_modules():
        for pair in _pairs(name, module, parts):
            if not _preserves(step, twin, module, pair):
                left_out.append(f"{pair.divided} and {pair.multiplied}")
                continue
            ones = torch.ones(pair.width, device=pair.rows.device)
            if pair.by_columns:
                x_I = inputs[pair.multiplied].max_I
                w_I = parts[pair.multiplied].weight_OI.abs().amax(0)
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
    """The pairs (q, k) and (v, o) of an attention module with heads of `head_dim` channels; [] for
    any other module.
    """
    q, k, v, o = (f"{name}.{letter}_proj".lstrip(".") for letter in "qkvo")
    width: Any = getattr(module, "head_dim", None)
    if not {q, k, v, o} <= set(parts) or not isinstance(width, int):
        return []
    heads, shared = parts[q].out_features // width, parts[k].out_features // width
    channel_KD = torch.arange(shared * width, device=parts[q].weight_OI.device).view(shared, width)
    # RoPE rotates channels i and i + width / 2 of a head together.
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
    """Whether the attention `module` inside `twin` gives the same outputs when the pair is scaled,
    tried on one sequence.
    """
    assert step.data is not None
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(first_output(output))

    first = twin.get_submodule(pair.divided)
    second = twin.get_submodule(pair.multiplied)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    before = first.weight.data, second.weight.data
    # Any numbers that differ.
    s = 0.5 + torch.arange(pair.width, device=pair.rows.device) * 0.618 % 1
    try:
        with module.register_forward_hook(record):
            run_sequence(twin, step.data, 0)
            first.weight.data = first.weight.data / s[pair.rows, None]
            second.weight.data = second.weight.data * (
                s[pair.others] if pair.by_columns else s[pair.others, None]
            )
            run_sequence(twin, step.data, 0)
    finally:
        first.weight.data, second.weight.data = before
    return bool((outputs[1] - outputs[0]).norm() <= 1e-3 * outputs[0].norm())


def _start(inputs: Tensor, weights: Tensor, alpha: float) -> nn.Parameter:
    """s in the form of SmoothQuant, from the largest magnitude of each channel's inputs and
    weights.
    """
    return nn.Parameter(
        usable(inputs.clamp_min(1e-5).pow(alpha) / weights.clamp_min(1e-5).pow(1 - alpha))
    )


def usable(s: Tensor) -> Tensor:
    """s with its magnitude clamped to SMALLEST..LARGEST; the sign stays."""
    return torch.where(s < 0, -1.0, 1.0) * s.abs().clamp(SMALLEST, LARGEST)


class Channels(AbsMax):
    """The largest magnitude of every input channel, and the sum of its squares."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.square_I = torch.zeros(in_features, device=device)

    def update(self, x_TI: Tensor, sequences: int) -> None:
        super().update(x_TI, sequences)
        self.square_I += x_TI.float().square().sum(0)


def observe_inputs(step: Step) -> dict[str, Channels]:
    """Statistics of the inputs of each linear of the full-precision block, on quantized inputs."""
    assert step.data is not None
    stats: dict[str, Channels] = {}
    for names in step.groups:
        first = step.linears[names[0]]
        stats |= dict.fromkeys(names, Channels(first.in_features, first.weight.device))
    firsts = {names[0]: step.linears[names[0]] for names in step.groups}
    with watch_inputs(firsts, lambda name, x: stats[name].update(x.flatten(0, -2), 1)):
        step.run("statistics")
    for name, stat in stats.items():
        stat.check(f"{step.prefix}.{name}")
    return stats


def run_sequence(block: nn.Module, data: BlockData, i: int) -> Tensor:
    """fp32 output [1, S, D] of an fp32 block on the quantized inputs of sequence i."""
    return run_block(block, data, slice(i, i + 1))
