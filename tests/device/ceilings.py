"""What methods may cost on a GPU: the table of ceilings that the tests hold them to.

Measured on a pretended GPU, where every run counts alike. `measure.py` prints these rows anew, with
the ceilings that belong to what it measures: paste them when a change makes a method cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llq_hf.method import Method
from llq_hf.methods import build


@dataclass(frozen=True)
class Costs:
    """An option set of a method, and its ceilings, which follow in subclasses. Trainings are short
    here: each step costs the same.

    kernels: whether the kernels of GPUs serve; else torch does all, as where they do not fit.
    fails: why it fails today, if it does.
    """

    method: str
    bits: float

    options: dict[str, Any] = field(default_factory=dict, kw_only=True)
    preset: str = field(default="study", kw_only=True)
    kernels: bool = field(default=False, kw_only=True)
    fails: str = field(default="", kw_only=True)

    def build(self) -> Method:
        return build(self.method, self.preset, bits=self.bits, **self.options)

    def __str__(self) -> str:
        preset = [] if self.preset == "study" else [self.preset]
        kernels = ["kernels"] if self.kernels else []
        return "-".join([self.method, f"{self.bits:g}", *preset, *kernels, *self.options])


@dataclass(frozen=True)
class Solver(Costs):
    """Quantizing one block in memory, `checks.llama` with a narrow and with a wide MLP.

    column: launches that a column more of a linear costs. block: launches of the narrow block.
    syncs, uploads: of the wide block; each makes the host wait.
    """

    column: float
    block: int
    syncs: int
    uploads: int


@dataclass(frozen=True)
class Decoder(Costs):
    """A packed linear [64, 512] and one token in bf16, from the second call on.

    launches: of one call. moved: bytes that its operations read and write, a weight; a linear in
    bf16 moves 2.
    """

    launches: int
    moved: float


# fmt: off
SOLVERS: tuple[Solver, ...] = (
    # method, bits, launches a column, launches a block, syncs, uploads
    Solver("rtn", 4, 0.12, 730, 46, 0),
    Solver("rtn", 4, 0.12, 1016, 46, 1, preset="best"),
    Solver("gptq", 4, 10.82, 4748, 118, 4),
    Solver("gptq", 4, 36.57, 15941, 144, 45, preset="best"),
    Solver("awq", 4, 0.12, 8760, 137, 6),
    Solver("awq", 4, 10.67, 18890, 206, 6, preset="best"),
    Solver("smoothquant", 8, 0.1, 715, 41, 4),
    Solver("smoothquant", 8, 0.1, 1116, 41, 5, preset="best"),
    Solver("omniquant", 4, 0.1, 2183, 83, 8, options={"epochs": 1}),
    Solver("omniquant", 4, 0.1, 52764, 100, 13, preset="best", options={"epochs": 1}),
    Solver("spinquant", 4, 10.75, 5712, 118, 24),
    Solver("spinquant", 4, 41.06, 17944, 146, 60, preset="best"),
    Solver("quip", 2, 7.59, 3780, 95, 104),
    Solver("quip", 2, 379.74, 114469, 374, 113, preset="best"),
    Solver("slim_llm", 2, 16.29, 7163, 134, 20),
    Solver("slim_llm", 2, 52.16, 22075, 166, 60, preset="best"),
    Solver("db_llm", 2, 22.75, 47168, 60, 11, options={"steps": 2}),
    Solver("pb_llm", 1.7, 19.86, 9729, 195, 12),
    Solver("pb_llm", 1.7, 128.2, 49327, 205, 14, preset="best"),
    Solver("billm", 1.1, 2.86, 3913, 136, 20),
    Solver("billm", 1.1, 67.95, 35894, 198, 23, preset="best"),
    Solver("nf4", 4, 0.1, 354, 7, 4),
    Solver("efficient_qat", 2, 0.1, 3624, 185, 20, options={"epochs": 1, "tune_batch": 2}),
    Solver("efficient_qat", 2, 35.94, 17971, 264, 67, preset="best",
        options={"epochs": 1, "tune_epochs": 1, "tune_batch": 2}),
    Solver("hybrid", 3, 0.15, 4116, 162, 20, options={"candidates": "rtn:2+rtn:4", "samples": 2}),
    Solver("nf4", 4, 0.1, 6845, 7, 4, options={"icq": True, "tau_steps": 10}),
    Solver("gptq", 4, 0.35, 1282, 111, 4, kernels=True),
    Solver("gptq", 4, 0.86, 3682, 136, 45, preset="best", kernels=True),
    Solver("spinquant", 4, 0.23, 2207, 111, 24, kernels=True),
    Solver("slim_llm", 2, 0.74, 1921, 134, 20, kernels=True),
    Solver("efficient_qat", 2, 1.32, 6884, 259, 68, preset="best", kernels=True,
        options={"tune_batch": 4, "epochs": 1}),
    Solver("quip", 2, 0.13, 1324, 95, 104, kernels=True),
    Solver("quip", 2, 0.63, 4669, 374, 113, preset="best", kernels=True),
)
DECODERS: tuple[Decoder, ...] = (
    # method, bits, launches a linear, bytes a weight
    Decoder("rtn", 4, 1, 0.62, kernels=True),
    Decoder("gptq", 4, 1, 0.62, kernels=True),
    Decoder("awq", 4, 2, 0.72, kernels=True),
    Decoder("smoothquant", 8, 2, 1.22, kernels=True),
    Decoder("omniquant", 4, 1, 0.62, kernels=True, options={"epochs": 1}),
    Decoder("spinquant", 4, 1, 0.6, kernels=True),
    Decoder("quip", 2, 3, 0.77, kernels=True),
    Decoder("slim_llm", 2, 1, 0.34, kernels=True),
    Decoder("db_llm", 2, 1, 0.35, kernels=True, options={"steps": 2}),
    Decoder("pb_llm", 1.7, 2, 0.65, kernels=True),
    Decoder("billm", 1.1, 1, 0.46, kernels=True),
    Decoder("nf4", 4, 1, 0.65, kernels=True),
    Decoder("efficient_qat", 2, 1, 0.37, kernels=True, options={"epochs": 1}),
    Decoder("hybrid", 3, 1, 0.48, kernels=True),
    Decoder("gptq", 4, 3, 0.89, kernels=True, options={"act_order": True}),
    Decoder("spinquant", 4, 19, 1.77, kernels=True, options={"a_bits": 8}),
    Decoder("rtn", 3, 1, 0.48, kernels=True),
    Decoder("slim_llm", 2, 1, 0.34, kernels=True, options={"plus": True, "epochs": 1}),
    Decoder("nf4", 4, 1, 0.66, kernels=True, options={"icq": True, "tau_steps": 10}),
    Decoder("smoothquant", 4, 2, 0.67, kernels=True, options={"a_bits": 8}),
    Decoder("pb_llm", 3, 75, 101.67, kernels=True),
    Decoder("omniquant", 4, 18, 1.94, kernels=True,
        options={"a_bits": 8, "group_size": -1, "epochs": 1}),
    Decoder("rtn", 4, 15, 35.99),
    Decoder("gptq", 4, 15, 35.99),
    Decoder("awq", 4, 18, 36.37),
    Decoder("smoothquant", 8, 21, 10.15),
    Decoder("omniquant", 4, 15, 35.99, options={"epochs": 1}),
    Decoder("spinquant", 4, 11, 35.84),
    Decoder("quip", 2, 23, 23.81),
    Decoder("slim_llm", 2, 44, 69.82),
    Decoder("db_llm", 2, 12, 41.19, options={"steps": 2}),
    Decoder("pb_llm", 1.7, 105, 84.43),
    Decoder("billm", 1.1, 47, 53.66),
    Decoder("nf4", 4, 13, 47.54),
    Decoder("efficient_qat", 2, 15, 35.9, options={"epochs": 1}),
    Decoder("hybrid", 3, 27, 44.72),
)
# fmt: on
