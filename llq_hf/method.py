"""The contract: a quantization method is one frozen dataclass.

Legend: O out_features, I in_features, T tokens.

Its fields are the config (JSON both ways), `layout` says what is stored before any tensor exists,
`quantize` is the algorithm, `dequantize` is the meaning of what is stored. Everything else
(calibration, module swap, checkpoints, loading, evaluation) is written once, elsewhere, and never
names a method.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Protocol, Self, get_type_hints

from torch import Tensor, nn

from .common.errors import LLQError
from .common.progress import PassListener
from .common.spec import Spec
from .common.words import nearest
from .numerics.activations import Attention
from .numerics.grids import Affine
from .numerics.stats import Stat

Packed = dict[str, Tensor]


class Flow(Enum):
    """Which activations flow from block to block while a model is calibrated."""

    QUANTIZED = "quantized"  # each block sees what its quantized predecessors produce (GPTQ's way)
    DENSE = "dense"  # each block sees what the full-precision model produces (AWQ's way)
    # side by side: quantized inputs, and what the full-precision model makes of its own as targets
    BOTH = "both"


class BlockData(Protocol):
    """The calibration set as it enters one decoder block. `rows` selects sequences; of image-text
    pairs, one.
    """

    @property
    def count(self) -> int:
        """Sequences."""

    @property
    def length(self) -> int:
        """Tokens per sequence; of sequences of different lengths, their mean."""

    def batches(self) -> list[slice]:
        """All sequences, a forward pass's worth at a time."""

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        """hidden [B, S, D] and the keyword arguments of the block: block(hidden, **kwargs)."""

    def targets(self, rows: slice) -> Tensor:
        """[B, S, D] that the full-precision block makes of the full-precision model's activations
        (Flow.BOTH).
        """


