"""The cost of each choice for the whole model: measured, or predicted to second order.

Legend: P positions of text in a sequence, V vocabulary, O out_features, I in_features.

Definition
    The cost of a choice is the KL divergence of the model's predictions from full precision, in
    nats per token, with that choice alone made. The costs of different linears are added up. In
    image-text pairs, the predictions at the visual tokens do not count.

Measured
    `Measured` runs the model with the weights of the choice.

Predicted
    `Predicted` needs one backward pass. Rounding W to W + dW costs

        D = 1/2 sum_r Gamma_r (dW_r Hbar dW_r^T)        Gamma_r = E (dL/dy_r)^2, Hbar = E x x^T

    with y the outputs and x the inputs of the linear. L is the loss of a sequence under labels that
    the model itself draws (the true Fisher). Output and input are taken as independent, as in
    K-FAC. The second order holds for small errors only. On the demo model, whose channels are
    unequal, RTN's errors at 2 and 3 bits are far too large for it, and allocations by `Predicted`
    are worse than uniform widths (methods/README.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...common.progress import PassListener
from ...models.decoder import watch_inputs
from ...models.sequences import Batch, Sequences
from ...numerics.stats import Hessian, Stat
from ..training import settled_attention

# --- costs ----------------------------------------------------------------------------------------


class Cost(Protocol):
    """The cost of choices for linears that share an input."""

    needs: frozenset[type[Stat]]  # kinds of statistics of that input that must be among `stats`

    def __call__(self, restored: Mapping[str, Tensor], stats: Sequence[Stat]) -> float:
        """Nats per token with the weights `restored` (name -> [O, I]) in place of the linears'."""


class Measured:
    """KL(full precision || model), measured by running the model.

    It uses as many sequences as `BYTES` hold predictions of the full-precision model.
    """

    BYTES = 4 * 2**30
    needs: frozenset[type[Stat]] = frozenset()

    @torch.no_grad()
    def __init__(self, model: Any, data: Sequences, listener: PassListener) -> None:
        self.model = model
        self.data = data
        self.full: list[Tensor] = []  # log-probabilities [P, V] of each sequence
        held = 0
        listener.stage("predictions of full precision", len(data))
        for batch in data.batches(range(len(data))):
            full_PV = self._predictions(batch).cpu()
            held += full_PV.nbytes
            if self.full and held > self.BYTES:
                break
            self.full.append(full_PV)
            listener.advance(1)

    def _predictions(self, batch: Batch) -> Tensor:
        return batch.on_text(self.model)[0].log_softmax(-1)

    @torch.no_grad()
    def __call__(self, restored: Mapping[str, Tensor], stats: Sequence[Stat]) -> float:
        weights = {name: self.model.get_submodule(name).weight for name in restored}
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(restored[name])
            batches = self.data.batches(range(len(self.full)))
            nats = [self._divergence(*each) for each in zip(batches, self.full, strict=True)]
        finally:
            for name, weight in weights.items():
                weight.copy_(originals[name])
        return sum(nats) / sum(map(len, self.full))

    def _divergence(self, batch: Batch, full_PV: Tensor) -> float:
        """Nats of one sequence."""
        own_PV = self._predictions(batch)
        full_PV = full_PV.to(own_PV.device)
        return float(nn.functional.kl_div(own_PV, full_PV, log_target=True, reduction="sum"))


class Predicted:
    """The prediction D (see the head), from one backward pass for any number of choices."""

    needs: frozenset[type[Stat]] = frozenset({Hessian})

    def __init__(
        self,
        model: Any,
        linears: dict[str, nn.Linear],
        data: Sequences,
        seed: int,
        listener: PassListener,
    ) -> None:
        self.weights = {name: linear.weight.detach() for name, linear in linears.items()}
        self.tokens = sum(data.lengths)
        self.gamma = output_gradients(model, linears, data, seed, listener)

    @torch.no_grad()
    def __call__(self, restored: Mapping[str, Tensor], stats: Sequence[Stat]) -> float:
        Hbar_II = next(stat.sum_II for stat in stats if isinstance(stat, Hessian)) / self.tokens
        errors = {
            name: weight_OI - self.weights[name].float() for name, weight_OI in restored.items()
        }
        return sum(
            loss_of_rounding(self.gamma[name], Hbar_II, error_OI)
            for name, error_OI in errors.items()
        )


def loss_of_rounding(gamma_O: Tensor, Hbar_II: Tensor, error_OI: Tensor) -> float:
    """The prediction D for one linear, in nats per token."""
    return float(0.5 * ((error_OI @ Hbar_II).mul_(error_OI).sum(1) * gamma_O).sum())


def output_gradients(
    model: Any, linears: dict[str, nn.Linear], data: Sequences, seed: int, listener: PassListener
) -> dict[str, Tensor]:
    """Gamma [O] of each linear, from one forward and backward pass over the sequences.

    It is a mean over the positions whose predictions count.
    """
    gamma = {
        name: torch.zeros(linear.out_features, device=linear.weight.device)
        for name, linear in linears.items()
    }

    def add(name: str, module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        gamma[name] += outputs[0].float().flatten(0, -2).square().sum(0)

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_(True)

    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    listener.stage("gradients of the model's predictions", len(data))
    predictions = 0
    with ExitStack() as hooks, torch.enable_grad(), settled_attention(device):
        for name, linear in linears.items():
            hooks.enter_context(linear.register_full_backward_hook(partial(add, name)))
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(require_grad))
        for batch in data.batches(range(len(data))):
            logits_PV = batch.on_text(model)[0]
            drawn_P1 = torch.multinomial(logits_PV.detach().softmax(-1).cpu(), 1, generator=random)
            loss = nn.functional.cross_entropy(
                logits_PV, drawn_P1[:, 0].to(device), reduction="sum"
            )
            predictions += len(logits_PV)
            loss.backward()  # type: ignore[no-untyped-call]
            listener.advance(1)
    return {name: sum_O / predictions for name, sum_O in gamma.items()}


@torch.no_grad()
def observe(
    model: Any, wanted: Mapping[str, Sequence[type[Stat]]], data: Sequences, listener: PassListener
) -> dict[str, list[Stat]]:
    """Statistics of the inputs of linears in the full-precision model, by name.

    wanted: the kinds of statistics for each linear. If there are none, the model is not run.
    """
    if not any(wanted.values()):
        return {name: [] for name in wanted}
    gathered: dict[str, list[Stat]] = {}
    linears = {name: model.get_submodule(name) for name in wanted}
    for name, kinds in wanted.items():
        linear = linears[name]
        gathered[name] = [kind(linear.in_features, linear.weight.device) for kind in kinds]

    def update(name: str, x: Tensor) -> None:
        for stat in gathered[name]:
            stat.update(x.flatten(0, -2), len(x))

    listener.stage("statistics", len(data))
    with watch_inputs(linears, update):
        for batch in data.batches(range(len(data))):
            model(**batch.inputs, use_cache=False)
            listener.advance(1)
    return gathered
