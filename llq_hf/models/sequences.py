"""Calibration data as the whole model takes them, and which of its predictions count.

Of a text, all tokens count. In an image-text pair the visual tokens are context: nobody predicts
them, and no loss is measured where they stand.

Legend: N sequences, B of them in a batch, S tokens each, P positions, V vocabulary, T predictions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, or one image-text pair.

    inputs: the model's arguments, `input_ids` [B, S] among them. text_P: positions of text.
    asked_P: positions whose next token is to be learned. None for both: all positions.
    """

    inputs: Mapping[str, Tensor]
    text_P: Tensor | None = None
    asked_P: Tensor | None = None

    @property
    def ids_BS(self) -> Tensor:
        return self.inputs["input_ids"]

    def on_text(self, model: nn.Module) -> Tensor:
        """fp32 logits [B, P, V] at all positions of text."""
        return self._logits(model, model, self.text_P)

    def to_learn(self, model: nn.Module, run: Callable[..., Any] | None = None) -> Tensor:
        """fp32 logits [B, P, V] at the positions whose next token is to be learned.

        run: what is called in place of `model`, with its arguments.
        """
        return self._logits(model, run or model, self.asked_P)

    def _logits(self, model: nn.Module, run: Callable[..., Any], places_P: Tensor | None) -> Tensor:
        """fp32 logits [B, P, V]. Where the model can leave out the others, they are not computed:
        those of an image would be the largest tensor.
        """
        kept: dict[str, Tensor] = {}
        if places_P is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
            kept = {"logits_to_keep": places_P}
        logits: Tensor = run(**self.inputs, use_cache=False, **kept).logits
        if places_P is not None and not kept:
            logits = logits[:, places_P]
        return logits.float()

    def labelled(self, predictions_BPV: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [T, V] of `to_learn`, and the tokens [T] that really follow."""
        if self.asked_P is None:
            return predictions_BPV[:, :-1].flatten(0, 1), self.ids_BS[:, 1:].flatten()
        return predictions_BPV.flatten(0, 1), self.ids_BS[:, self.asked_P + 1].flatten()


class Sequences(Protocol):
    """The calibration data of a method that works on the whole model, on its device."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sequence."""

    def __len__(self) -> int:
        """Number of sequences."""

    def head(self, count: int) -> Sequences:
        """The first `count` sequences, or all if there are fewer."""

    def batches(self, rows: Sequence[int], tokens: int = 0) -> Iterator[Batch]:
        """The sequences of these numbers, in this order, in batches of at most `tokens` tokens; at
        least one sequence each, and image-text pairs one by one.
        """


@dataclass(frozen=True)
class TextSequences:
    """Windows of token ids."""

    ids_NS: Tensor

    @property
    def lengths(self) -> Sequence[int]:
        return [self.ids_NS.shape[1]] * len(self.ids_NS)

    def __len__(self) -> int:
        return len(self.ids_NS)

    def head(self, count: int) -> TextSequences:
        return TextSequences(self.ids_NS[:count])

    def batches(self, rows: Sequence[int], tokens: int = 0) -> Iterator[Batch]:
        for part_BS in torch.split(self._chosen(rows), max(1, tokens // self.ids_NS.shape[1])):
            yield Batch({"input_ids": part_BS})

    def _chosen(self, rows: Sequence[int]) -> Tensor:
        if isinstance(rows, range):  # no list of numbers has to go to a GPU
            return self.ids_NS[rows.start : rows.stop : rows.step]
        return self.ids_NS[torch.tensor(rows, device=self.ids_NS.device)]
