"""Measures methods on a pretended GPU and compares with the ceilings. Functions that raise
AssertionError; the fault tests call them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from contract import checks as contract
from device.ceilings import Costs, Decoder, Solver
from device.pretended import Events, Far, PretendedGPU, exact_attention, near
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels import reference
from llq_hf.kernels.gpu import ready
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Method

GPU = "cuda:0"
HIDDEN, NARROW, WIDE = 32, 128, 256  # columns of the narrow and the wide down_proj
OUT, IN = 64, 512  # of the linear that decodes
VOCAB = 64
TIES = 0.05  # share of stored numbers that may differ, as kernels round other sums

# Cached values serve all tests of a process: tests must not change them.


@cache
def ids() -> Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


def llama(ffn: int = NARROW, layers: int = 1) -> Any:
    """A random Llama in bf16. The same numbers at each call."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


def packed_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def spread(model: Any) -> Any:
    """Lay the model out over two GPUs, as device_map does: the second block and what follows it go
    to the second GPU.
    """
    first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    places = {name: "cuda:0" for name in first}
    places |= {name: "cuda:1" for name in ("model.layers.1", "model.norm", "lm_head")}
    return dispatch_model(model, places, main_device="cuda:0")


def ours(events: Events) -> Events:
    """What transformers does not do by itself."""
    return Events({key: n for key, n in events.items() if not key[1].startswith("transformers/")})


def most(events: Events, count: int = 5) -> str:
    """The operations that cost most, with their lines."""
    return ", ".join(f"{n} x {name} in {line}" for (name, line), n in events.most_common(count))


def check_below(costs: Costs, measured: Mapping[str, float], words: str) -> None:
    """AssertionError where a number is above its ceiling. words: what it is made of."""
    above = [
        f"{name}: measured {value:g}, ceiling {getattr(costs, name):g}"
        for name, value in measured.items()
        if value > getattr(costs, name)
    ]
    assert not above, f"{costs} costs more on a GPU: {'; '.join(above)}. It has {words}"


def check_same(far: Mapping[str, Tensor], cpu: Mapping[str, Tensor], differing: float = 0) -> None:
    """The tensors lie on a GPU, and are the CPU's to the last bit, but for a share `differing`."""
    assert far.keys() == cpu.keys()
    for name, tensor in far.items():
        assert isinstance(tensor, Far), f"{name} was left on the CPU"
        other = (near(tensor) != cpu[name]).float().mean()
        assert other <= differing, f"{name} is not what it is on a CPU"


