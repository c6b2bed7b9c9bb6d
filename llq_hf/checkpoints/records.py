"""What a run writes down as JSON: one record per linear, one line per block, one report."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class LinearRecord(TypedDict):
    """How one linear went. What the method noted on the way stands beside these keys."""

    name: str  # full module name
    shape: list[int]  # [O, I]
    stored_bits: float  # per weight, everything but the bias
    weight_error: NotRequired[float]  # |W - W^|^2 / |W|^2, where W is known
    output_error: NotRequired[float]  # tr(dW H dW^T) / tr(W H W^T), where there is a Hessian H
    seconds: NotRequired[float]  # in the journal only: it differs from run to run
    tuned: NotRequired[bool]  # trained on after it was quantized
    served_by: NotRequired[str]  # where methods are mixed: which one, with its options
    fallback: NotRequired[str]  # what replaced the solver, where it failed


class BlockLine(TypedDict):
    """A finished block, as a line of the journal."""

    block: int
    tensors: dict[str, str]  # name in the file -> sha256 (see `shards.digest_of`)
    linears: list[LinearRecord]
    seconds: float
    peak_bytes: int
    tuned: NotRequired[bool]


class Bits(TypedDict):
    """Bits of the whole checkpoint."""

    nominal: float  # what papers print
    stored: float  # per quantized weight, counted from the layout
    whole_model: float  # per parameter of the whole model
    bytes: int


class Report(TypedDict):
    """llq_report.json."""

    fingerprint: str
    identity: dict[str, Any]  # everything that decides the bytes
    # Names of base and calibration, which decide no byte. "converted": the `format` of another
    # library, the `revision` on the Hub and the `section` of the checkpoint that was taken in.
    made_from: dict[str, Any]
    linears: list[LinearRecord]
    bits: Bits
    rewrite: NotRequired[dict[str, Any]]  # how the dense model was changed first
    first_words: NotRequired[dict[str, Any]]  # what the finished model answers