class State:
    """Where a long training inside a block keeps its progress, to be resumed; this one forgets."""

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last for this block, or None."""
        return None

    def save(self, tensors: dict[str, Tensor]) -> None: ...


class Rewrite(Protocol):
    """How a method changes the dense model before its blocks are quantized, tensor by tensor."""

    @property
    def untied(self) -> Mapping[str, str]:
        """Tensors that appear, each as a copy of another: heads that can no longer share the
        embedding's matrix.
        """

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the report says about it."""

    def __call__(self, name: str, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """What the tensor of this name becomes, of the same shape and dtype; `read` gives vectors
        of the base.
        """


@dataclass
class Job:
    """One linear to quantize: its full name, and what the method noted on the way."""

    name: str
    notes: dict[str, Any] = field(default_factory=dict)

    def seeds(self, seed: int, count: int) -> list[int]:
        """`count` seeds below 2**31 of this linear's own, from the run's `seed` and the linear's
        name only.
        """
        return [zlib.crc32(f"{seed}:{self.name}:{i}".encode()) & 0x7FFFFFFF for i in range(count)]


@dataclass
class Step:
    """What a walk hands over: the linears of one block (or of one input group of it), with their
    statistics.
    """

    prefix: str  # module name of the decoder block, "model.layers.3"
    block: nn.Module
    linears: dict[str, nn.Linear]  # by name inside the block, in the order of execution
    stats: dict[str, Stat]
    groups: list[list[str]] = field(
        default_factory=list
    )  # linears that read the same input, in order of execution
    data: BlockData | None = None  # None where the method asks for no calibration
    on_linear: Callable[[str], None] = lambda name: None  # progress
    listener: PassListener = field(
        default_factory=PassListener
    )  # progress inside a linear or a training
    state: State = field(default_factory=State)
    attend: Callable[[nn.Module], Any] = lambda block: (
        None
    )  # gives a copy of the block the method's `attention`
    jobs: dict[str, Job] = field(default_factory=dict)

    def job(self, name: str) -> Job:
        """Begin the job of linear `name` (its name inside the block)."""
        full_name = f"{self.prefix}.{name}"
        self.on_linear(full_name)
        self.jobs[name] = Job(full_name)
        return self.jobs[name]

    def run(self, stage: str) -> None:
        """Run the block once over all calibration sequences, for hooks that watch it."""
        assert self.data is not None
        self.listener.stage(stage, self.data.count)
        for rows in self.data.batches():
            hidden_BSD, kwargs = self.data.inputs(rows)
            self.block(hidden_BSD, **kwargs)
            self.listener.advance(len(hidden_BSD))

    def release(self) -> None:
        """Let go of statistics and weights: the next ones are gathered while the consumer still
        holds this step.
        """
        self.stats.clear()
        self.linears.clear()
        self.data = None
        self.block = nn.Identity()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. Subclasses add fields (with defaults equal to the study's settings) and
    validate them.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # for people: "GPTQ (Frantar et al. 2023)"
    bits_range: ClassVar[Sequence[float]] = range(
        1, 9
    )  # its widths: tables and tests go through them
    any_bits: ClassVar[bool] = (
        False  # whether it also has every figure between the first and the last of them
    )
    observes: ClassVar[type[Stat] | None] = None  # None: needs no calibration data
    training_copies: ClassVar[int] = (
        0  # fp32 copies of a block's weights that `quantize_block` keeps while it trains
    )
    best: ClassVar[
        Mapping[str, Any]
    ] = {}  # fields of preset="best", as a mapping over the study's defaults

    bits: float  # nominal; declared by every method with its own type and default

    def __post_init__(self) -> None:
        try:
            first, last = self.bits_range[0], self.bits_range[-1]
            if self.bits not in self.bits_range and not (
                self.any_bits and first <= self.bits <= last
            ):
                widths = (
                    f"its range {first}..{last}"
                    if len(self.bits_range) > 1
                    else f"its only width {first}"
                )
                raise LLQError(f"bits={self.bits} is outside {widths}")
            self.check()
        except LLQError as error:
            raise LLQError(f"{self.name}: {error}") from None

    def check(self) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raise LLQError, with the offending value in the text, where an option makes no sense."""

    # --- the four things a method says ------------------------------------------------------------

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        """Stored tensors by name. "weight" must be int32 codes of a shape other than [O, I].
        LLQError if impossible.
        """

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        """fp32 weight -> the tensors of `layout`. Codes are decided here, once. Must not change
        `weight_OI` or `stat`.

        Methods that treat the linears of a block together override `quantize_block` instead.
        """
        raise NotImplementedError(f"{self.name} quantizes whole blocks")

    @abstractmethod
    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        """fp32 weight_OI that the stored tensors mean."""

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        """y [..., O] of x [..., I]. Override where the input is transformed instead of the weight."""
        weight_OI = self.dequantize(packed, out_features, x.shape[-1])
        return nn.functional.linear(x, weight_OI.to(x.dtype), bias)

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        """The linear as codes on uniform grids, for formats of others; LLQError where it is nothing
        so simple.
        """
        raise LLQError(
            f"{self.name} stores no uniform grid of codes per group, which is all that such formats hold"
        )

    # --- with sensible defaults -------------------------------------------------------------------

    @property
    def sequential(self) -> bool:
        """Whether the linears of a block are observed and quantized input group by input group."""
        return False

    @property
    def flow(self) -> Flow:
        return Flow.QUANTIZED

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is run through the model: to observe, or for `quantize_block` to
        train on.
        """
        return self.observes is not None

    def for_linear(self, name: str) -> Method:
        """The method that serves the linear of this full name; differs from self where roles are
        treated apart.
        """
        return self

    @property
    def attention(self) -> Attention | None:
        """What happens to queries, keys and values inside the quantized blocks."""
        return None

    @property
    def shares_out(self) -> bool:
        """Whether each linear is solved from its statistics alone, so that several processes can
        share them out.
        """
        return (
            type(self).quantize_block is Method.quantize_block
            and not self.learns
            and not self.tunes
        )

    @property
    def weight_only(self) -> bool:
        """Whether a model of dense weights, those of `dequantize`, computes the same but for
        rounding of sums.
        """
        return True

    def bound_to(self, model: nn.Module) -> Self:
        """The method with the facts of `model` that it must know filled in; LLQError where it
        cannot serve the model.

        `model` may lie on the meta device.
        """
        return self

    @property
    def learns(self) -> bool:
        """Whether `learn` must see the whole model before the first block."""
        return False

    def learn(
        self,
        model: nn.Module,
        ids_NS: Tensor,
        attend: Callable[[nn.Module], Any],
        listener: PassListener,
    ) -> dict[str, Tensor]:
        """What `rewrite` or `taught` need and only work on the whole model gives. It is the
        method's own, to spoil.

        attend: gives a module's attention what `attention` says.
        """
        return {}

    def with_learned(self, learned: Mapping[str, Tensor]) -> Self:
        """The method with what `learn` found filled in, where that belongs into the checkpoint's
        config.
        """
        return self

    @property
    def rewrites(self) -> bool:
        """Whether `rewrite` changes the dense model."""
        return False

    def rewrite(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Rewrite | None:
        """How the dense `model` (maybe on the meta device) changes first; None: not at all. learned
        {}: not yet.
        """
        return None

    @property
    def tunes(self) -> bool:
        """Whether `tune` trains the packed model as a whole after its last block."""
        return False

    def tune(
        self,
        student: nn.Module,
        teacher: nn.Module,
        ids_NS: Tensor,
        listener: PassListener,
        state: State,
    ) -> Packed:
        """New values of stored tensors by full name ("model.layers.0.mlp.up_proj.scale"), of the
        same shape and dtype.

        The student's quantized linears have `method` and `packed()`; it is the method's own, to
        spoil, but shares all other parameters with the full-precision teacher. state: where a
        killed run finds its progress again.
        """
        raise NotImplementedError

    @property
    def reads_data(self) -> bool:
        """Whether the run needs token ids at all."""
        return self.calibrated or self.learns or self.tunes

    @property
    def nominal_bits(self) -> float:
        """The figure that papers print; what is really stored is counted from the layout or the
        file.
        """
        return float(self.bits)

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        """Packed tensors by linear name. Default: each linear alone."""
        packed = {}
        for name, linear in step.linears.items():
            job = step.job(name)
            packed[name] = self.for_linear(job.name).quantize(
                linear.weight.detach().float(), step.stats.get(name), job
            )
        return packed

    # --- config -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def field_names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def build(cls, preset: str = "study", **options: Any) -> Self:
        """The method with a preset's fields and `options` over them; unknown or ill-typed options
        raise LLQError.
        """
        presets: dict[str, Mapping[str, Any]] = {"study": {}, "best": cls.best}
        if preset not in presets:
            raise LLQError(f"preset={preset!r} is unknown; there are {' and '.join(presets)}")
        known = field_types(cls)
        for option in options:
            if option not in known:
                raise LLQError(
                    f"{cls.name} has no option {option!r}{nearest(option, known)}; it has: {', '.join(known)}"
                )
        merged = {**presets[preset], **options}
        return cls(
            **{name: _typed(cls.name, name, value, known[name]) for name, value in merged.items()}
        )


def field_types(method: type[Method]) -> dict[str, type]:
    """Option name -> type, for command lines and checks."""
    hints = get_type_hints(method)
    return {f.name: hints[f.name] for f in fields(method)}


def field_defaults(method: type[Method]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(method) if f.default is not MISSING}


def _typed(method: str, name: str, value: Any, wanted: type) -> Any:
    """`value` if it is of the field's type; ints pass as floats. "4" or 4.5 for an int is an error,
    not a guess.
    """
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise LLQError(f"{method}: {name}={value!r} should be of type {wanted.__name__}")
    return value


def stored_bits(layout: Mapping[str, Spec], out_features: int, in_features: int) -> float:
    """Bits per weight that a linear takes in the file: codes, scales, zeros, seeds, everything but
    its bias.
    """
    return sum(spec.nbytes for spec in layout.values()) * 8 / (out_features * in_features)