@contextmanager
def kernels() -> Iterator[None]:
    """Within the context, the kernels of GPUs serve where they fit."""
    if (ready.triton_version() or (0, 0)) < ready.OLDEST_GLUON:
        pytest.skip("without Triton 3.6 or newer not all kernels serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready, "problem", lambda: None)
        yield


# --- quantizing -----------------------------------------------------------------------------------


def uniform_block(
    w_OI: Tensor, u_II: Tensor, drift_II: Tensor, scale_BO: Tensor, zero_BO: Tensor,
    mean_BO: Tensor, codes_IO: Tensor, error_OB: Tensor, before_OB: Tensor, start: int, size: int,
    *rest: Any, HALVES: bool, MEANS: bool, DRIFT: bool, **constants: int,
) -> None:  # fmt: skip
    """What the kernel of this name computes (kernels/gpu/solve.py)."""
    top = rest[-1]
    later_OB = w_OI[:, start : start + size].clone()
    for i in range(size):
        w_O, scale_O, zero_O = later_OB[:, i].clone(), scale_BO[i], zero_BO[i]
        mean_O = mean_BO[i] if MEANS else torch.zeros_like(zero_O)
        whole_O = zero_O.floor() if MEANS else zero_O + 0.5 if HALVES else zero_O
        code_O = ((w_O - mean_O) / scale_O + (zero_O - whole_O)).round() + whole_O
        code_O = code_O.clamp(0, top)
        codes_IO[start + i] = code_O.to(torch.uint8)
        before_OB[:, i] = w_O
        value_O = scale_O * (code_O - zero_O) + mean_O
        error_OB[:, i] = (w_O - value_O) / u_II[start + i, start + i]
        columns = slice(start + i + 1, start + size)
        later_OB[:, i + 1 :] -= error_OB[:, i, None] * u_II[start + i, columns]
        if DRIFT:
            later_OB[:, i + 1 :] += w_O[:, None] * drift_II[start + i, columns]


def backward_block(
    sums_OB: Tensor, target_OI: Tensor, matrix_II: Tensor, codes_OI: Tensor, error_OI: Tensor,
    start: int, size: int, *rest: Any, GREEDY: bool, **constants: int,
) -> None:  # fmt: skip
    """What the kernel of this name computes (kernels/gpu/solve.py)."""
    top = rest[-1]
    for i in range(start + size - 1, start - 1, -1):
        sum_O, old_O = sums_OB[:, i - start].clone(), codes_OI[:, i].clone()
        if GREEDY:
            codes_OI[:, i] = (old_O - sum_O / matrix_II[i, i]).round().clamp(0, top)
            change_O = codes_OI[:, i] - old_O
            error_OI[:, i] += change_O
        else:
            codes_OI[:, i] = (sum_O + 0.5).floor().clamp(0, top)
            error_OI[:, i] = change_O = target_OI[:, i] - codes_OI[:, i]
        sums_OB += change_O[:, None] * matrix_II[i, start : start + size]


def descend_block(
    gradient_IO: Tensor, values_IO: Tensor, matrix_II: Tensor, scale_IO: Tensor, zero_IO: Tensor,
    codes_IO: Tensor, moved_BO: Tensor, start: int, size: int, *rest: Any, HALVES: bool,
    **constants: int,
) -> None:  # fmt: skip
    """What the kernel of this name computes (kernels/gpu/solve.py)."""
    top, half = rest[-1], 0.5 if HALVES else 0.0
    for j in range(start, start + size):
        wanted_O = values_IO[j] - gradient_IO[j] / matrix_II[j, j]
        code_O = ((wanted_O / scale_IO[j] - half).round() + (zero_IO[j] + half)).clamp(0, top)
        codes_IO[j] = code_O.to(torch.uint8)
        value_O = scale_IO[j] * (code_O - zero_IO[j])
        moved_BO[j - start] = value_O - values_IO[j]
        later = slice(j + 1, start + size)
        gradient_IO[later] += matrix_II[j, later, None] * moved_BO[j - start]
        values_IO[j] = value_O


STAND_INS = {
    "uniform_block": uniform_block,
    "backward_block": backward_block,
    "descend_block": descend_block,
}


@exact_attention()
def quantized(solver: Solver, ffn: int) -> tuple[Any, PretendedGPU]:
    """A block that was quantized in memory on a pretended GPU, and what that GPU counted."""
    model = llama(ffn)
    serving = kernels() if solver.kernels else nullcontext()
    with serving, PretendedGPU(STAND_INS) as gpu:
        model.to(GPU)
        gpu.reset()
        quantize_model(model, solver.build(), ids())
    return model, gpu


def solver_costs(solver: Solver) -> tuple[dict[str, float], str]:
    """What a `Solver` limits, and where most of it is spent."""
    narrow, wide = (quantized(solver, ffn)[1] for ffn in (NARROW, WIDE))
    return compared(narrow, wide)


def compared(narrow: PretendedGPU, wide: PretendedGPU) -> tuple[dict[str, float], str]:
    more = Events(wide.launches)
    more.subtract(narrow.launches)
    measured = {
        "column": more.total() / (WIDE - NARROW),
        "block": narrow.launches.total(),
        "syncs": wide.syncs.total(),
        "uploads": wide.uploads.total(),
    }
    words = (
        f"by wider linears: {most(more)}; in a block: {most(narrow.launches)}; "
        f"syncs: {most(wide.syncs)}; uploads: {most(wide.uploads)}"
    )
    return measured, words


@exact_attention()
def check_quantizing(solver: Solver) -> None:
    """The method keeps the ceilings, draws nothing on the GPU, and gives the CPU's bytes; with
    kernels all but some of them.
    """
    cpu, narrow = llama(WIDE), quantized(solver, NARROW)[1]
    quantize_model(cpu, solver.build(), ids())
    far, wide = quantized(solver, WIDE)
    check_same(packed_tensors(far), packed_tensors(cpu), TIES if solver.kernels else 0)
    assert not wide.random, f"a GPU draws other numbers than a CPU: {most(wide.random)}"
    assert wide.faults == [], "an error of the GPU was caught by somebody"
    check_below(solver, *compared(narrow, wide))


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": getattr(linear, key)
        for name, linear in packed_linears(model).items()
        for key in linear.layout
    }


# --- decoding -------------------------------------------------------------------------------------


@cache
def packed_linear(method: Method) -> QuantLinear:
    """A linear [OUT, IN] that the method packed on the CPU."""
    packed = contract.quantize(method, contract.weight(OUT, IN))
    return QuantLinear.from_packed(method, nn.Linear(IN, OUT, bias=False), packed)


def token() -> Tensor:
    return contract.inputs(IN)[:1].bfloat16()


@torch.no_grad()
def decoding(decoder: Decoder) -> tuple[PretendedGPU, Tensor]:
    """What the second token through a linear costs on a GPU, and its y."""
    method = decoder.build()
    linear = QuantLinear.from_packed(
        method, nn.Linear(IN, OUT, bias=False), packed_linear(method).packed()
    )
    with kernels() if decoder.kernels else reference(), PretendedGPU() as gpu:
        linear.to(GPU)
        x = token().to(GPU)
        linear(x)
        gpu.reset()
        y = linear(x)
    return gpu, y


def decoder_costs(gpu: PretendedGPU) -> dict[str, float]:
    """What a `Decoder` limits."""
    return {"launches": gpu.launches.total(), "moved": gpu.moved / (OUT * IN)}


def check_idle_host(gpu: PretendedGPU) -> None:
    """The host neither waits for the GPU nor sends it anything, but for what transformers does."""
    syncs, uploads = ours(gpu.syncs), ours(gpu.uploads)
    assert not syncs, f"the host waits for the GPU: {most(syncs)}"
    assert not uploads, f"the host sends tensors: {most(uploads)}"
    assert gpu.faults == [], "an error of the GPU was caught by somebody"


def check_decoding(decoder: Decoder) -> None:
    """The method keeps the ceilings, and the host does nothing from the second token on."""
    gpu, _ = decoding(decoder)
    check_idle_host(gpu)
    check_below(decoder, decoder_costs(gpu), most(gpu.launches))
