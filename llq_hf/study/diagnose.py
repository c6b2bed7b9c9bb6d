"""Measures which parts of a model lose most when they are rounded, and what could have told it.

A part is a linear of a decoder block, or all linears of a block. Its loss is the KL divergence, in
nats per token, of the model in which this part alone is rounded to nearest, from full precision.

Legend: N sequences, S tokens each, T tokens, D hidden size, O out_features, I in_features.

figure          | of     | meaning
weight_kurtosis | linear | E w^4 / (E w^2)^2 of the weights; 3 for a normal distribution
weight_outlier  | linear | largest |w| over the root mean square
input_kurtosis  | linear | E x^4 / (E x^2)^2 of the inputs
input_outlier   | linear | root mean square of the largest input channel, over the median channel's
input_rank      | linear | effective rank of the inputs, (tr H)^2 / tr(H^2) with H = sum x x^T, as a
                |        | share of I; 1 if all directions are equally strong
massive         | block  | largest |x| of the hidden states after it, over their median |x|
                |        | ("massive activations", Sun et al. 2024)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.progress import Progress
from ..engine.blocks import LiveBlocks
from ..engine.stream import Stream
from ..models.decoder import (
    block_linears,
    block_prefixes,
    decoder_of,
    forwards_replaced,
    input_groups,
)
from ..numerics.divergence import Divergence
from ..numerics.grids import Uniform
from ..numerics.stats import Hessian

BLOCK = "block"  # the kind of a part that is a whole block
WEIGHT_FIGURES = ("weight_kurtosis", "weight_outlier")
INPUT_FIGURES = ("input_kurtosis", "input_outlier", "input_rank")
BLOCK_FIGURES = ("massive",)


@dataclass(frozen=True)
class Rounding:
    """The grids on which parts are rounded: asymmetric, in groups of `group_size` columns."""

    bits: tuple[int, ...] = (4, 3, 2)
    group_size: int = 128

    def __post_init__(self) -> None:
        if not self.bits or not all(1 <= bits <= 8 for bits in self.bits):
            raise LLQError(f"bits={self.bits} are no widths to round to; give some of 1 to 8")
        _ = Uniform(8, self.group_size)  # validates group_size


@dataclass
class Part:
    """A linear, or a block. kl: bits -> nats per token when it alone is rounded."""

    name: str  # full module name
    block: int
    kind: str  # "self_attn.q_proj", ..., or "block"
    figures: dict[str, float] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """What was found of a model. tokens: of the text that it was measured on."""

    model: str
    tokens: int
    rounding: Rounding
    parts: list[Part]

    def of_kind(self, block: bool) -> list[Part]:
        """The blocks, or the linears."""
        return [part for part in self.parts if (part.kind == BLOCK) is block]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(
    name: str,
    model: nn.Module,
    ids_NS: Tensor,
    rounding: Rounding,
    progress: Progress | None = None,
) -> Diagnosis:
    """All figures and losses of the dense `model`, which is as before afterwards.

    LLQError for a model that has no decoder blocks, or whose blocks cannot be run one by one.
    """
    progress = progress or Progress()
    parts = _parts(model)
    _weight_figures(model, parts)
    _activation_figures(model, parts, ids_NS, progress)
    _losses(model, parts, ids_NS, rounding, progress)
    return Diagnosis(name, ids_NS.numel(), rounding, parts)


def _parts(model: nn.Module) -> list[Part]:
    """Each block, and behind it its linears."""
    parts = []
    for index, prefix in enumerate(block_prefixes(model)):
        linears = block_linears(model.get_submodule(prefix))
        if not linears:
            raise LLQError(f"{prefix} has no dense linear; give a model in full precision")
        parts.append(Part(prefix, index, BLOCK))
        parts += [Part(f"{prefix}.{name}", index, name) for name in linears]
    return parts


# --- figures --------------------------------------------------------------------------------------


@torch.no_grad()
def _weight_figures(model: nn.Module, parts: Sequence[Part]) -> None:
    for part in parts:
        if part.kind != BLOCK:
            squares_OI = model.get_parameter(f"{part.name}.weight").float().square()
            mean = float(squares_OI.mean())
            part.figures["weight_kurtosis"] = float(squares_OI.square().mean()) / mean**2
            part.figures["weight_outlier"] = float(squares_OI.max() / mean) ** 0.5


class Moments(Hessian):
    """A Hessian, and the sum of fourth powers of the inputs."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.fourth_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x_TI: Tensor, sequences: int) -> None:
        super().update(x_TI, sequences)
        self.fourth_I += x_TI.double().pow(4).sum(0)
        self.tokens += len(x_TI)

    def figures(self) -> dict[str, float]:
        second_I = torch.diagonal(self.sum_II).double() / self.tokens
        trace, square = float(second_I.sum()), float((self.sum_II / self.tokens).double().norm())
        rms_I = second_I.sqrt()
        mean = float(second_I.mean())
        return {
            "input_kurtosis": float(self.fourth_I.mean()) / self.tokens / mean**2,
            "input_outlier": float(rms_I.max() / rms_I.median().clamp_min(1e-30)),
            "input_rank": trace**2 / square**2 / self.in_features,
        }


