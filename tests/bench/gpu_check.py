"""Checks and measures llq-hf on a real GPU in at most ten minutes, the most important first.

    python tests/bench/gpu_check.py --out model_cards/gpu [--seconds 540] [--only kernels,block]

It needs torch, triton, transformers and numpy, and nothing from a registry. A JSON record is
rewritten after every piece of work; what failed is in it with its error.

    machine     the card, its bandwidth, what a launch costs
    tiles       products of few tokens with other tiles than `few.tile` chooses
    kernels     every method's linear beside bf16 F.linear, on cold weights, in a CUDA graph: errors
                and speed at 1, 8, 16 and 2048 tokens
    decode      a whole decoding step of blocks in LLaMA-3-8B's shape in a CUDA graph, beside bf16
    solver      GPTQ's loop by torch and by the kernel
    block       one block of that shape by every method: seconds and peak memory
    discipline  a small block by every method on the CPU, the GPU and the GPU again: equal weights,
                the same bytes twice, no sync in decoding
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("LLQ_CPU_ISA", "none")  # the reference is torch
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
from kernel_speed import random_packed
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf.kernels import CachedTensors, reference
from llq_hf.methods import build

STUDY: dict[str, float] = {
    "rtn": 4, "gptq": 4, "awq": 4, "smoothquant": 8, "omniquant": 4, "spinquant": 4, "quip": 2,
    "slim_llm": 2, "db_llm": 2, "efficient_qat": 2, "pb_llm": 1.7, "nf4": 4, "billm": 1.1,
    "hybrid": 3.0,
}  # fmt: skip
# Trainings and searches as short as they can be: the check is of devices, not of quality.
SHORT: dict[str, dict[str, Any]] = {
    "omniquant": {"epochs": 1},
    "db_llm": {"steps": 2},
    "efficient_qat": {"tune_batch": 4, "epochs": 1},
    "hybrid": {"candidates": "rtn:2+rtn:4", "samples": 2},
}
BEST = ("gptq", "rtn", "awq", "slim_llm")  # whose preset=best is checked too
LINEARS: list[tuple[str, dict[str, Any]]] = [
    *(("rtn", {"bits": bits}) for bits in (4, 3, 2, 8, 1)),
    ("rtn", {"bits": 4, "group_size": 32}),
    ("efficient_qat", {"bits": 2}),
    ("awq", {"bits": 4}),
    ("spinquant", {"bits": 4}),
    ("quip", {"bits": 2}),
    ("smoothquant", {"bits": 8}),
    ("nf4", {"bits": 4}),
    ("slim_llm", {"bits": 2}),
    ("db_llm", {"bits": 2}),
    ("billm", {}),
    ("pb_llm", {"bits": 1.7}),
]
TILED = [case for case in LINEARS if case[0] in ("rtn", "efficient_qat", "nf4", "db_llm", "billm")]
DECODED = [*LINEARS[:3], ("quip", {"bits": 2}), ("nf4", {"bits": 4}), ("billm", {})]
FEWER = ("rtn", "quip", "nf4", "billm")  # methods whose linears are timed in every shape
COLD_BYTES = 240 << 20  # more than any cache holds
DEVICE = torch.device("cuda:0")

began = time.monotonic()
found: dict[str, Any] = {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("model_cards/gpu"), help="folder of the record"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="stop beginning work after these"
    )
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="of linears")
    parser.add_argument(
        "--workers", type=int, default=14, help="processes that compile kernels first"
    )
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def keep(out: Path, path: str, value: Any) -> None:
    node = found
    *folders, last = path.split("/")
    for part in folders:
        node = node.setdefault(part, {})
    node[last] = value
    name = found.get("machine", {}).get("card", "gpu").lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def tried(args: argparse.Namespace, path: str, work: Callable[[], Any], need: float = 5) -> None:
    """Keep what `work` returns, or its error; nothing where fewer than `need` seconds are left."""
    left = args.seconds - (time.monotonic() - began)
    if left < need:
        return keep(args.out, path, "not run: no time was left")
    start = time.monotonic()
    try:
        value = work()
    except Exception as error:
        at = traceback.format_exc().strip().splitlines()[-5:]
        value = {"error": f"{type(error).__name__}: {error}"[:400], "at": at}
        if "CUDA error" in str(error):
            keep(args.out, path, value)
            sys.exit(f"{path}: {error}")  # the context is gone
    keep(args.out, path, value)
    print(f"{path} ({time.monotonic() - start:.1f} s): {str(value)[:600]}", flush=True)


# --- timing ---------------------------------------------------------------------------------------


def in_a_graph(work: Callable[[int], Any], count: int, repeats: int = 9) -> float:
    """Median microseconds of a call work(0 .. count - 1), all in one CUDA graph."""
    for i in range(min(count, 2)):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    return timed(graph.replay, repeats) / count


def timed(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median microseconds of a call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1000)
    return statistics.median(times)


def copies(nbytes: int) -> int:
    return max(4, min(96, -(-COLD_BYTES // nbytes)))


def error_of(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


_dense_times: dict[tuple[int, int, int], float] = {}


def dense_time(rows: int, columns: int, tokens: int) -> float:
    """Microseconds of bf16 F.linear on cold weights."""
    key = rows, columns, tokens
    if key not in _dense_times:
        count = copies(2 * rows * columns)
        weights = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(count)]
        x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
        _dense_times[key] = in_a_graph(lambda i: F.linear(x, weights[i]), count)
    return _dense_times[key]


# --- stages ---------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    import transformers
    import triton

    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    tiny = torch.zeros(8, device=DEVICE)
    return {
        "card": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "copy TB/s": round(2 * a.nbytes / timed(lambda: b.copy_(a)) / 1e6, 2),
        "launch in a graph, us": round(in_a_graph(lambda i: tiny.add_(1), 200), 2),
    }


class Linear:
    """A method's linear with random codes, and as many cold copies as no cache holds."""

    def __init__(self, name: str, options: dict[str, Any], rows: int, columns: int) -> None:
        self.method, self.rows = build(name, **options), rows
        packed = random_packed(self.method, rows, columns)
        self.first = CachedTensors({key: tensor.to(DEVICE) for key, tensor in packed.items()})
        self.nbytes = sum(tensor.nbytes for tensor in packed.values())
        self.bits = 8 * self.nbytes / rows / columns

    def cold(self) -> list[CachedTensors]:
        def again() -> CachedTensors:
            return CachedTensors({key: tensor.clone() for key, tensor in self.first.items()})

        return [self.first, *(again() for _ in range(copies(self.nbytes) - 1))]

    def multiply(self, x: Tensor, packed: CachedTensors) -> Tensor:
        return self.method.linear(x, packed, None, self.rows)

    def by_torch(self, x: Tensor) -> Tensor:
        with reference():
            return self.multiply(x, CachedTensors(dict(self.first)))


