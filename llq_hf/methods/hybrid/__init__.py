"""Hybrid allocation: different methods and bit widths for different linears, within an average of
stored bits.

Idea
    Rounding some linears costs a model's predictions far more than rounding others, and there the
    same bits buy more.
    1. The linears of a block that share an input are a unit (q, k, v; o; gate, up; down). Each unit
       takes one of the `candidates`.
    2. The cost of each candidate is measured with the codes that its solver gives: the KL
       divergence of the model's predictions from full precision with this unit alone quantized.
       `measured=False` takes its second-order prediction instead (see costs.py).
    3. An exact knapsack takes the best combination within `bits`, which counts everything that is
       stored (see knapsack.py).
    This is no published method. exllamav3 also measures by swapping linears, the prediction is that
    of K-FAC, and the budget is AutoRound's idea.

Candidates and rules
    `rules` say by hand which method serves which linears, and may do so for all:

    candidates  gptq:2+gptq:3+gptq:4
                METHOD:BITS, with further options as :option=value (preset=best is one)
    rules       *.down_proj=gptq:4:group_size=64+*.0.*=rtn:8
                PATTERN=METHOD:BITS...; the first pattern that fits a name serves it

    The result is kept in `allocation`, as rules for single linears, and goes into config.json.
    Candidates must treat each linear alone. Rules may also name methods that treat the linears of a
    block together; each gets its own ones. Methods that change, train or watch the whole model are
    refused.

Storage: each linear as its own method says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...common.errors import LLQError
from ...common.prefix import below
from ...common.progress import PassListener
from ...common.spec import Spec
from ...method import (
    Flow,
    Job,
    Method,
    Packed,
    State,
    Step,
    field_defaults,
    field_types,
    stored_bits,
)
from ...models.decoder import input_groups, quantizable
from ...models.sequences import Sequences
from ...numerics.stats import Stat
from .costs import Cost, Measured, Predicted, observe
from .knapsack import Option, knapsack

SEPARATOR = re.compile(r"[+,]")
HESSIAN_BYTES = 4 * 2**30  # of the linears that are scored in one pass over the model


@dataclass(frozen=True, kw_only=True)
class Hybrid(Method):
    """bits: the average of stored bits to aim at; candidates, rules: see above; allocation: the
    rules that were found; samples: calibration sequences on which costs are measured.

    measured: run the model for each unit and candidate. False: predict all costs from one backward
    pass, which is cheaper, but right for small errors only.
    """

    name: ClassVar[str] = "hybrid"
    title: ClassVar[str] = "hybrid allocation"
    bits_range: ClassVar[tuple[int, ...]] = (1, 3, 4, 9)
    any_bits: ClassVar[bool] = True
    best: ClassVar[dict[str, Any]] = {
        "candidates": "+".join(f"gptq:{bits}:preset=best" for bits in (2, 3, 4, 8))
    }

    bits: float = 3.0
    candidates: str = "gptq:2+gptq:3+gptq:4+gptq:8"
    rules: str = ""
    allocation: str = ""
    samples: int = 32
    measured: bool = True
    seed: int = 0

    def check(self) -> None:
        if self.samples < 1:
            raise LLQError(f"samples={self.samples} must be at least 1")
        for spec in filter(None, SEPARATOR.split(self.candidates)):
            if type(parse_method(spec)).quantize_block is not Method.quantize_block:
                raise LLQError(
                    f"the candidate {spec!r} does not quantize each linear alone; name it in rules"
                )
        for _, spec in self._rules:
            parse_method(spec)

    # --- which method serves which linear ---------------------------------------------------------

    @property
    def _rules(self) -> list[tuple[str, str]]:
        """(pattern, spec) of all rules, those that were found first."""
        return [*parse_rules(self.allocation), *parse_rules(self.rules)]

    def spec(self, name: str) -> str | None:
        """The spec "METHOD:BITS..." that serves the linear; None if it is not known yet."""
        return next((spec for pattern, spec in self._rules if fnmatchcase(name, pattern)), None)

    @property
    def _candidates(self) -> list[str]:
        return [spec for spec in SEPARATOR.split(self.candidates) if spec]

    def for_linear(self, name: str) -> Method:
        """The method that serves the linear.

        Until bits are allocated, a linear without a rule gets the widest candidate that is not over
        `bits`, so that sizes can be estimated.
        """
        spec = self.spec(name)
        if spec is None:
            if not self._candidates:
                raise LLQError(f"hybrid: no rule serves {name}, and there are no candidates")
            ordered = sorted(self._candidates, key=lambda each: parse_method(each).bits)
            fitting = [each for each in ordered if parse_method(each).bits <= self.bits]
            spec = fitting[-1] if fitting else ordered[0]
        return parse_method(spec).for_linear(name)

    @property
    def _parts(self) -> list[Method]:
        """All methods that may serve a linear."""
        specs = {spec for _, spec in self._rules} | set(() if self.allocation else self._candidates)
        return [parse_method(spec) for spec in sorted(specs)]

    @property
    def calibrated(self) -> bool:
        return any(part.calibrated for part in self._parts)

    @property
    def sequential(self) -> bool:
        return any(part.sequential for part in self._parts)

    @property
    def flow(self) -> Flow:
        flows = {part.flow for part in self._parts}
        return next((flow for flow in (Flow.BOTH, Flow.QUANTIZED) if flow in flows), Flow.DENSE)

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return self.for_linear("").layout(out_features, in_features)

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        self.for_linear("").check_packed(packed, out_features, in_features)

    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        return self.for_linear("").dequantize(packed, out_features, in_features)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        return self.for_linear("").linear(x, packed, bias, out_features)

    # --- quantizing -------------------------------------------------------------------------------

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        """Each method quantizes its own linears of the block, as if there were no others."""
        shares: dict[str, list[str]] = {}
        for name in step.linears:
            shares.setdefault(self.spec(f"{step.prefix}.{name}") or "", []).append(name)
        packed: dict[str, Packed] = {}
        for spec, names in shares.items():
            groups = [[name for name in group if name in names] for group in step.groups]
            part = replace(
                step,
                linears={name: step.linears[name] for name in names},
                stats={name: stat for name, stat in step.stats.items() if name in names},
                groups=[group for group in groups if group],
                state=ScopedState(step.state, spec),
            )
            method = parse_method(spec) if spec else self.for_linear(f"{step.prefix}.{names[0]}")
            packed |= method.quantize_block(part)
            for name in names:
                step.jobs[name].notes["served_by"] = f"{method.name}:{method.bits:g}"
        return {name: packed[name] for name in step.linears}

    # --- allocation -------------------------------------------------------------------------------

    def bound_to(self, model: nn.Module) -> Self:
        """The method with presets written out.

        If rules serve all linears, candidates are dropped and `bits` becomes their average.
        LLQError if a rule fits no linear, or if a linear has neither a rule nor candidates.
        """
        linears = quantizable(model)
        for pattern, _ in self._rules:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise LLQError(
                    f"hybrid: the rule {pattern!r} fits no linear; "
                    f"they are called {next(iter(linears))!r}"
                )
        rules = "+".join(
            f"{pattern}={spell_method(parse_method(spec))}"
            for pattern, spec in parse_rules(self.rules)
        )
        candidates = "+".join(spell_method(parse_method(spec)) for spec in self._candidates)
        if all(self.spec(name) is not None for name in linears):
            bits = {
                name: bits_of(self.for_linear(name), linear) for name, linear in linears.items()
            }
            weights = sum(linear.weight.numel() for linear in linears.values())
            return replace(self, rules=rules, candidates="", bits=sum(bits.values()) / weights)
        if not candidates:
            # Raises the error that names the linear.
            self.for_linear(next(name for name in linears if self.spec(name) is None))
        return replace(self, rules=rules, candidates=candidates)

    @property
    def learns(self) -> bool:
        return bool(self._candidates) and not self.allocation

    def learn(
        self, model: nn.Module, data: Sequences, attend: Any, listener: PassListener
    ) -> dict[str, Tensor]:
        """The index of the candidate for each linear that no rule names, by name."""
        # 1. Units: linears that share an input.
        linears = quantizable(model)
        data = data.head(self.samples)
        groups = input_groups(model, few_words(data), {})
        units = [
            [name for name in group if name in linears and self.spec(name) is None]
            for group in groups
        ]
        units = [unit for unit in units if unit]
        # 2. The cost of each candidate for each unit.
        cost: Cost
        if self.measured:
            cost = Measured(model, data, listener)
        else:
            cost = Predicted(model, linears, data, self.seed, listener)
        options: list[list[Option]] = []
        for part in split_by_memory(units, linears):
            options += self._options(model, part, cost, data, listener)
        # 3. The best combination within the bits that rules leave.
        pinned = sum(
            bits_of(self.for_linear(name), linear)
            for name, linear in linears.items()
            if self.spec(name) is not None
        )
        budget = int(self.bits * sum(linear.weight.numel() for linear in linears.values())) - pinned
        try:
            chosen = knapsack(options, budget)
        except LLQError as error:
            raise LLQError(
                f"hybrid: bits={self.bits:g} is too few for these rules and candidates: {error}"
            ) from None
        return {
            name: torch.tensor(pick)
            for unit, pick in zip(units, chosen, strict=True)
            for name in unit
        }

    def _options(
        self,
        model: nn.Module,
        units: list[list[str]],
        cost: Cost,
        data: Sequences,
        listener: PassListener,
    ) -> list[list[Option]]:
        """The options of each unit: one for each candidate, solved on statistics of the
        full-precision model.
        """
        methods = [parse_method(spec) for spec in self._candidates]
        kinds = {method.observes for method in methods if method.observes is not None}
        kinds |= {need for need in cost.needs if not any(issubclass(kind, need) for kind in kinds)}
        firsts = {unit[0]: sorted(kinds, key=lambda kind: kind.__name__) for unit in units}
        stats = observe(model, firsts, data, listener)
        listener.stage("costs of the candidates", len(units) * len(methods))
        options: list[list[Option]] = []
        for unit in units:
            linears = {name: model.get_submodule(name) for name in unit}
            options.append([])
            for method in methods:
                options[-1].append(measure_option(method, linears, cost, stats[unit[0]]))
                listener.advance(1)
            stats[unit[0]].clear()
        return options

    def with_learned(self, learned: Mapping[str, Tensor]) -> Self:
        if not learned:
            return self
        rules = [f"{name}={self._candidates[int(pick)]}" for name, pick in sorted(learned.items())]
        return replace(self, allocation="+".join(rules))


@torch.no_grad()
def measure_option(
    method: Method, linears: Mapping[str, nn.Module], cost: Cost, stats: list[Stat]
) -> Option:
    """Bits and cost of the linears of a unit if this method quantizes them.

    stats: of the input that they share.
    """
    stat = next((stat for stat in stats if type(stat) is method.observes), None)
    bits = 0
    restored = {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        own = method.for_linear(name)
        weight_OI = linear.weight.detach().float()
        packed = own.quantize(weight_OI, stat, Job(name))
        restored[name] = own.dequantize(packed, *weight_OI.shape)
        bits += bits_of(own, linear)
    return Option(bits, cost(restored, stats))


def few_words(data: Sequences) -> Tensor:
    """The first tokens [1, 8] of text in the data: enough to see which linears share an input."""
    batch = next(data.batches([0]))
    words_1S = batch.ids_BS if batch.text_P is None else batch.ids_BS[:, batch.text_P]
    return words_1S[:, :8]


def bits_of(method: Method, linear: nn.Linear) -> int:
    """Bits that a linear takes in the file."""
    shape = linear.out_features, linear.in_features
    return round(stored_bits(method.layout(*shape), *shape) * linear.weight.numel())


def split_by_memory(units: list[list[str]], linears: dict[str, nn.Linear]) -> list[list[list[str]]]:
    """The units in parts whose Hessians fit into memory together."""
    parts: list[list[list[str]]] = []
    room = 0
    for unit in units:
        need = 4 * linears[unit[0]].in_features ** 2
        if need > room:
            parts.append([])
            room = HESSIAN_BYTES
        parts[-1].append(unit)
        room -= need
    return parts


class ScopedState(State):
    """The training state of one of several methods that train in the same block.

    whole: the state of the block; label: prefix of this method's tensors in it.
    """

    def __init__(self, whole: State, label: str) -> None:
        self.whole = whole
        self.prefix = f"{label}/"

    def load(self) -> dict[str, Tensor] | None:
        return below(self.prefix, self.whole.load() or {}) or None

    def save(self, tensors: dict[str, Tensor]) -> None:
        saved = self.whole.load() or {}
        others = {key: tensor for key, tensor in saved.items() if not key.startswith(self.prefix)}
        self.whole.save(others | {self.prefix + key: t for key, t in tensors.items()})


# --- how methods are written in an option ---------------------------------------------------------


def parse_rules(rules: str) -> list[tuple[str, str]]:
    """(pattern, spec) of each rule in "PATTERN=SPEC+PATTERN=SPEC"."""
    pairs = []
    for rule in filter(None, SEPARATOR.split(rules)):
        pattern, equals, spec = rule.partition("=")
        if not equals or ":" in pattern:
            raise LLQError(f"the rule {rule!r} is not of the form PATTERN=METHOD:BITS")
        pairs.append((pattern, spec))
    return pairs


@cache
def parse_method(spec: str) -> Method:
    """The method of a spec like "gptq:2:group_size=64:preset=best".

    LLQError if there is none, or if it works on the model as a whole.
    """
    from .. import build, method_type  # the list of methods, which lists this one

    name, _, rest = spec.partition(":")
    bits, *settings = rest.split(":")
    known = field_types(method_type(name))
    options: dict[str, Any] = {"bits": parse_value(spec, bits, known["bits"])}
    for setting in settings:
        key, _, value = setting.partition("=")
        options[key] = parse_value(spec, value, known.get(key, str))
    method = build(name, **options)
    if (
        method.learns
        or method.tunes
        or method.attention is not None
        or isinstance(method, Hybrid)
        or method.rewrites
    ):
        raise LLQError(f"{spec!r} works on the model as a whole, not on some of its linears")
    return method


def parse_value(spec: str, text: str, kind: type) -> Any:
    """An option's value, of type `kind`, from its text. spec: for the error."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise LLQError(
            f"{spec!r}: {text!r} is no {kind.__name__}; write METHOD:BITS:option=value"
        ) from None


def spell_method(method: Method) -> str:
    """The method as `parse_method` reads it, with every option that is not at its default."""
    defaults = field_defaults(type(method))
    settings = [
        f"{key}={spell_value(value)}"
        for key, value in method.to_dict().items()
        if key != "bits" and value != defaults[key]
    ]
    return ":".join([method.name, f"{method.bits:g}", *settings])


def spell_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
