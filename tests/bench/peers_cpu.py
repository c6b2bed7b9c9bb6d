"""Measures one packed linear on a CPU beside what a user could pick instead, all in one run.

    python tests/bench/peers_cpu.py [--ort /path/of/python] [--shapes 4096x4096,1536x576]
        [--bits 2,3,4,8] [--groups 32,64,128,row] [--tokens 1] [--rounds 40] [--threads 1]

Contenders: llq (random codes, asymmetric, the whole linear), bf16 F.linear, torch's int4pack, and
ONNX Runtime's MatMulNBits with accuracy level 4 where --ort names a Python that has onnx and
onnxruntime (an environment of its own, as it needs another numpy). Contenders take turns call by
call, ONNX Runtime in a process of its own; the weights rotate over 64 MB, at most 32 copies. The
least of all rounds counts: the thread's own seconds with one thread, and the clock's beside them.

llama.cpp is missing: its wheels that can be installed (xllamacpp) are built for AVX2 alone, and
multiply no single matrix.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

COLD_BYTES, MOST_COPIES = 64 << 20, 32
SHAPES = "4096x4096,14336x4096,4096x14336,1536x576"


class Case(NamedTuple):
    """A product [tokens, columns] x [rows, columns]; group -1: a row."""

    rows: int
    columns: int
    bits: int
    group: int
    tokens: int
    threads: int

    @property
    def copies(self) -> int:
        nbytes = self.rows * self.columns * self.bits // 8
        return min(MOST_COPIES, max(2, math.ceil(COLD_BYTES / nbytes)))


class Seconds(NamedTuple):
    thread: float
    wall: float


class Contender(Protocol):
    """Multiplies once, and says how long it took."""

    def __call__(self) -> Seconds: ...


def timed(work: Callable[[], Any]) -> Seconds:
    started = time.thread_time(), time.perf_counter()
    work()
    return Seconds(time.thread_time() - started[0], time.perf_counter() - started[1])


def rotating(works: list[Callable[[], Any]]) -> Contender:
    for work in works:  # what is found out once about a weight is no part of a product
        work()
    turn = iter(range(1 << 62))
    return lambda: timed(works[next(turn) % len(works)])


# --- contenders of this process -------------------------------------------------------------------


def llq(case: Case) -> Contender | None:
    from kernel_speed import random_packed

    from llq_hf.kernels import CachedTensors
    from llq_hf.methods import build

    method = build("rtn", bits=case.bits, group_size=case.group)
    first = random_packed(method, case.rows, case.columns)
    packs = [
        CachedTensors({name: t.clone() for name, t in first.items()}) for _ in range(case.copies)
    ]
    x_TI = activations(case)
    return rotating([lambda p=p: method.linear(x_TI, p, None, case.rows) for p in packs])  # type: ignore[misc]


def bf16(case: Case) -> Contender | None:
    import torch
    from torch.nn import functional as F

    weight_OI = torch.randn(case.rows, case.columns).bfloat16()
    copies = max(2, math.ceil(COLD_BYTES / weight_OI.nbytes))
    weights, x_TI = [weight_OI.clone() for _ in range(min(copies, MOST_COPIES))], activations(case)
    return rotating([lambda w=w: F.linear(x_TI, w) for w in weights])  # type: ignore[misc]


def int4pack(case: Case) -> Contender | None:
    import torch

    if case.bits != 4 or case.group not in (32, 64, 128) or case.columns % case.group:
        return None
    codes_OI = torch.randint(0, 16, (case.rows, case.columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 2)
    grid = torch.rand(case.columns // case.group, case.rows, 2).bfloat16()
    copies, x_TI = [(packed.clone(), grid.clone()) for _ in range(case.copies)], activations(case)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return rotating([lambda p=p, g=g: multiply(x_TI, p, case.group, g) for p, g in copies])  # type: ignore[misc]


def activations(case: Case) -> Any:
    import torch

    return torch.randn(case.tokens, case.columns).bfloat16()


# --- ONNX Runtime, in its own process -------------------------------------------------------------


class Child:
    """ONNX Runtime by another Python: a line with a case, then a line for each call."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--child"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, case: Case) -> Contender | None:
        if case.bits not in (2, 4, 8) or case.group < 16:
            return None
        problem = self._ask(case._asdict())
        if problem is not None:
            print(f"ONNX Runtime, {case}: {problem}", file=sys.stderr)
            return None
        return lambda: Seconds(*self._ask("run"))

    def _ask(self, what: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(what), file=stdin, flush=True)
        return json.loads(stdout.readline())


