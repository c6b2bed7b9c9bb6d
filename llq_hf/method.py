"""The contract: a quantization method is one frozen dataclass.

Legend: O out_features, I in_features, B sequences, S tokens in a sequence, D hidden size.

Its fields are the options (JSON both ways), `layout` says what is stored before any tensor exists,
`quantize` is the algorithm, `dequantize` is the meaning of what is stored. Calibration, the
replacement of modules, checkpoints, loading and evaluation are written once, elsewhere, and never
name a method.

What a new method overrides
    must      name, title, bits, layout, dequantize, and quantize or quantize_block
    often     check, observes, best, bits_range, linear, affine, flow, calibrated
    rarely    for_linear, sequential, attention, weight_only, nominal_bits, any_bits,
              training_copies; adopts, adopting and adopt, to store other libraries' codes
    rarely    `WholeModel`, for what a block at a time cannot do: bound_to, learn, with_learned,
              rewrite, tune, needs_text. The flags learns, rewrites and tunes follow from what is
              overridden; a method overrides them only where an option switches the hook off.
    never     the rest: shares_out, reads_data, to_dict, field_names, build
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
from .kernels import product
from .models.sequences import Sequences
from .numerics.activations import Attention
from .numerics.grids import Affine
from .numerics.stats import Stat

Packed = dict[str, Tensor]

# --- what the engine hands to a method ------------------------------------------------------------


class Flow(Enum):
    """Which activations flow from block to block while a model is calibrated."""

    QUANTIZED = "quantized"  # each block gets what its quantized predecessors produce, as in GPTQ
    DENSE = "dense"  # each block gets what the full-precision model produces, as in AWQ
    BOTH = "both"  # quantized inputs, with the full-precision model's outputs as targets


class BlockData(Protocol):
    """The calibration data as they enter one decoder block.

    `rows` selects sequences; of image-text pairs it selects one.
    """

    @property
    def count(self) -> int:
        """Number of sequences."""

    @property
    def length(self) -> int:
        """Tokens per sequence; the mean where lengths differ."""

    def batches(self) -> list[slice]:
        """All sequences, cut into batches for a forward pass."""

    def inputs(self, rows: slice) -> tuple[Tensor, dict[str, Any]]:
        """hidden [B, S, D] and the keyword arguments of the block: block(hidden, **kwargs)."""

    def targets(self, rows: slice) -> Tensor:
        """[B, S, D], the full-precision block's output on full-precision inputs (`Flow.BOTH`)."""


class State:
    """Where a long training keeps its progress, to be resumed. This class keeps nothing."""

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last, or None."""
        return None

    def save(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass
class Job:
    """One linear to quantize. notes: what the method wants to appear in its record."""

    name: str  # full module name
    notes: dict[str, Any] = field(default_factory=dict)

    def seeds(self, seed: int, count: int) -> list[int]:
        """`count` seeds below 2**31 for this linear, from the run's `seed` and its name only."""
        return [zlib.crc32(f"{seed}:{self.name}:{i}".encode()) & 0x7FFFFFFF for i in range(count)]


@dataclass
class Step:
    """Linears of one block that are quantized together, with statistics of their inputs.

    A step is a whole block, or one input group of it where the method is `sequential`.
    """

    prefix: str  # module name of the decoder block, "model.layers.3"
    block: nn.Module
    linears: dict[str, nn.Linear]  # by name inside the block, in the order of execution
    stats: dict[str, Stat]  # by the same names
    # Linears that read the same input, in the order of execution.
    groups: list[list[str]] = field(default_factory=list)
    data: BlockData | None = None  # None where the method asks for no calibration
    on_linear: Callable[[str], None] = lambda name: None  # receives the name of each linear begun
    listener: PassListener = field(default_factory=PassListener)  # progress inside a linear
    state: State = field(default_factory=State)
    # Gives a copy of the block what the method's `attention` asks for.
    attend: Callable[[nn.Module], Any] = lambda block: None
    jobs: dict[str, Job] = field(default_factory=dict)

    def job(self, name: str) -> Job:
        """Begin linear `name` (its name inside the block)."""
        full_name = f"{self.prefix}.{name}"
        self.on_linear(full_name)
        self.jobs[name] = Job(full_name)
        return self.jobs[name]

    def run(self, stage: str) -> None:
        """Run the block once over all calibration sequences, for hooks on its modules.

        stage: what the progress display calls it.
        """
        assert self.data is not None
        self.listener.stage(stage, self.data.count)
        for rows in self.data.batches():
            hidden_BSD, kwargs = self.data.inputs(rows)
            self.block(hidden_BSD, **kwargs)
            self.listener.advance(len(hidden_BSD))

    def release(self) -> None:
        """Drop statistics and weights.

        The next step is prepared while the caller still holds this one.
        """
        self.stats.clear()
        self.linears.clear()
        self.data = None
        self.block = nn.Identity()


