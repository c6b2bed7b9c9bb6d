"""Option sets of every method, with ceilings of their errors. A new method adds rows here.

The ceilings are for the problem of `checks`: a Gaussian weight [48, 172], and inputs of decaying
spectrum with one massive channel. For each width of the method (1..8 bits for most) there are two:
the relative Frobenius error |dW| / |W|, and the largest error max|dW| / rms W. They are about 10 %
above the measured errors. Calibrated methods accept weight error for less output error, so their
ceilings are higher than RTN's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llq_hf.method import Method
from llq_hf.methods import METHODS, build


@dataclass(frozen=True, eq=False)  # hashed by identity, because results are cached by case
class Case:
    """An option set of a method and its ceilings.

    words: for the test id. frobenius, largest: ceilings for each width, from the smallest on.
    uniform: `weight` and `scale` hold uniform codes of `bits` bits and their steps, so the generic
    faults apply. rows_apart: an outlier hurts its own row only (column scales and rotations spread
    it). clips: a range fixed in sigmas cuts off the tails, so errors stop falling at high widths.
    clip_share: the share of the output that this may cost. feedback: if the method factorizes a
    Hessian, the factor repairs rounding errors. compensates: calibration lowers the error of this
    one linear (smoothing needs several and does not).
    """

    method: str
    words: str
    frobenius: tuple[float, ...]
    largest: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    preset: str = "study"
    uniform: bool = True
    rows_apart: bool = True
    clips: bool = False
    clip_share: float = 0.0
    feedback: bool = True
    compensates: bool = True

    def build(self, bits: float) -> Method:
        return build(self.method, self.preset, bits=bits, **self.options)

    @property
    def all_bits(self) -> Sequence[float]:
        return METHODS[self.method].bits_range

    def near(self, bits: float) -> float:
        """The method's width nearest to `bits`."""
        return min(self.all_bits, key=lambda own: abs(own - bits))

    def ceilings(self, bits: float) -> tuple[float, float]:
        """Largest |dW| / |W| and max|dW| / rms W at this width."""
        index = list(self.all_bits).index(bits)
        return self.frobenius[index], self.largest[index]

    def __str__(self) -> str:
        return f"{self.method}-{self.words}".replace(" ", "-")


