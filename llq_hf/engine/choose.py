"""Chooses a method for a budget of stored bits, by what was measured on a real language model.

`evidence.json` is that measurement: for each way to quantize SmolLM2-135M-Instruct the bits that it
stored, and the KL divergence of its predictions from full precision on three texts. The plan and
the command that made it are named inside. Bits of another model differ a little (a scale costs less
beside a longer row), so they are counted again for the model at hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from ..checkpoints.dense import Checkpoint, Rewritten
from ..common.errors import LLQError
from ..common.progress import Progress
from ..method import Method
from ..methods import build
from ..models.decoder import check_covered, quantizable
from ..models.load import build_skeleton
from .estimates import dense_bytes, packed_bytes
from .prepare import open_dense

EVIDENCE = Path(__file__).with_name("evidence.json")
CONTEXT = 8192  # tokens of the cache that `Budget.memory` leaves room for
ROOM = 1.1  # memory of a loaded model over its bytes: activations, the runtime
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Measured:
    """A way to quantize, and what it gave on the measured model. kl: nats per token, by text.
    seconds: of one processor; None where they are not known.
    """

    method: str
    preset: str
    options: Mapping[str, Any]
    stored_bits: float
    kl: Mapping[str, float]
    seconds: float | None

    @property
    def loss(self) -> float:
        """Geometric mean of the divergences: no text outweighs the others."""
        logs = [math.log(max(value, 1e-9)) for value in self.kl.values()]
        return math.exp(math.fsum(logs) / len(logs))

    @property
    def words(self) -> str:
        """As one writes it: "gptq bits=3 preset=best"."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        preset = [] if self.preset == "study" else [f"preset={self.preset}"]
        return " ".join([self.method, *options, *preset])


@dataclass(frozen=True)
class Candidate:
    """A measured way, for the model at hand: `bits` stored per quantized weight, `bytes` of the
    checkpoint's tensors, `cache_bytes` of 16-bit keys and values of CONTEXT tokens.
    """

    measured: Measured
    method: Method
    bits: float
    bytes: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a quantized model may take, each at most; None: as much as it likes.

    bits: stored bits per quantized weight. size: bytes of the checkpoint's tensors. memory: bytes
    of the loaded model with a cache of CONTEXT tokens (or as many as the model takes) and a tenth
    of its size to work in.
    """

    bits: float | None = None
    size: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.bits is None and self.size is None and self.memory is None:
            raise LLQError(
                "nothing says how to quantize: give a method, or a budget that chooses one: "
                "bits (stored per weight), size or memory"
            )
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise LLQError(f"a budget of {self.bits} bits is none; give a number as 3.2")

    def admits(self, candidate: Candidate) -> bool:
        loaded = ROOM * candidate.bytes + candidate.cache_bytes
        return (
            (self.bits is None or candidate.bits <= self.bits)
            and (self.size is None or candidate.bytes <= self.size)
            and (self.memory is None or loaded <= self.memory)
        )

    def __str__(self) -> str:
        parts = [] if self.bits is None else [f"{self.bits:g} stored bits"]
        for name, value in (("size", self.size), ("memory", self.memory)):
            parts += [] if value is None else [f"{name} {value / 1e9:.3g} GB"]
        return ", ".join(parts)


def bytes_of(text: str) -> int:
    """The bytes of "24GB", "5.5 GiB", "900M" or "123456"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    factor = None if found is None else {**UNITS, **BINARY}.get(found[2])
    if found is None or factor is None:
        raise LLQError(f"{text!r} is no size; write it as 24GB, 5.5GiB or 900MB")
    return int(float(found[1]) * factor)


@cache
def evidence(path: Path = EVIDENCE) -> tuple[Measured, ...]:
    """Everything that was measured."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Measured(**cell) for cell in content["cells"])


@dataclass(frozen=True)
class Choice:
    """Candidates within a budget, the one of the least loss first, and the reasons of methods that
    this model cannot have.
    """

    budget: Budget
    ranked: tuple[Candidate, ...]
    refused: Mapping[str, str]

    @property
    def best(self) -> Candidate:
        return self.ranked[0]

    @classmethod
    def of(
        cls,
        model: str,
        budget: Budget,
        preset: str,
        revision: str | None = None,
        measured: tuple[Measured, ...] | None = None,
    ) -> Self:
        """Among all that was measured with this preset. LLQError where nothing fits, with what
        would.
        """
        checkpoint = open_dense(model, revision, Progress())
        skeleton: Any = build_skeleton(checkpoint.path)
        check_covered(skeleton)
        found: list[Candidate] = []
        refused: dict[str, str] = {}
        for each in evidence() if measured is None else measured:
            if each.preset != preset:
                continue
            try:
                found.append(_candidate(each, checkpoint, skeleton))
            except LLQError as error:
                refused[each.words] = str(error)
        if not found:
            raise LLQError(
                f"of preset={preset} nothing that was measured fits {model}; give a method"
                + "".join(f"; {words}: {reason}" for words, reason in list(refused.items())[:1])
            )
        fits = [candidate for candidate in found if budget.admits(candidate)]
        if not fits:
            least = min(found, key=lambda each: each.bytes)
            raise LLQError(
                f"nothing that was measured with preset={preset} fits in {budget}; the smallest is "
                f"{least.measured.words}, with {least.bits:.3f} stored bits and "
                f"{least.bytes / 1e9:.3g} GB"
            )
        ranked = sorted(fits, key=lambda each: (each.measured.loss, each.bits))
        return cls(budget, tuple(ranked), refused)


def _candidate(measured: Measured, checkpoint: Checkpoint, skeleton: Any) -> Candidate:
    """LLQError where the model cannot be quantized in this way."""
    method = build(measured.method, measured.preset, **measured.options)
    bound = method.bound_to(skeleton)
    source = Rewritten.of(checkpoint, bound.rewrite(skeleton, {}))
    packed = packed_bytes(skeleton, bound)
    weights = sum(linear.weight.numel() for linear in quantizable(skeleton).values())
    size = dense_bytes(source, skeleton) + packed
    return Candidate(measured, method, 8 * packed / weights, size, _cache_bytes(skeleton.config))


def _cache_bytes(config: Any) -> int:
    """Of 16-bit keys and values for CONTEXT tokens, or as many as the model takes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = min(CONTEXT, getattr(text, "max_position_embeddings", CONTEXT))
    return 2 * 2 * int(text.num_hidden_layers * heads * width * tokens)
