"""Decoding on a GPU: a packed linear costs few launches, and the host neither waits nor sends
anything, from one linear to `generate` over two GPUs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from device import checks
from device.ceilings import DECODERS, SOLVERS, Decoder, Solver
from device.pretended import PretendedGPU, exact_attention, near, needs_cuda_build
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.kernels import reference
from llq_hf.methods import METHODS, build

pytestmark = needs_cuda_build
PROMPT, TOKENS = 4, 4

each_method = pytest.mark.parametrize(
    "solver", [next(row for row in SOLVERS if row.method == name) for name in METHODS], ids=METHODS
)


def test_every_method_has_a_row():
    assert {decoder.method for decoder in DECODERS} == set(METHODS)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_one_linear(decoder: Decoder):
    checks.check_decoding(decoder)


@pytest.mark.parametrize("decoder", [row for row in DECODERS if not row.kernels], ids=str)
@torch.no_grad()
def test_one_linear_gives_the_numbers_of_the_cpu(decoder: Decoder):
    with reference():
        expected = checks.packed_linear(decoder.build())(checks.token())
    _, y = checks.decoding(decoder)
    assert torch.equal(near(y), expected)


# --- whole models ---------------------------------------------------------------------------------


@torch.no_grad()
def decode(model: Any, ids_BS: Tensor, gpu: PretendedGPU | None = None) -> Tensor:
    """Logits of all tokens, the prompt at once and then token by token. `gpu` counts from the
    second token on.
    """
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS)
    logits = [model(ids_BS[:, :PROMPT], past_key_values=cache).logits]
    steps = [ids_BS[:, i : i + 1] for i in range(PROMPT, PROMPT + TOKENS)]
    for i, step in enumerate(steps):
        if i == 1 and gpu is not None:
            gpu.reset()
        logits.append(model(step, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def decoded_idly(model: Any, ids_BS: Tensor) -> Tensor:
    """What the model decodes on a GPU. AssertionError where the host waits or sends anything."""
    far = copy.deepcopy(model)
    with PretendedGPU() as gpu:
        logits = decode(far.to(checks.GPU), ids_BS.to(checks.GPU), gpu)
    checks.check_idle_host(gpu)
    assert not gpu.syncs
    assert not gpu.uploads
    return logits


@each_method
@exact_attention()
def test_a_model_that_was_loaded(
    solver: Solver, tiny_llama: Path, calibration_npy: Path, tmp_path: Path
):
    """A step is one that a CUDA graph can hold: no sync, no upload. The CPU's numbers, but for the
    order in which a product of more than two dimensions is summed.
    """
    data = Calibration(str(calibration_npy), samples=2)
    quantize_checkpoint(str(tiny_llama), tmp_path / "out", solver.build(), data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids_BS = checks.ids()[:1]
    with reference():
        expected = decode(model, ids_BS)
        found = decoded_idly(model, ids_BS)
    with checks.kernels():  # they count, and compute nothing here
        decoded_idly(model.bfloat16(), ids_BS)
    assert torch.allclose(near(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("gptq", 3, {"act_order": True}),
        ("quip", 2, {}),
        ("billm", 1.1, {}),
        ("pb_llm", 1.7, {}),
        ("nf4", 4, {"icq": True, "tau_steps": 10}),
        ("spinquant", 4, {"a_bits": 8, "kv_bits": 4}),
    ],
)
@exact_attention()
def test_generate_over_two_gpus_with_a_static_cache(
    name: str, bits: float, options: dict[str, Any]
):
    model, ids_BS = checks.llama(layers=2), checks.ids()[:1, :PROMPT]
    quantize_model(model, build(name, bits=bits, **options), checks.ids())
    asked = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with reference(), PretendedGPU() as gpu:
        expected = model.generate(ids_BS, **asked)
        checks.spread(model)
        far_BS = ids_BS.to("cuda:0")
        model(far_BS)  # tables are uploaded once
        gpu.reset()
        found = model.generate(far_BS, cache_implementation="static", disable_compile=True, **asked)
    assert torch.equal(near(found), expected)
    assert gpu.transfers  # from block to block
    checks.check_idle_host(gpu)