@torch.inference_mode()
def kernels(name: str, options: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    linear = Linear(name, options, rows, columns)
    packs = linear.cold()
    row: dict[str, Any] = {"stored bits": round(linear.bits, 3)}
    for tokens in (1, 8, 16, 2048):
        x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
        expected = linear.by_torch(x.float() if tokens <= 16 else x).double()
        row[f"error, {tokens}"] = float(f"{error_of(linear.multiply(x, packs[0]), expected):.1e}")
        few = packs[:4] if tokens > 16 else packs
        for packed in few:
            linear.multiply(x, packed)  # what is computed once for a weight
        ours = in_a_graph(lambda i, x=x, few=few: linear.multiply(x, few[i]), len(few))
        dense = dense_time(rows, columns, tokens)
        row[f"us, {tokens}"] = round(ours, 2)
        row[f"times bf16, {tokens}"] = round(dense / ours, 2)
    return row


@contextmanager
def tile_of(tile: tuple[int, int] | None) -> Iterator[None]:
    """Inside, all few-token kernels use this tile; None: the one that they choose."""
    from llq_hf.kernels.gpu import few

    chosen = few.tile
    if tile is not None:
        few.tile = lambda *shape, **more: few.Tile(*tile)
    try:
        yield
    finally:
        few.tile = chosen


@torch.inference_mode()
def tiles(name: str, options: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    linear = Linear(name, options, rows, columns)
    packs = linear.cold()
    row: dict[str, Any] = {}
    for tokens in (1, 8):
        x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
        dense, times = dense_time(rows, columns, tokens), {}
        for tile in TILES:
            with tile_of(tile):
                for packed in packs:
                    linear.multiply(x, packed)
                times[tile] = in_a_graph(lambda i, x=x: linear.multiply(x, packs[i]), len(packs), 5)
        best = sorted(times, key=lambda tile: times[tile])
        row[f"{tokens} tokens"] = " ".join(f"{tile}:{dense / times[tile]:.2f}" for tile in best)
    return row


TILES = [(16, 4), (16, 8), (32, 4), (32, 8), (16, 16)]


def llama(hidden: int, ffn: int, layers: int = 1, attention: str = "eager") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    head = 64 if hidden < 4096 else 128
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        vocab_size=256,
        head_dim=head,
        num_attention_heads=hidden // head,
        num_key_value_heads=max(hidden // head // 4, 1),
        attn_implementation=attention,
    )
    model: nn.Module = LlamaForCausalLM(config).bfloat16().eval()
    return model


def token_ids(count: int, length: int) -> Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(1))


def method_of(name: str, preset: str) -> Any:
    return build(name, preset, **{"bits": STUDY[name], **SHORT.get(name, {})})


def packed_linears(model: nn.Module) -> dict[str, Any]:
    from llq_hf.layers.linear import QuantLinear

    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def discipline(name: str, preset: str) -> dict[str, Any]:
    from llq_hf.engine.in_memory import quantize_model

    models, records = [], []
    for device in (torch.device("cpu"), DEVICE, DEVICE):
        model = llama(256, 512).to(device)
        records.append(quantize_model(model, method_of(name, preset), token_ids(8, 64)))
        models.append(packed_linears(model))
    equal, same_twice, synced, decoded = [], True, [], 0.0
    for linear_name, linear in models[1].items():
        on_cpu, again = models[0][linear_name], models[2][linear_name]
        equal.append(float((linear.dequantized().cpu() == on_cpu.dequantized()).float().mean()))
        same_twice &= all(torch.equal(t, again.packed()[k]) for k, t in linear.packed().items())
        packed = CachedTensors({k: t.to(DEVICE) for k, t in on_cpu.packed().items()})
        x = torch.randn(1, linear.in_features, device=DEVICE).bfloat16()
        with torch.no_grad():
            y = linear.method.linear(x, packed, None, linear.out_features)
            with reference():
                expected = on_cpu.method.linear(x.cpu(), on_cpu.packed(), None, linear.out_features)
            decoded = max(decoded, error_of(y.cpu(), expected.double()))
            torch.cuda.set_sync_debug_mode("error")
            try:
                linear.method.linear(x, packed, None, linear.out_features)
            except RuntimeError as error:
                synced.append(f"{linear_name}: {error}"[:120])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    pairs = list(zip(records[1], records[0], strict=True))
    worse = {
        key: round(max(abs(a[key] / max(b[key], 1e-12) - 1) for a, b in pairs), 4)
        for key in ("weight_error", "output_error")
        if key in records[0][0]
    }
    return {
        "weights equal to the CPU's": round(statistics.mean(equal), 4),
        "errors differ by": worse,
        "same bytes twice": same_twice,
        "a decoded product differs by": float(f"{decoded:.1e}"),
        "syncs in decoding": synced,
    }


@torch.no_grad()  # not inference_mode: what is computed once for a weight is kept by its version
def decode(name: str, options: dict[str, Any], layers: int = 4) -> dict[str, Any]:
    """One token through blocks in LLaMA-3-8B's shape with a static cache of 512 tokens."""
    from transformers import StaticCache

    from llq_hf.layers.linear import QuantLinear

    model = llama(4096, 14336, layers, "sdpa").to(DEVICE)
    times = {}
    for kind in ("bf16", "packed"):
        if kind == "packed":
            method = build(name, **options)
            for path, linear in list(model.model.layers.named_modules()):
                if isinstance(linear, nn.Linear):
                    own = method.for_linear(path)
                    packed = random_packed(own, linear.out_features, linear.in_features)
                    packed = {key: tensor.to(DEVICE) for key, tensor in packed.items()}
                    parent, _, last = path.rpartition(".")
                    replacement = QuantLinear.from_packed(own, linear, packed)
                    setattr(model.model.layers.get_submodule(parent), last, replacement)
        cache = StaticCache(config=model.config, max_cache_len=512)
        ids = torch.randint(256, (1, 1), device=DEVICE)
        place = torch.tensor([300], device=DEVICE)

        def step(model=model, ids=ids, cache=cache, place=place) -> Tensor:
            hidden = model.model(
                ids, past_key_values=cache, cache_position=place, position_ids=place[None]
            )
            return hidden.last_hidden_state

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times[kind] = timed(graph.replay, 21) / layers
    return {
        "bf16, us a block": round(times["bf16"], 1),
        "packed, us a block": round(times["packed"], 1),
        "times bf16": round(times["bf16"] / times["packed"], 2),
    }


def solver(rows: int, columns: int) -> dict[str, Any]:
    from llq_hf.numerics import error_feedback
    from llq_hf.numerics.cholesky import factorize
    from llq_hf.numerics.grids import Uniform

    W_OI = torch.randn(rows, columns, device=DEVICE)
    X_TI = torch.randn(2 * columns, columns, device=DEVICE)
    H_II = X_TI.T @ X_TI / len(X_TI)
    U_II = factorize(H_II, 0.01, {}, inverse=True, quick=True)
    uniform, group_I = Uniform(4, 128), torch.arange(columns, device=DEVICE) // 128
    row, codes = {}, {}
    for kind in ("kernel", "torch"):
        os.environ["LLQ_GPU"] = "all" if kind == "kernel" else "none"
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.monotonic()
            codes[kind] = error_feedback.solve(W_OI.clone(), U_II, uniform, group_I).codes_OI
            torch.cuda.synchronize()
            row[f"{kind}, s"] = round(time.monotonic() - start, 4)
    os.environ["LLQ_GPU"] = "all"
    row["equal codes"] = float((codes["kernel"] == codes["torch"]).float().mean())
    return row


def block(name: str, preset: str, samples: int = 16, length: int = 512) -> dict[str, Any]:
    from llq_hf.engine.in_memory import quantize_model

    model = llama(4096, 14336, attention="sdpa").to(DEVICE)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    records = quantize_model(model, method_of(name, preset), token_ids(samples, length))
    torch.cuda.synchronize()
    return {
        "tokens": f"{samples} x {length}",
        "seconds": round(time.monotonic() - start, 2),
        "peak GB beyond the model": round((torch.cuda.max_memory_allocated() - base) / 1e9, 2),
        "output error": records[0].get("output_error"),
        "fallbacks": sum("fallback" in record for record in records),
    }


# --- all of it ------------------------------------------------------------------------------------


def label(name: str, options: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])


