"""Measures the packed cache of keys and values beside a bf16 one: memory, divergence, time.

    python tests/bench/kv_cache.py TEXT... [--model smollm2] [--tokens 4096] [--windows 4]

Published in llq_hf/hosts/README.md.

Memory is that of a text of `--tokens` tokens, read 128 at a time. It is counted twice: from the
cache's tensors, and from the peak of a process of its own, less the peak of a process whose cache
keeps nothing. The peak of a packed cache has one decoded layer in it.

Divergence is that of the model's predictions from those with a bf16 cache, in nats per token, in
the first windows of each text. A window is read 128 tokens at a time, of which the first 128 do not
count. As 128 tokens stay in full precision before they are quantized, each prediction is the one
that decoding token by token would make. The line "one pass" is bf16 without a cache: by so much
do predictions differ because of another order of bf16's sums.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from llq_hf.common.machine import peak_resident_bytes
from llq_hf.demo import resolve
from llq_hf.numerics.divergence import Divergence

FORGETFUL, DENSE = "forgetful", "bf16"
WIDTHS = {"8 bits": 8, "4 bits": 4}
WINDOW, BLOCK, DECODED = 1024, 128, 4
# Every tensor of size goes back to the system when it is freed, so that peaks can be compared.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ForgetfulLayer(DynamicLayer):
    """Gives attention as many keys and values as it should get, and keeps none. What it gives are
    zeros that nobody writes, for which the system needs no memory.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized, self.length = True, self.get_seq_length() + key_states.shape[2]
        shape = (*key_states.shape[:2], self.length, key_states.shape[3])
        return key_states.new_zeros(shape), value_states.new_zeros(shape)

    def get_seq_length(self) -> int:
        return getattr(self, "length", 0)


def new_cache(model: Any, name: str) -> Cache:
    if name == FORGETFUL:
        return Cache(layers=[ForgetfulLayer() for _ in range(model.config.num_hidden_layers)])
    if name == DENSE:
        return DynamicCache(config=model.config)
    return QuantizedCache("llq", model.config, nbits=WIDTHS[name])


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.bfloat16).eval()


# --- memory ---------------------------------------------------------------------------------------


@torch.no_grad()
def memory(name: str, cache: str, tokens: int) -> dict[str, float]:
    """Bytes of the cache's tensors, growth of the peak, and seconds of a decoded token."""
    model = load(name)
    ids_1S = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator())
    model(ids_1S[:, :BLOCK], logits_to_keep=1)  # what is made once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss
    held = new_cache(model, cache)
    for part_1S in ids_1S.split(BLOCK, 1):
        model(part_1S, past_key_values=held, use_cache=True, logits_to_keep=1)
    grown = peak_resident_bytes() - before
    tensors = sum(bytes_of(layer) for layer in held.layers)
    started = time.perf_counter()
    for _ in range(DECODED):
        model(ids_1S[:, :1], past_key_values=held, use_cache=True)
    seconds = (time.perf_counter() - started) / DECODED
    return {"tensors": tensors, "grown": grown, "seconds": seconds}


def bytes_of(layer: Any) -> int:
    if isinstance(layer, ForgetfulLayer):
        return 0
    own = getattr(layer, "nbytes", None)
    return int(layer.keys.nbytes + layer.values.nbytes if own is None else own)


def in_a_process(name: str, cache: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", cache, "--model", name, "--tokens", str(tokens)]
    done = subprocess.run(
        command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- divergence -----------------------------------------------------------------------------------


def windows(model: str, texts: list[Path], count: int) -> Iterator[Tensor]:
    """The first windows [1, WINDOW] of each text."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    for text in texts:
        ids_T = tokenizer(text.read_text()[: 16 * WINDOW * count], return_tensors="pt").input_ids[0]
        yield from ids_T[: WINDOW * count].view(count, 1, WINDOW)


@torch.no_grad()
def logits(model: Any, ids_1S: Tensor, cache: Cache | None) -> Tensor:
    """[S, V] of all positions but the first BLOCK."""
    if cache is None:
        found: Tensor = model(ids_1S).logits[0]
        return found[BLOCK:]
    parts = ids_1S.split(BLOCK, 1)
    seen = [model(part, past_key_values=cache, use_cache=True).logits[0] for part in parts]
    return torch.cat(seen[1:])


def divergences(name: str, texts: list[Path], count: int) -> dict[str, dict[str, float]]:
    model = load(name)
    found: dict[str, list[Divergence]] = {}
    for number, ids_1S in enumerate(windows(name, texts, count), start=1):
        print(f"window {number} of {count * len(texts)}", file=sys.stderr, flush=True)
        full_SV = logits(model, ids_1S, new_cache(model, DENSE))
        for cache in ("one pass", *WIDTHS):
            held = new_cache(model, cache) if cache in WIDTHS else None
            own = Divergence.of(full_SV, logits(model, ids_1S, held))
            found.setdefault(cache, []).append(own)
    return {cache: Divergence.together(parts).summary() for cache, parts in found.items()}


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", type=Path, help="text files for the divergence")
    parser.add_argument("--model", default="smollm2", help="folder, or name of a bundled model")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text for memory")
    parser.add_argument("--windows", type=int, default=4, help="of each text, for the divergence")
    parser.add_argument("--child", help="measure the memory of one cache in this process")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(memory(asked.model, asked.child, asked.tokens)))
        return
    size = {}
    for cache in (FORGETFUL, DENSE, *WIDTHS):
        print(f"memory, {cache}", file=sys.stderr, flush=True)
        size[cache] = in_a_process(asked.model, cache, asked.tokens)
        print(size[cache], file=sys.stderr, flush=True)
    far = divergences(asked.model, asked.texts, asked.windows) if asked.texts else {}
    print("| cache | tensors | of bf16 | process peak | of bf16 | KL | same top-1 | ms a token |")
    print("|---|---|---|---|---|---|---|---|")
    for cache in (DENSE, *WIDTHS, "one pass"):
        print(f"| {cache} | {' | '.join(cells(cache, size, far))} |")


def cells(
    cache: str, size: dict[str, dict[str, float]], far: dict[str, dict[str, float]]
) -> list[str]:
    kl = far.get(cache)
    quality = ["", ""] if kl is None else [f"{kl['kl']:.4f}", f"{kl['top1_agreement']:.1%}"]
    if cache not in size:
        return ["", "", "", "", *quality, ""]
    nothing = size[FORGETFUL]["grown"]
    tensors, peak = size[cache]["tensors"], size[cache]["grown"] - nothing
    whole, whole_peak = size[DENSE]["tensors"], size[DENSE]["grown"] - nothing
    memory_cells = [
        f"{tensors / 2**20:.1f} MiB",
        f"{tensors / whole:.3f}",
        f"{peak / 2**20:.1f} MiB",
        f"{peak / whole_peak:.3f}",
    ]
    return [*memory_cells, *quality, f"{1000 * size[cache]['seconds']:.0f}"]


if __name__ == "__main__":
    main()
