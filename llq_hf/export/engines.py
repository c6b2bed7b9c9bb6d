"""Which engine reads which export: facts, found by running the engine or by reading its source.

Everything that llq-hf says about engines is said from this table: what `llq export --for` chooses,
what it prints, and the table in README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import LLQError
from ..common.words import nearest
from .base import Grid

EVERY = tuple(range(1, 9))


@dataclass(frozen=True)
class Reading:
    """What an engine reads of one format. The format has limits of its own beside these.

    bits: widths of codes; empty where weights are dense. cpu_bits: those that run on CPUs; None:
    all. asymmetric: whether grids may have zero points. act_order: whether groups may be of
    scattered columns.
    """

    form: str
    bits: tuple[int, ...] = ()
    cpu_bits: tuple[int, ...] | None = None
    asymmetric: bool = True
    act_order: bool = False

    def refusal(self, grid: Grid | None) -> str | None:
        """Why codes on `grid` are not read; None where they are. grid: None is dense."""
        if grid is None:
            return None
        if grid.bits not in self.bits:
            return f"it reads {widths(self.bits)} bits, and codes have {grid.bits}"
        if not grid.sym and not self.asymmetric:
            return "it reads symmetric grids only, and these have zero points"
        if not grid.in_order and not self.act_order:
            return "it reads groups in order only, and these are scattered (act_order)"
        return None


@dataclass(frozen=True)
class Engine:
    """A program that loads exports.

    version: for which the facts hold. seen: how they were found. reads: the format that serves best
    first. instead: what a user does whose checkpoint fits none of them.
    """

    name: str
    title: str
    version: str
    seen: str
    reads: tuple[Reading, ...]
    instead: str

    def __str__(self) -> str:
        return f"{self.title} {self.version}"

    def reading(self, form: str) -> Reading | None:
        """What it reads of a format; None: nothing."""
        return next((each for each in self.reads if each.form == form), None)

    def check(self, form: str, grid: Grid | None) -> None:
        """LLQError, with the reason and the cure, where it does not read codes on this grid."""
        reading = self.reading(form)
        assert reading is not None
        if (reason := reading.refusal(grid)) is not None:
            raise LLQError(f"{self} does not read this as {form}: {reason}; {self.instead}")


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            "vLLM",
            "0.32",
            "4 bits run on CPUs; the rest from its source",
            (
                Reading("compressed-tensors", (2, 3, 4, 5, 6, 7, 8), (4,)),
                Reading("awq", (4,)),
                Reading("gptq", (4, 8), (4,), asymmetric=False),
                Reading("dense"),
            ),
            "serve the packed checkpoint itself (`vllm serve`, with llq-hf installed beside vLLM), "
            "or give --format dense",
        ),
        Engine(
            "sglang",
            "SGLang",
            "of autumn 2026",
            "GPUs, from its source; not run",
            (
                Reading("compressed-tensors", (4, 8)),
                Reading("awq", (4,)),
                Reading("gptq", (4, 8), asymmetric=False, act_order=True),
                Reading("dense"),
            ),
            "give --format dense",
        ),
        Engine(
            "llama.cpp",
            "llama.cpp",
            "of October 2026",
            "run on CPUs",
            (Reading("gguf", (4, 5, 8)),),
            "give --format gguf-f16, which its convert_hf_to_gguf.py reads",
        ),
        Engine(
            "transformers",
            "transformers",
            "5.23",
            "run in the tests",
            (Reading("compressed-tensors", EVERY), Reading("dense")),
            "load the packed checkpoint itself (from_pretrained, with llq-hf installed), or give "
            "--format dense",
        ),
        Engine(
            "gptqmodel",
            "GPTQModel",
            "7.7",
            "run on CPUs",
            (Reading("gptq", (2, 3, 4, 8), act_order=True), Reading("awq", (4,))),
            "give --format dense, for a library that reads dense weights",
        ),
    )
}


def engine_named(name: str) -> Engine:
    """LLQError with the nearest name where there is none."""
    if name not in ENGINES:
        raise LLQError(
            f"--for {name} is unknown{nearest(name, ENGINES)}; give one of {', '.join(ENGINES)}"
        )
    return ENGINES[name]


def readers(form: str, grid: Grid | None) -> tuple[list[str], list[str]]:
    """Of the engines that know a format: those that read codes on `grid`, and a phrase for each of
    the others, with its reason. grid: None is dense.
    """
    takes, refuses = [], []
    for engine in ENGINES.values():
        reading = engine.reading(form)
        if reading is None:
            continue
        reason, on_cpus = reading.refusal(grid), reading.cpu_bits
        if reason is not None:
            refuses.append(f"{engine} does not: {reason}")
        elif grid is not None and on_cpus is not None and grid.bits not in on_cpus:
            takes.append(f"{engine} (on GPUs; on CPUs it runs {widths(on_cpus)} bits)")
        else:
            takes.append(str(engine))
    return takes, refuses


def widths(bits: Sequence[int]) -> str:
    """Widths in words: "2-8", "4, 8"."""
    if len(bits) > 2 and list(bits) == list(range(bits[0], bits[-1] + 1)):
        return f"{bits[0]}-{bits[-1]}"
    return ", ".join(map(str, bits))


def table() -> list[str]:
    """The lines of README's table."""
    lines = ["| `--for` | version | format | bits | grids | known |", "|---|---|---|---|---|---|"]
    for engine in ENGINES.values():
        for reading in engine.reads:
            cells = [f"`{engine.name}`", engine.version, f"`{reading.form}`", *_limits(reading)]
            lines.append(f"| {' | '.join([*cells, engine.seen])} |")
    return lines


def _limits(reading: Reading) -> list[str]:
    """The cells of a reading: its widths, its grids."""
    if not reading.bits:
        return ["dense", "any"]
    on_cpus = reading.cpu_bits
    cpus = "" if on_cpus is None else f"; on CPUs {widths(on_cpus)}"
    symmetry = "symmetric, asymmetric" if reading.asymmetric else "symmetric"
    order = ", `act_order`" if reading.act_order else ""
    return [widths(reading.bits) + cpus, symmetry + order]
