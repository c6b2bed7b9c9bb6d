"""The cost of each choice for the whole model: measured, or predicted to second order.

Legend: N sequences, S tokens each, V vocabulary, O out_features, I in_features.

Definition
    The cost of a choice is the KL divergence of the model's predictions from full precision, in
    nats per token, with that choice alone made. The costs of different linears are added up.

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
    def __init__(self, model: Any, ids_NS: Tensor, listener: PassListener) -> None:
        self.model = model
        listener.stage("predictions of full precision", len(ids_NS))
        # Of each: ids [1, S] and log-probabilities [S, V].
        self.sequences: list[tuple[Tensor, Tensor]] = []
        for row_S in ids_NS:
            self.sequences.append((row_S[None], self._predictions(row_S[None]).cpu()))
            listener.advance(1)
            if (len(self.sequences) + 1) * self.sequences[0][1].nbytes > self.BYTES:
                break

    def _predictions(self, ids_1S: Tensor) -> Tensor:
        logits_SV: Tensor = self.model(input_ids=ids_1S, use_cache=False).logits[0]
        return logits_SV.float().log_softmax(-1)

    @torch.no_grad()
    def __call__(self, restored: Mapping[str, Tensor], stats: Sequence[Stat]) -> float:
        weights = {name: self.model.get_submodule(name).weight for name in restored}
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(restored[name])
            nats = [self._divergence(ids_1S, full_SV) for ids_1S, full_SV in self.sequences]
        finally:
            for name, weight in weights.items():
                weight.copy_(originals[name])
        return sum(nats) / len(nats)

    def _divergence(self, ids_1S: Tensor, full_SV: Tensor) -> float:
        own_SV = self._predictions(ids_1S)
        full_SV = full_SV.to(own_SV.device)
        kl = nn.functional.kl_div(own_SV, full_SV, log_target=True, reduction="batchmean")
        return float(kl)


class Predicted:
    """The prediction D (see the head), from one backward pass for any number of choices."""

    needs: frozenset[type[Stat]] = frozenset({Hessian})

    def __init__(
        self,
        model: Any,
        linears: dict[str, nn.Linear],
        ids_NS: Tensor,
        seed: int,
        listener: PassListener,
    ) -> None:
        self.weights = {name: linear.weight.detach() for name, linear in linears.items()}
        self.tokens = ids_NS.numel()
        self.gamma = output_gradients(model, linears, ids_NS, seed, listener)

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
    model: Any, linears: dict[str, nn.Linear], ids_NS: Tensor, seed: int, listener: PassListener
) -> dict[str, Tensor]:
    """Gamma [O] of each linear, from one forward and backward pass over the sequences."""
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
    listener.stage("gradients of the model's predictions", len(ids_NS))
    with ExitStack() as hooks, torch.enable_grad(), settled_attention(ids_NS.device):
        for name, linear in linears.items():
            hooks.enter_context(linear.register_full_backward_hook(partial(add, name)))
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(require_grad))
        for row_S in ids_NS:
            logits_SV = model(input_ids=row_S[None], use_cache=False).logits[0].float()
            drawn_S1 = torch.multinomial(logits_SV.detach().softmax(-1).cpu(), 1, generator=random)
            loss = nn.functional.cross_entropy(
                logits_SV, drawn_S1[:, 0].to(logits_SV.device), reduction="sum"
            )
            loss.backward()  # type: ignore[no-untyped-call]
            listener.advance(1)
    return {name: sum_O / ids_NS.numel() for name, sum_O in gamma.items()}


@torch.no_grad()
def observe(
    model: Any, wanted: Mapping[str, Sequence[type[Stat]]], ids_NS: Tensor, listener: PassListener
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

    listener.stage("statistics", len(ids_NS))
    with watch_inputs(linears, update):
        for row_S in ids_NS:
            model(input_ids=row_S[None], use_cache=False)
            listener.advance(1)
    return gathered