def works(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "machine", machine
    for rows, columns in shapes:
        for name, options in TILED:
            yield (
                f"tiles/{rows}x{columns}/{label(name, options)}",
                lambda n=name, o=options, r=rows, c=columns: tiles(n, o, r, c),
            )
    for rows, columns in shapes:
        for name, options in LINEARS:
            if (rows, columns) == shapes[0] or name in FEWER:
                yield (
                    f"kernels/{rows}x{columns}/{label(name, options)}",
                    lambda n=name, o=options, r=rows, c=columns: kernels(n, o, r, c),
                )
    for name, options in DECODED:
        yield f"decode/{label(name, options)}", lambda n=name, o=options: decode(n, o)
    for rows, columns in shapes:
        yield f"solver/{rows}x{columns}", lambda r=rows, c=columns: solver(r, c)
    yield "block/gptq study, 128 x 2048", lambda: block("gptq", "study", 128, 2048)
    for preset, names in (("study", tuple(STUDY)), ("best", BEST)):
        for name in names:
            if name != "hybrid":
                yield f"block/{name} {preset}", lambda n=name, p=preset: block(n, p)
    for preset, names in (("study", tuple(STUDY)), ("best", BEST)):
        for name in names:
            yield f"discipline/{name} {preset}", lambda n=name, p=preset: discipline(n, p)


@torch.inference_mode()
def compile_part(part: int, parts: int, with_tiles: bool) -> None:
    """Call every kernel that will be timed once, so that it is compiled into Triton's cache."""
    rows, columns = 4096, 4096  # the other shapes use the same kernels
    for name, options in LINEARS[part::parts]:
        try:
            linear = Linear(name, options, rows, columns)
            for tokens in (1, 8, 16, 2048):
                x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
                for tile in [None, *(TILES if with_tiles and tokens in (1, 8) else ())]:
                    with tile_of(tile):
                        linear.multiply(x, linear.first)
        except Exception as error:
            print(f"compiling {label(name, options)}: {type(error).__name__}: {error}"[:400])


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    stages = set(filter(None, args.only.split(",")))
    if args.compile:
        part, parts = map(int, args.compile.split("/"))
        return compile_part(part, parts, not stages or "tiles" in stages)
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA device, and there is none")
    if not stages or stages & {"kernels", "tiles"}:
        command = [sys.executable, __file__, "--only", args.only, "--compile"]
        workers = [subprocess.Popen([*command, f"{i}/{args.workers}"]) for i in range(args.workers)]
        for worker in workers:
            worker.wait()
        print(f"compiled: {time.monotonic() - began:.0f} s", flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    for path, work in works(shapes):
        if not stages or path.split("/")[0] in stages or path == "machine":
            tried(args, path, work)
    keep(args.out, "seconds", round(time.monotonic() - began))


main()
