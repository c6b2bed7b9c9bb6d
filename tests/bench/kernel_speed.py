"""Measures the speed of one packed linear as a multiple of bf16 F.linear, on LLaMA-3-8B's shapes.

    python tests/bench/kernel_speed.py [--methods rtn:4,rtn:4:32,quip:2] [--shapes 4096x4096]
        [--batches 1,4,8,64,512] [--rounds 9] [--threads 1]

A method is name:bits or name:bits:group, whose group is a number of columns or "row". The whole
linear counts: input scales, rotations and the preparation of activations. Both sides have as many
threads and take turns in one process. The weights rotate over more than 128 MB, so that none is
found in the cache. With one thread, its own seconds count (time.thread_time): a shared machine's
other work does not, although it takes memory bandwidth from both. With more threads, the clock's
seconds count, and the machine should be idle. Codes are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llq_hf.kernels import CachedTensors, describe
from llq_hf.method import Method, Packed
from llq_hf.methods import build

METHODS = (
    "rtn:1,rtn:2,rtn:3,rtn:4,rtn:8,efficient_qat:2,awq:4,spinquant:4,smoothquant:8,smoothquant:4,"
    "quip:2,slim_llm:2,db_llm:2,billm:1.1,nf4:4,pb_llm:1.7"
)
SHAPES, BATCHES = "4096x4096,14336x4096,4096x14336", "1,4,8,64,512"
COLD_BYTES = 128 << 20


class Result(NamedTuple):
    """Milliseconds of both, least and median, and how many times as fast the packed linear is."""

    dense: float
    packed: float
    ratio: float
    ratio_of_medians: float


def random_packed(method: Method, out_features: int, in_features: int) -> Packed:
    """Random bits in the method's layout, but for what must make sense: seeds, widths, masks of a
    known size.
    """
    random, packed = torch.Generator().manual_seed(0), {}
    for name, spec in method.layout(out_features, in_features).items():
        if name == "widths":
            cycle = torch.tensor([0, -1, 0, 1]) + int(method.bits)
            packed[name] = cycle.repeat(-(-spec.shape[0] // 4))[: spec.shape[0]].to(spec.dtype)
        elif spec.dtype.is_floating_point:
            packed[name] = (torch.rand(spec.shape, generator=random) * 0.01 + 0.01).to(spec.dtype)
        else:
            packed[name] = torch.randint(0, 2**31 - 1, spec.shape, generator=random).to(spec.dtype)
    if "position" in packed:  # a list of positions: only one that belongs to a mask can be read
        positions = method._positions(out_features, in_features)  # type: ignore[attr-defined]
        mask_N = torch.zeros(positions.total, dtype=torch.bool)
        mask_N[torch.randperm(positions.total, generator=random)[: positions.count]] = True
        packed.update(positions.pack(mask_N))
    return packed


@torch.inference_mode()
def measure(
    method: Method, out_features: int, in_features: int, tokens: int, rounds: int = 9
) -> Result:
    """`method`'s linear [out_features, in_features] on `tokens` random bf16 activations beside the
    dense one.
    """
    packs, dense = _packs(method, out_features, in_features), _dense(out_features, in_features)
    x_TI = torch.randn(tokens, in_features).bfloat16()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        pack, weight_OI = packs[i % len(packs)], dense[i % len(dense)]
        seconds = (
            _seconds(lambda w=weight_OI: F.linear(x_TI, w)),  # type: ignore[misc]
            _seconds(lambda p=pack: method.linear(x_TI, p, None, out_features)),  # type: ignore[misc]
        )
        if i:  # the first one finds code and tables cold
            for list_, value in zip(times, seconds, strict=True):
                list_.append(1e3 * value)
    least, middle = [min(t) for t in times], [statistics.median(t) for t in times]
    return Result(least[0], least[1], least[0] / least[1], middle[0] / middle[1])


@lru_cache(maxsize=1)
def _packs(method: Method, out_features: int, in_features: int) -> list[Packed]:
    first = random_packed(method, out_features, in_features)
    copies = _copies(sum(t.numel() * t.element_size() for t in first.values()))
    packs = [
        CachedTensors({name: t.clone() for name, t in first.items()}) for _ in range(copies)
    ]  # as a QuantLinear holds it
    for pack in packs:  # what is found out once about a weight is no part of a product
        method.linear(torch.zeros(1, in_features).bfloat16(), pack, None, out_features)
    return packs  # type: ignore[return-value]


@lru_cache(maxsize=1)
def _dense(out_features: int, in_features: int) -> list[Tensor]:
    weight_OI = torch.randn(out_features, in_features).bfloat16()
    return [weight_OI.clone() for _ in range(_copies(out_features * in_features * 2))]


def _copies(nbytes: int) -> int:
    return max(2, math.ceil(COLD_BYTES / nbytes))


def _seconds(work: Callable[[], Tensor]) -> float:
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    work()
    return now() - started


def rows(
    methods: str, shapes: str, batches: str, rounds: int
) -> Iterator[tuple[str, str, list[Result]]]:
    """(method and bits, shape, results by batch), one row of the table after the other."""
    for shape in shapes.split(","):
        out_features, in_features = map(int, shape.split("x"))
        for named in methods.split(","):
            method, called = _method(named)
            yield (
                called,
                shape,
                [
                    measure(method, out_features, in_features, int(b), rounds)
                    for b in batches.split(",")
                ],
            )


def _method(named: str) -> tuple[Method, str]:
    """The method of name:bits[:group], and how the table calls it."""
    name, bits, *group = named.split(":")
    options = {"group_size": -1 if group == ["row"] else int(group[0])} if group else {}
    called = f"{name}, {bits} bits" + "".join(f", groups of {size}" for size in group)
    return build(name, bits=float(bits) if "." in bits else int(bits), **options), called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    said = (
        f"x times bf16 F.linear, least of {args.rounds} (ratio of medians); threads: {args.threads}"
    )
    print(f"{said}; packed weights: {describe()}\n")
    print("| method | shape | " + " | ".join(f"batch {b}" for b in args.batches.split(",")) + " |")
    print("|---|---|" + "---|" * len(args.batches.split(",")))
    for name, shape, results in rows(args.methods, args.shapes, args.batches, args.rounds):
        cells = [f"{r.ratio:.2f} ({r.ratio_of_medians:.2f})" for r in results]
        print(f"| {name} | {shape} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