def child() -> None:
    """Answer the lines of `Child`."""
    contender: Contender | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "run":
            assert contender is not None
            print(json.dumps(contender()), flush=True)
            continue
        try:
            contender, problem = onnx_runtime(Case(**asked)), None
        except Exception as error:  # the parent prints it, and goes on without
            problem = str(error)[:300]
        print(json.dumps(problem), flush=True)


def onnx_runtime(case: Case) -> Contender:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng, blocks = np.random.default_rng(0), -(-case.columns // case.group)
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    x_TI = rng.standard_normal((case.tokens, case.columns), dtype=np.float32)
    sessions = []
    for _ in range(case.copies):
        shape = (case.rows, blocks, case.group * case.bits // 8)
        zeros = case.rows * -(-blocks * case.bits // 8)
        tensors = {
            "B": rng.integers(0, 256, shape, dtype=np.uint8),
            "scales": rng.random(case.rows * blocks, dtype=np.float32) * 0.01 + 0.01,
            "zeros": rng.integers(0, 256, zeros, dtype=np.uint8),
        }
        node = helper.make_node(
            "MatMulNBits",
            ["A", *tensors],
            ["Y"],
            domain="com.microsoft",
            K=case.columns,
            N=case.rows,
            bits=case.bits,
            block_size=case.group,
            accuracy_level=4,
        )
        described = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.tokens, size])
            for name, size in (("A", case.columns), ("Y", case.rows))
        ]
        graph = helper.make_graph(
            [node],
            "g",
            described[:1],
            described[1:],
            [numpy_helper.from_array(array, name) for name, array in tensors.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        serialized = model.SerializeToString()
        sessions.append(
            ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        )
    return rotating([lambda s=s: s.run(None, {"A": x_TI}) for s in sessions])  # type: ignore[misc]


# --- the run --------------------------------------------------------------------------------------


def least(contenders: dict[str, Contender], rounds: int) -> dict[str, Seconds]:
    """The least seconds of each, taking turns."""
    found = {name: Seconds(math.inf, math.inf) for name in contenders}
    for i in range(rounds + 2):
        for name, contender in contenders.items():
            now = contender()
            if i >= 2:  # the first find code and tables cold
                found[name] = Seconds(*map(min, found[name], now))
    return found


def row(case: Case, found: dict[str, Seconds], names: list[str]) -> str:
    """Milliseconds of the thread and of the clock, and the speed of llq against the best other."""
    # Where more threads work, the calling one's seconds say little.
    seconds = {name: s.thread if case.threads == 1 else s.wall for name, s in found.items()}
    peers = [value for name, value in seconds.items() if name not in ("llq", "bf16")]
    cells = [
        f"{1e3 * found[name].thread:.3f} ({1e3 * found[name].wall:.3f})" if name in found else ""
        for name in names
    ]
    best = f"{min(peers) / seconds['llq']:.2f}" if peers else ""
    of_bf16 = f"{seconds['bf16'] / seconds['llq']:.2f}"
    group = "row" if case.group == -1 else str(case.group)
    what = [f"{case.rows} x {case.columns}", str(case.bits), group, str(case.tokens)]
    return "| " + " | ".join([*what, *cells, of_bf16, best]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ort", help="a Python with onnx and onnxruntime")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--groups", default="32,64,128,row")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return
    import torch

    torch.set_num_threads(args.threads)
    makers: dict[str, Callable[[Case], Contender | None]] = {
        "bf16": bf16,
        "llq": llq,
        "int4pack": int4pack,
    }
    if args.ort:
        makers["ONNX Runtime"] = Child(args.ort)
    names = list(makers)
    print(f"ms of the thread (of the clock), least of {args.rounds}; threads: {args.threads}\n")
    head = ["shape", "bits", "group", "tokens", *names, "llq : bf16", "llq : best other"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            rows_, columns = map(int, shape.split("x"))
            for bits in map(int, args.bits.split(",")):
                for group in (-1 if g == "row" else int(g) for g in args.groups.split(",")):
                    for tokens in map(int, args.tokens.split(",")):
                        case = Case(rows_, columns, bits, group, tokens, args.threads)
                        made = {name: make(case) for name, make in makers.items()}
                        found = least({n: c for n, c in made.items() if c}, args.rounds)
                        print(row(case, found, names), flush=True)


if __name__ == "__main__":
    main()