@dataclass(frozen=True)
class ForeignCodes:
    """The codes of a checkpoint that another library quantized, all on grids of one kind.

    by: its `quant_method`. group_size: -1: a row is one group. sym: every zero point is the middle
    code. in_order: all groups are of consecutive columns. scale_bits: that hold its scales exactly,
    16 (fp16) or 32.
    """

    by: str
    bits: int
    group_size: int
    sym: bool
    in_order: bool
    scale_bits: int


# --- hooks on the whole model ---------------------------------------------------------------------


class Rewrite(Protocol):
    """A change of the dense model before its blocks are quantized, tensor by tensor."""

    @property
    def untied(self) -> Mapping[str, str]:
        """New tensors, each a copy of another: a head that can no longer share the embedding."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the report says about it."""

    def __call__(self, name: str, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The new tensor of this name, in the same shape and dtype.

        read: gives vectors of the base by name.
        """


class WholeModel:
    """Hooks for what cannot be done a block at a time. Most methods override none of them."""

    def bound_to(self, model: nn.Module) -> Self:
        """The method with the facts about `model` that it needs filled in.

        `model` may lie on the meta device. LLQError where the method cannot serve it.
        """
        return self

    @property
    def needs_text(self) -> bool:
        """Whether `learn` and `tune` cannot take image-text pairs."""
        return False

    @property
    def learns(self) -> bool:
        """Whether `learn` is run before the first block."""
        return type(self).learn is not WholeModel.learn

    def learn(
        self,
        model: nn.Module,
        data: Sequences,
        attend: Callable[[nn.Module], Any],
        listener: PassListener,
    ) -> dict[str, Tensor]:
        """Tensors that `rewrite` or `with_learned` need and that take the whole model to compute.

        model: a private copy, which may be modified. data: the calibration's. attend: gives a
        module's attention what `attention` asks for.
        """
        raise NotImplementedError

    def with_learned(self, learned: Mapping[str, Tensor]) -> Self:
        """The method with what `learn` found filled in, where it belongs into config.json."""
        return self

    @property
    def rewrites(self) -> bool:
        """Whether `rewrite` changes the dense model."""
        return type(self).rewrite is not WholeModel.rewrite

    def rewrite(self, model: nn.Module, learned: Mapping[str, Tensor]) -> Rewrite | None:
        """How the dense `model` (maybe on the meta device) is changed first; None: not at all.

        learned: what `learn` found; {} where it has not run yet and only shapes are asked for.
        """
        return None

    @property
    def tunes(self) -> bool:
        """Whether `tune` trains the packed model as a whole after its last block."""
        return type(self).tune is not WholeModel.tune

    def tune(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Sequences,
        listener: PassListener,
        state: State,
    ) -> Packed:
        """New values of stored tensors by full name ("model.layers.0.mlp.up_proj.scale").

        Shapes and dtypes stay. student: the packed model, a private copy that may be modified; its
        quantized linears have `method` and `packed()`, and it shares all other parameters with
        teacher, the full-precision model. state: where a killed run finds its progress.
        """
        raise NotImplementedError


# --- the method -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method(WholeModel, ABC):
    """Base of all methods. Subclasses add fields, whose defaults are the study's settings."""

    name: ClassVar[str]
    title: ClassVar[str]  # for people: "GPTQ (Frantar et al. 2023)"
    bits_range: ClassVar[Sequence[float]] = range(1, 9)  # its widths, for tables and tests
    any_bits: ClassVar[bool] = False  # whether every figure between the first and the last will do
    observes: ClassVar[type[Stat] | None] = None  # statistic of a linear's input; None: none
    training_copies: ClassVar[int] = 0  # fp32 copies of a block that `quantize_block` trains on
    best: ClassVar[Mapping[str, Any]] = {}  # what preset="best" changes of the study's defaults
    adopts: ClassVar[tuple[str, ...]] = ()  # `quant_method`s of other libraries (see `adopting`)

    bits: float  # nominal; declared by every method with its own type and default

    def __post_init__(self) -> None:
        try:
            first, last = self.bits_range[0], self.bits_range[-1]
            between = self.any_bits and first <= self.bits <= last
            if self.bits not in self.bits_range and not between:
                several = len(self.bits_range) > 1
                widths = f"its range {first}..{last}" if several else f"its only width {first}"
                raise LLQError(f"bits={self.bits} is outside {widths}")
            self.check()
        except LLQError as error:
            raise LLQError(f"{self.name}: {error}") from None

    def check(self) -> None:
        """Raise LLQError, with the offending value in the text, where an option makes no sense."""

    # --- must: what is stored, how it is made, what it means --------------------------------------

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        """Stored tensors by name, for a linear [O, I].

        "weight" must be int32 codes of a shape other than [O, I]. LLQError if the linear cannot be
        stored.
        """

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        """fp32 weight -> the tensors of `layout`.

        Codes are decided here, once. Must not change `weight_OI` or `stat`. Methods that treat the
        linears of a block together override `quantize_block` instead.
        """
        raise NotImplementedError(f"{self.name} quantizes whole blocks")

    def quantize_block(self, step: Step) -> dict[str, Packed]:
        """Packed tensors by linear name. Default: each linear alone."""
        packed = {}
        for name, linear in step.linears.items():
            job = step.job(name)
            weight_OI = linear.weight.detach().float()
            packed[name] = self.for_linear(job.name).quantize(weight_OI, step.stats.get(name), job)
        return packed

    @abstractmethod
    def dequantize(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        """The fp32 weight [O, I] that the stored tensors mean."""

    # --- often: the product, exports, calibration -------------------------------------------------

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None, out_features: int) -> Tensor:
        """y [..., O] of x [..., I]. Override to use a kernel or to transform the input."""
        in_features = x.shape[-1]
        return product(x, None, lambda: self.dequantize(packed, out_features, in_features), bias)

    def affine(self, packed: Packed, out_features: int, in_features: int) -> Affine:
        """The linear as codes on uniform grids, for other libraries' formats.

        LLQError where it is not stored so simply.
        """
        raise LLQError(
            f"{self.name} stores no uniform grid of codes per group, which is all that such "
            "formats hold"
        )

    @property
    def flow(self) -> Flow:
        """Which activations the blocks are calibrated on."""
        return Flow.QUANTIZED

    @property
    def calibrated(self) -> bool:
        """Whether calibration data are run through the model, for statistics or for training."""
        return self.observes is not None

    # --- rarely -----------------------------------------------------------------------------------

    def check_packed(self, packed: Packed, out_features: int, in_features: int) -> None:
        """LLQError, with the tensor's name, where a stored number cannot be what it is: an index, a
        width or a seed. Called once for tensors that come from a file.

        Shapes and dtypes are those of `layout`. That numbers are finite is checked for all methods
        (see `check_linears`), so only methods that store something else override this.
        """

    @property
    def sequential(self) -> bool:
        """Whether a block's linears are observed and quantized one input group after the other."""
        return False

    def for_linear(self, name: str) -> Method:
        """The method that serves the linear of this full name.

        Differs from self where linears are treated by their role.
        """
        return self

    @property
    def attention(self) -> Attention | None:
        """What is done to queries, keys and values inside the quantized blocks."""
        return None

    @property
    def weight_only(self) -> bool:
        """Whether a dense model with the weights of `dequantize` computes the same."""
        return True

    @classmethod
    def adopting(cls, codes: ForeignCodes) -> Self:
        """The method, with its options, that stores such codes of another library as they are.

        Asked where the library is among `adopts`. LLQError where it cannot.
        """
        raise NotImplementedError

    def adopt(self, affine: Affine) -> Packed:
        """The tensors of `layout` for a linear that another library quantized: the inverse of
        `affine`. Nothing is rounded. LLQError where codes do not fit.
        """
        raise NotImplementedError

    @property
    def nominal_bits(self) -> float:
        """The figure that papers print. Stored bits are counted from the layout or the file."""
        return float(self.bits)

    # --- never: what follows from the above -------------------------------------------------------

    @property
    def shares_out(self) -> bool:
        """Whether several processes can share the linears.

        They can where each linear is solved from its statistics alone.
        """
        alone = type(self).quantize_block is Method.quantize_block
        return alone and not self.learns and not self.tunes

    @property
    def reads_data(self) -> bool:
        """Whether the run needs calibration data at all."""
        return self.calibrated or self.learns or self.tunes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def field_names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def build(cls, preset: str = "study", **options: Any) -> Self:
        """The method with a preset's fields and `options` over them.

        Unknown or ill-typed options raise LLQError.
        """
        presets: dict[str, Mapping[str, Any]] = {"study": {}, "best": cls.best}
        if preset not in presets:
            raise LLQError(f"preset={preset!r} is unknown; there are {' and '.join(presets)}")
        known = field_types(cls)
        for option in options:
            if option not in known:
                raise LLQError(
                    f"{cls.name} has no option {option!r}{nearest(option, known)}; it has: "
                    f"{', '.join(known)}"
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
    """`value` if it is of the field's type; ints pass as floats. LLQError for "4" instead of 4."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise LLQError(f"{method}: {name}={value!r} should be of type {wanted.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise LLQError(f"{method}: {name}={value} does not fit 64 bits")
    return value


def stored_bits(layout: Mapping[str, Spec], out_features: int, in_features: int) -> float:
    """Bits per weight that a linear takes in the file: everything that is stored but its bias."""
    return sum(spec.nbytes for spec in layout.values()) * 8 / (out_features * in_features)