CASES: tuple[Case, ...] = (
    # method, words, |dW| / |W| at 1, 2, ... bits, max|dW| / rms W
    Case(
        "rtn",
        "groups of 128",
        (1.09, 0.54, 0.23, 0.107, 0.052, 0.026, 0.013, 0.0063),
        (3.5, 1.2, 0.51, 0.24, 0.12, 0.057, 0.028, 0.014),
    ),
    Case(
        "rtn",
        "one group a row",
        (1.1, 0.58, 0.25, 0.12, 0.056, 0.028, 0.014, 0.0068),
        (3.6, 1.3, 0.54, 0.25, 0.12, 0.06, 0.03, 0.015),
        options={"group_size": -1},
    ),
    Case(
        "rtn",
        "symmetric groups of 32",
        (1.1, 0.51, 0.22, 0.103, 0.05, 0.025, 0.013, 0.006),
        (4.8, 1.6, 0.68, 0.32, 0.16, 0.077, 0.038, 0.02),
        options={"group_size": 32, "sym": True},
    ),
    Case(
        "rtn",
        "groups of 40 with fp32 scales",
        (1.06, 0.46, 0.2, 0.09, 0.044, 0.022, 0.0108, 0.0054),
        (3.0, 1.1, 0.46, 0.22, 0.106, 0.053, 0.027, 0.014),
        options={"group_size": 40, "scale_bits": 32},
    ),
    Case(
        "rtn",
        "best",
        (0.82, 0.4, 0.21, 0.102, 0.051, 0.025, 0.013, 0.0063),
        (4.0, 1.9, 1.2, 0.6, 0.22, 0.089, 0.05, 0.014),
        preset="best",
    ),
    Case(
        "gptq",
        "groups of 128",
        (2.2, 1.2, 0.51, 0.23, 0.104, 0.052, 0.027, 0.013),
        (32.0, 6.0, 2.7, 1.4, 0.61, 0.33, 0.19, 0.075),
    ),
    Case(
        "gptq",
        "one group a row",
        (2.1, 1.1, 0.51, 0.22, 0.12, 0.055, 0.028, 0.014),
        (9.0, 6.6, 2.7, 1.4, 0.65, 0.33, 0.19, 0.073),
        options={"group_size": -1},
    ),
    Case(
        "gptq",
        "symmetric groups of 32",
        (2.3, 1.08, 0.49, 0.22, 0.102, 0.05, 0.026, 0.013),
        (34.0, 6.2, 2.9, 1.3, 0.73, 0.33, 0.18, 0.082),
        options={"group_size": 32, "sym": True},
    ),
    Case(
        "gptq",
        "act order in groups of 40",
        (2.3, 0.98, 0.39, 0.19, 0.094, 0.048, 0.023, 0.013),
        (28.0, 5.3, 1.7, 0.94, 0.56, 0.25, 0.12, 0.065),
        options={"group_size": 40, "act_order": True},
    ),
    Case(
        "gptq",
        "static groups of 64",
        (1.9, 0.95, 0.44, 0.2, 0.099, 0.049, 0.023, 0.012),
        (8.9, 5.2, 2.5, 1.07, 0.58, 0.33, 0.17, 0.064),
        options={"group_size": 64, "static_groups": True},
    ),
    Case(
        "gptq",
        "best",
        (1.2, 0.59, 0.31, 0.16, 0.079, 0.041, 0.022, 0.012),
        (4.6, 3.3, 2.3, 0.97, 0.66, 0.27, 0.16, 0.074),
        preset="best",
    ),
    Case(
        "quip",
        "incoherent",
        (2.4, 0.7, 0.32, 0.17, 0.12, 0.095, 0.09, 0.089),
        (9.6, 2.9, 1.5, 0.93, 0.66, 0.64, 0.67, 0.65),
        rows_apart=False,
        clips=True,
        clip_share=0.01,
    ),
    Case(
        "quip",
        "blocked rotations",
        (2.4, 0.71, 0.32, 0.16, 0.101, 0.082, 0.076, 0.075),
        (12.0, 2.9, 1.3, 0.84, 0.6, 0.54, 0.57, 0.56),
        options={"blocked": True},
        rows_apart=False,
        clips=True,
        clip_share=0.01,
    ),
    Case(
        "quip",
        "no rescaling",
        (2.2, 0.63, 0.28, 0.15, 0.095, 0.079, 0.075, 0.074),
        (8.1, 3.0, 1.2, 0.65, 0.51, 0.49, 0.46, 0.45),
        options={"rescale": False},
        rows_apart=False,
        clips=True,
        clip_share=0.01,
    ),
    Case(
        "quip",
        "a grid per row",
        (1.8, 1.02, 0.5, 0.22, 0.12, 0.055, 0.027, 0.013),
        (10.5, 6.3, 3.9, 1.7, 0.69, 0.38, 0.19, 0.087),
        options={"incoherence": False, "rescale": False},
    ),
    Case(
        "quip",
        "a grid per row rescaled",
        (1.5, 1.04, 0.5, 0.23, 0.12, 0.054, 0.028, 0.014),
        (18.0, 7.0, 3.3, 2.0, 1.1, 0.44, 0.24, 0.105),
        options={"incoherence": False},
        rows_apart=False,
    ),
    Case(
        "quip",
        "best",
        (1.5, 0.72, 0.37, 0.2, 0.107, 0.058, 0.031, 0.017),
        (5.6, 3.0, 1.7, 0.79, 0.44, 0.27, 0.13, 0.076),
        preset="best",
        rows_apart=False,
    ),
    Case(
        "db_llm",
        "groups of 128",
        (0.4,),
        (2.6,),
        uniform=False,
    ),
    Case(
        "db_llm",
        "groups of 40 with fp32 scales",
        (0.37,),
        (2.6,),
        options={"group_size": 40, "scale_bits": 32},
        uniform=False,
    ),
    Case(
        "db_llm",
        "best one group a row",
        (0.77,),
        (4.5,),
        options={"group_size": -1},
        preset="best",
        uniform=False,
    ),
    Case(
        "pb_llm",
        "groups of 128",
        (0.93, 0.59, 0.54, 0.39, 0.21, 0.013),
        (4.2, 3.9, 3.8, 2.7, 0.93, 0.072),
        uniform=False,
    ),
    Case(
        "pb_llm",
        "one group by magnitude",
        (0.93, 0.7, 0.63, 0.5, 0.29, 0.013),
        (4.1, 5.8, 5.8, 4.3, 2.7, 0.072),
        options={"group_size": -1, "salience": "magnitude"},
        uniform=False,
    ),
    Case(
        "pb_llm",
        "groups of 40 with fp32 scales",
        (0.91, 0.57, 0.51, 0.35, 0.15, 0.013),
        (4.9, 3.0, 3.4, 1.9, 1.5, 0.072),
        options={"group_size": 40, "mean_over": "binarized", "scale_bits": 32},
        uniform=False,
    ),
    Case(
        "pb_llm",
        "best",
        (1.0, 0.62, 0.56, 0.4, 0.18, 0.013),
        (4.8, 2.8, 2.4, 1.7, 0.87, 0.072),
        preset="best",
        uniform=False,
    ),
    Case(
        "billm",
        "blocks of 128",
        (0.53,),
        (2.5,),
        uniform=False,
    ),
    Case(
        "billm",
        "blocks of 60 by magnitude",
        (0.78,),
        (9.7,),
        options={"block_size": 60, "salience": "magnitude"},
        uniform=False,
    ),
    Case(
        "billm",
        "refitted with fp32 scales",
        (0.69,),
        (4.8,),
        options={
            "search_on": "weight",
            "arb_rounds": 3,
            "refine": 1,
            "dense_share": 0.0,
            "scale_bits": 32,
        },
        uniform=False,
    ),
    Case(
        "billm",
        "best",
        (0.6,),
        (4.9,),
        preset="best",
        uniform=False,
    ),
    Case(
        "spinquant",
        "one group a row",
        (1.1, 0.79, 0.45, 0.23, 0.12, 0.063, 0.03, 0.016),
        (4.8, 4.4, 2.9, 1.3, 0.62, 0.34, 0.22, 0.098),
    ),
    Case(
        "spinquant",
        "act order in groups of 40",
        (1.2, 0.79, 0.43, 0.22, 0.1, 0.053, 0.026, 0.014),
        (4.8, 4.4, 2.3, 1.2, 0.59, 0.28, 0.18, 0.11),
        options={"group_size": 40, "act_order": True, "levels": "full"},
    ),
    Case(
        "spinquant",
        "half steps rounded to nearest in groups of 64",
        (0.66, 0.37, 0.2, 0.1, 0.051, 0.026, 0.013, 0.0064),
        (3.8, 2.5, 1.2, 0.46, 0.24, 0.081, 0.04, 0.019),
        options={"group_size": 64, "solver": "rtn", "levels": "halves"},
        clip_share=1e-4,  # its search cuts off tails and does not look at outputs
    ),
    Case(
        "spinquant",
        "best",
        (1.0, 0.75, 0.46, 0.28, 0.127, 0.059, 0.03, 0.016),
        (4.9, 5.0, 2.9, 2.2, 0.82, 0.32, 0.16, 0.087),
        preset="best",
    ),
    Case(
        "awq",
        "groups of 128",
        (1.1, 0.53, 0.26, 0.14, 0.058, 0.03, 0.015, 0.0073),
        (4.2, 2.5, 1.9, 0.8, 0.55, 0.36, 0.18, 0.027),
        rows_apart=False,
    ),
    Case(
        "awq",
        "one group a row",
        (1.1, 0.58, 0.28, 0.13, 0.064, 0.033, 0.016, 0.008),
        (4.8, 2.5, 1.9, 1.6, 0.65, 0.31, 0.21, 0.027),
        options={"group_size": -1},
        rows_apart=False,
    ),
    Case(
        "awq",
        "symmetric groups of 32 not clipped",
        (1.1, 0.54, 0.23, 0.11, 0.053, 0.026, 0.013, 0.0064),
        (4.8, 2.2, 0.82, 0.41, 0.22, 0.1, 0.055, 0.027),
        options={"group_size": 32, "sym": True, "ranges": "full"},
        rows_apart=False,
    ),
    Case(
        "awq",
        "duo scaling in groups of 40",
        (1.0, 0.46, 0.21, 0.098, 0.048, 0.026, 0.012, 0.006),
        (4.0, 2.5, 1.2, 0.94, 0.5, 0.24, 0.15, 0.027),
        options={"group_size": 40, "duo_scaling": True, "scale_bits": 32},
        rows_apart=False,
    ),
    Case(
        "awq",
        "best",
        (1.2, 0.71, 0.35, 0.19, 0.089, 0.045, 0.023, 0.012),
        (6.2, 3.7, 1.9, 1.1, 0.76, 0.28, 0.19, 0.063),
        preset="best",
        rows_apart=False,
    ),
    Case(
        "smoothquant",
        "weights only",
        (0.88, 0.32, 0.14, 0.063, 0.03, 0.015, 0.0075),
        (2.4, 0.8, 0.34, 0.16, 0.077, 0.038, 0.019),
        options={"a_bits": 16},
        compensates=False,
    ),
    Case(
        "smoothquant",
        "weights only with nothing to smooth",
        (0.88, 0.32, 0.14, 0.063, 0.03, 0.015, 0.0075),
        (2.4, 0.8, 0.34, 0.16, 0.077, 0.038, 0.019),
        options={"a_bits": 16, "smooth": False, "scale_bits": 32},
        compensates=False,
    ),
    Case(
        "smoothquant",
        "best",
        (0.43, 0.23, 0.12, 0.059, 0.03, 0.015, 0.0074),
        (3.5, 2.4, 1.1, 0.32, 0.14, 0.057, 0.025),
        options={"a_bits": 16},
        preset="best",
        compensates=False,
    ),
    Case(
        "omniquant",
        "groups of 128",
        (1.1, 0.53, 0.22, 0.11, 0.051, 0.026, 0.014, 0.0093),
        (3.4, 1.2, 0.5, 0.26, 0.16, 0.11, 0.1, 0.085),
        options={"epochs": 4},
    ),
    Case(
        "omniquant",
        "one group a row",
        (1.1, 0.55, 0.24, 0.11, 0.055, 0.028, 0.014, 0.008),
        (3.4, 1.2, 0.65, 0.33, 0.2, 0.15, 0.15, 0.11),
        options={"group_size": -1, "epochs": 4, "lwc_lr": 0.05},
    ),
    Case(
        "omniquant",
        "symmetric groups of 32",
        (1.1, 0.5, 0.22, 0.1, 0.05, 0.025, 0.015, 0.01),
        (4.7, 1.6, 0.76, 0.39, 0.24, 0.15, 0.11, 0.093),
        options={"group_size": 32, "sym": True, "epochs": 4},
    ),
    Case(
        "omniquant",
        "searched groups of 40",
        (0.81, 0.39, 0.19, 0.095, 0.047, 0.024, 0.013, 0.0073),
        (3.9, 2.6, 1.8, 1.2, 0.49, 0.35, 0.18, 0.21),
        options={"group_size": 40, "aug_loss": True, "search_range": True, "epochs": 4},
    ),
    Case(
        "omniquant",
        "best",
        (0.85, 0.43, 0.22, 0.11, 0.056, 0.029, 0.016, 0.0084),
        (4.1, 3.0, 2.3, 1.6, 0.77, 0.37, 0.33, 0.25),
        options={"epochs": 4},
        preset="best",
    ),
    Case(
        "slim_llm",
        "groups of 16",
        (0.54, 0.24, 0.11, 0.054, 0.026, 0.013),
        (2.9, 0.95, 0.58, 0.27, 0.14, 0.074),
        options={"group_size": 16},
        uniform=False,
    ),
    Case(
        "slim_llm",
        "groups of 32",
        (0.65, 0.33, 0.15, 0.07, 0.034, 0.016),
        (3.4, 1.3, 0.59, 0.29, 0.16, 0.083),
        options={"group_size": 32},
        uniform=False,
    ),
    Case(
        "slim_llm",
        "as published in groups of 24 with fp32 scales",
        (0.64, 0.29, 0.13, 0.062, 0.029, 0.02),
        (3.1, 1.4, 0.59, 0.34, 0.18, 0.45),
        options={"group_size": 24, "as_published": True, "scale_bits": 32},
        uniform=False,
    ),
    Case(
        "slim_llm",
        "plus in groups of 16",
        (0.38, 0.19, 0.091, 0.053, 0.035, 0.029),
        (2.9, 1.5, 0.59, 0.65, 0.68, 0.69),
        options={"group_size": 16, "plus": True, "epochs": 8, "learning_rate": 0.1, "pairs": 1},
        uniform=False,
        clips=True,
        clip_share=1e-3,
        feedback=False,
    ),
    Case(
        "slim_llm",
        "best",
        (0.51, 0.26, 0.13, 0.066, 0.034, 0.017),
        (2.8, 1.3, 0.55, 0.3, 0.17, 0.084),
        options={"group_size": 32},
        preset="best",
        uniform=False,
    ),
    Case(
        "nf4",
        "blocks of 64",
        (0.63, 0.22, 0.102),
        (2.3, 0.9, 0.56),
        uniform=False,
        rows_apart=False,
    ),
    Case(
        "nf4",
        "calibrated",
        (0.6, 0.22, 0.104),
        (2.3, 0.88, 0.48),
        options={"icq": True},
        uniform=False,
        rows_apart=False,
    ),
    Case(
        "nf4",
        "blocks of 40 with fp32 scales",
        (0.59, 0.21, 0.097),
        (2.3, 0.75, 0.48),
        options={"block_size": 40, "double_quant": False},
        uniform=False,
        rows_apart=False,
    ),
    Case(
        "nf4",
        "best calibrated",
        (0.41, 0.19, 0.095),
        (2.9, 1.1, 0.51),
        options={"icq": True},
        preset="best",
        uniform=False,
        rows_apart=False,
    ),
    Case(
        "efficient_qat",
        "groups of 64",
        (0.5, 0.21, 0.098),
        (1.2, 0.49, 0.24),
        feedback=False,
    ),
    Case(
        "efficient_qat",
        "one group a row",
        (0.6, 0.32, 0.17),
        (3.3, 2.3, 1.6),
        options={
            "group_size": -1,
            "solved": True,
            "relative": True,
            "weight_lr": 5e-3,
            "grid_lr": 1e-3,
        },
        feedback=False,
    ),
    Case(
        "efficient_qat",
        "relative rates in groups of 40",
        (0.46, 0.2, 0.09),
        (1.1, 0.49, 0.24),
        options={
            "group_size": 40,
            "epochs": 4,
            "relative": True,
            "weight_lr": 5e-3,
            "grid_lr": 1e-3,
        },
        feedback=False,
    ),
    Case(
        "efficient_qat",
        "best",
        (0.55, 0.28, 0.14),
        (3.1, 1.5, 0.9),
        options={"epochs": 4},
        preset="best",
        feedback=False,
    ),
    Case(
        "hybrid",
        "widest candidate within bits",
        (1.2, 0.51, 0.23, 0.013),
        (6.0, 2.7, 1.4, 0.075),
    ),
)