def _activation_figures(
    model: nn.Module, parts: Sequence[Part], ids_NS: Tensor, progress: Progress
) -> None:
    """One block after the other, so that the second moments of one block are held at a time."""
    by_name = {part.name: part for part in parts}
    blocks = LiveBlocks(model)
    stream = Stream(blocks, ids_NS, None, progress)
    for index, prefix in enumerate(blocks.prefixes):
        block = blocks.load(index)
        stream.enter(index, block)
        groups = input_groups(block, *stream.inputs(stream.batches()[0]))
        observes = {name: Moments for group in groups for name in group}
        stats = stream.observe(block, groups, observes, None)
        for name, stat in stats.items():
            stat.check(f"{prefix}.{name}")
            assert isinstance(stat, Moments)
            by_name[f"{prefix}.{name}"].figures |= stat.figures()
        stream.advance(block, prefix)
        sizes_NSD = stream.activations.tensor_NSD.float().abs()
        median = sizes_NSD.flatten().median().clamp_min(1e-30)
        by_name[prefix].figures["massive"] = float(sizes_NSD.max() / median)


# --- losses ---------------------------------------------------------------------------------------


@torch.no_grad()
def _losses(
    model: nn.Module,
    parts: Sequence[Part],
    ids_NS: Tensor,
    rounding: Rounding,
    progress: Progress,
) -> None:
    """Fill in `kl`: one forward pass from a part's block on, for each width and sequence."""
    device = next(model.parameters()).device
    sums = {(part.name, bits): 0.0 for part in parts for bits in rounding.bits}
    for number, ids_S in enumerate(ids_NS.to(device), start=1):
        progress.stage(f"rounding each part, sequence {number} of {len(ids_NS)}", len(parts))
        answers = Answers(model, ids_S[None])
        for part in parts:
            for bits in rounding.bits:
                grid = Uniform(bits, rounding.group_size)
                with rounded(model, part, grid), answers.up_to(part.block):
                    sums[part.name, bits] += float(answers.divergence().kl_T.double().sum())
            progress.advance(1)
    for part in parts:
        part.kl = {bits: sums[part.name, bits] / ids_NS.numel() for bits in rounding.bits}


@contextmanager
def rounded(model: nn.Module, part: Part, uniform: Uniform) -> Iterator[None]:
    """Within the context, the weights of a part are rounded to nearest on grids of `uniform`."""
    module = model.get_submodule(part.name)
    names = [f".{name}" for name in block_linears(module)] if part.kind == BLOCK else [""]
    weights = [model.get_parameter(f"{part.name}{name}.weight") for name in names]
    originals = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight_OI = weight.float()
            grid = uniform.spread(uniform.grids(weight_OI), weight_OI.shape[1])
            weight.copy_(grid.values(grid.codes(weight_OI, uniform.bits)))
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)


class Answers:
    """What each block of a model returns for one sequence, and what the model predicts.

    So a change in one block costs a forward pass from this block on.
    """

    def __init__(self, model: nn.Module, ids_1S: Tensor) -> None:
        layers = decoder_of(model)[1].layers
        assert isinstance(layers, nn.ModuleList)
        self.model, self.ids_1S, self.blocks = model, ids_1S, list(layers)
        self._outputs: list[Any] = []
        hooks = [
            block.register_forward_hook(lambda block, args, out: self._outputs.append(out))
            for block in self.blocks
        ]
        try:
            self.logits_SV = self._predictions()
        finally:
            for hook in hooks:
                hook.remove()

    def divergence(self) -> Divergence:
        """Of the model as it is now, from what it was."""
        return Divergence.of(self.logits_SV, self._predictions())

    def _predictions(self) -> Tensor:
        logits_SV: Tensor = self.model(input_ids=self.ids_1S, use_cache=False).logits[0]
        return logits_SV

    def up_to(self, index: int) -> AbstractContextManager[None]:
        """Within the context, the blocks before `index` return what they did, without computing."""
        return forwards_replaced(self.blocks[:index], list(map(_always, self._outputs[:index])))


def _always(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


# --- what tells -----------------------------------------------------------------------------------


def correlations(diagnosis: Diagnosis, bits: int) -> dict[str, float]:
    """Spearman's rank correlation of each figure with the loss at `bits`, over the linears; of
    "massive", over the blocks. NaN where there are fewer than three parts.
    """
    found = {}
    for names, parts in (
        ((*WEIGHT_FIGURES, *INPUT_FIGURES), diagnosis.of_kind(block=False)),
        (BLOCK_FIGURES, diagnosis.of_kind(block=True)),
    ):
        losses = [part.kl[bits] for part in parts]
        for name in names:
            found[name] = spearman([part.figures[name] for part in parts], losses)
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The rank correlation of two lists; equal values share their mean rank."""
    if len(one) < 3:
        return float("nan")
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    """Mean rank of each value, from 1."""
    tensor = torch.tensor(values, dtype=torch.float64)
    below = (tensor < tensor[:, None]).sum(1)
    upto = (tensor <= tensor[:, None]).sum(1)
    return (below + upto + 1).double() / 2


def concentration(losses: Mapping[str, float], share: float = 0.1) -> float:
    """The part of the summed losses that the most sensitive `share` of the parts have."""
    values = sorted(losses.values(), reverse=True)
    most = values[: max(1, round(share * len(values)))]
    return sum(most) / max(sum(values), 1e-30)
