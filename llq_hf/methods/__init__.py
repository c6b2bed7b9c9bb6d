"""The list of all quantization methods, and how one is built from its name and options.

To add a method, write its file in this folder and add it to `LISTED` (README.md says how).
"""

from __future__ import annotations

from typing import Any

from ..common.errors import LLQError
from ..common.words import nearest
from ..method import ForeignCodes, Method
from .awq import AWQ
from .billm import BiLLM
from .db_llm import DBLLM
from .efficient_qat import EfficientQAT
from .gptq import GPTQ
from .hybrid import Hybrid
from .nf4 import NF4
from .omniquant import OmniQuant
from .pb_llm import PBLLM
from .quip import QuIP
from .rtn import RTN
from .slim_llm import SliMLLM
from .smoothquant import SmoothQuant
from .spinquant import SpinQuant

LISTED = (
    RTN, GPTQ, AWQ, SmoothQuant, OmniQuant, SpinQuant, QuIP, SliMLLM, DBLLM, PBLLM, BiLLM, NF4,
    EfficientQAT, Hybrid,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in LISTED}


def method_type(name: str) -> type[Method]:
    """The class of a method; LLQError with the nearest name if there is none."""
    if name not in METHODS:
        raise LLQError(
            f"unknown method {name!r}{nearest(name, METHODS)}; there are: {', '.join(METHODS)}"
        )
    return METHODS[name]


def build(name: str, preset: str = "study", **options: Any) -> Method:
    """A method from its name and options, as in build("gptq", bits=3, group_size=64)."""
    return method_type(name).build(preset, **options)


def adopting(codes: ForeignCodes) -> Method:
    """The first method that stores codes of another library as they are; LLQError where none can.

    Methods say themselves of which libraries they take codes (`Method.adopts`).
    """
    refused = LLQError(f"no method stores codes of {codes.by}")
    for method in LISTED:
        if codes.by in method.adopts:
            try:
                return method.adopting(codes)
            except LLQError as error:
                refused = error
    raise refused