# Option sets and widths of the costly checks (save, load, stream).
CHECKPOINTS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("rtn", 3, {"group_size": 64}),
    ("rtn", 8, {"group_size": 64}),
    ("gptq", 2, {"group_size": 64, "act_order": True}),
    ("gptq", 4, {"group_size": 64, "act_order": True}),
    ("quip", 2, {}),
    ("quip", 5, {}),
    ("db_llm", 2, {"group_size": 64, "steps": 3, "feedback": True}),
    ("pb_llm", 1.7, {"group_size": 64}),
    ("pb_llm", 3.0, {"group_size": 64}),
    ("billm", 1.1, {}),
    ("billm", 1.1, {"block_size": 60, "search_on": "weight", "arb_rounds": 2, "refine": 1}),
    ("spinquant", 4, {}),
    ("spinquant", 2, {"a_bits": 8, "kv_bits": 4}),
    ("awq", 3, {"group_size": 64, "ratios": 4}),
    ("awq", 4, {"group_size": 64, "ratios": 4, "gqa": "tie"}),
    ("smoothquant", 4, {"a_bits": 8}),
    ("smoothquant", 8, {}),
    ("omniquant", 2, {"group_size": 64, "epochs": 2}),
    ("omniquant", 4, {"a_bits": 8, "group_size": -1, "epochs": 2}),
    ("slim_llm", 2, {"group_size": 16}),
    ("slim_llm", 3, {"group_size": 32, "plus": True, "epochs": 2}),
    (
        "hybrid",
        3,
        {"rules": "*.down_proj=rtn:4:group_size=64+*.self_attn.*=gptq:2:group_size=64+*=quip:3"},
    ),
    ("nf4", 4, {}),
    ("nf4", 3, {"icq": True, "tau_steps": 10}),
    ("efficient_qat", 2, {"tune_batch": 4}),
    ("efficient_qat", 3, {"preset": "best", "epochs": 2, "tune_epochs": 1}),
)


def with_bits() -> Iterator[tuple[Case, float]]:
    """Every case at every width of its method."""
    return ((case, bits) for case in CASES for bits in case.all_bits)
