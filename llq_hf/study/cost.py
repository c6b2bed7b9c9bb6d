"""Measures what a packed model costs: bytes on disk and in memory, prefill and decode speed.

It is measured beside the full-precision model, by the same code on CPU and CUDA. The models are
timed in turn, round after round, in one process: whatever slows the machine for a moment slows all
of them, so the medians of the rounds can be divided by each other. Every round's seconds are kept.

phase   | what is timed                                                    | per
prefill | one forward pass over B prompts of `prompt_tokens` random tokens | pass
decode  | `new_tokens` greedy steps after it, with the cache               | step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..checkpoints.dense import fetch
from ..checkpoints.journal import Journal
from ..common.errors import LLQError
from ..common.machine import peak_resident_bytes
from ..common.progress import PassListener
from ..hosts.loading import load_model

Figures = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What the models are timed at: see the table at the head of this file."""

    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 128
    new_tokens: int = 16
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise LLQError(
                    f"{name}={getattr(self, name)} leaves nothing to time; give 1 or more"
                )
        if not self.batches or min(self.batches) < 1:
            raise LLQError(f"batches={self.batches} holds no batch size; give numbers of 1 or more")


def compare(
    models: Mapping[str, nn.Module], load: Workload, tick: Callable[[], None] = lambda: None
) -> dict[str, Figures]:
    """By model name: `loaded_bytes`, and by batch size the medians and all rounds of both phases.

    All models must lie on one device. tick: called after every round of a model.
    """
    rounds: dict[str, dict[int, list[list[float]]]] = {
        name: {b: [] for b in load.batches} for name in models
    }
    for number in range(load.rounds + 1):
        for name, model in models.items():
            for batch in load.batches:
                seconds = time_phases(model, _prompt(model, batch, load), load.new_tokens)
                if number:  # the first round warms up
                    rounds[name][batch].append(seconds)
            tick()
    return {
        name: {
            "loaded_bytes": loaded_bytes(model),
            "speed": {
                str(batch): _medians(rounds[name][batch], batch, load) for batch in load.batches
            },
        }
        for name, model in models.items()
    }


def ratios(own: Figures, reference: Figures) -> Figures:
    """One model's figures divided by another's: below 1 is smaller or quicker."""
    speed = {
        batch: {phase: figures[phase] / reference["speed"][batch][phase] for phase in PHASES}
        for batch, figures in own["speed"].items()
    }
    return {"loaded_bytes": own["loaded_bytes"] / reference["loaded_bytes"], "speed": speed}


PHASES = ("prefill_seconds", "decode_seconds")


@torch.inference_mode()
def time_phases(model: nn.Module, ids_BS: Tensor, new_tokens: int) -> list[float]:
    """[seconds of the pass over the prompt, seconds of one decoding step after it]."""
    started = _now(ids_BS.device)
    out = model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
    prefilled = _now(ids_BS.device)
    for _ in range(new_tokens):
        ids_B1 = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids_B1, past_key_values=out.past_key_values, use_cache=True)
    return [prefilled - started, (_now(ids_BS.device) - prefilled) / new_tokens]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    return time.perf_counter()


def _prompt(model: nn.Module, batch: int, load: Workload) -> Tensor:
    config: Any = model.config
    text = config.get_text_config()
    room = text.max_position_embeddings - load.new_tokens
    if load.prompt_tokens > room:
        raise LLQError(
            f"prompt_tokens={load.prompt_tokens} and new_tokens={load.new_tokens} "
            "exceed the model's length"
        )
    random = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(text.vocab_size, (batch, load.prompt_tokens), generator=random)
    return ids_BS.to(next(model.parameters()).device)


def _medians(rounds: list[list[float]], batch: int, load: Workload) -> Figures:
    prefill, decode = (median(seconds) for seconds in zip(*rounds, strict=True))
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * load.prompt_tokens / prefill,
        "decode_seconds": decode,
        "decode_tokens_per_second": batch / decode,
        "rounds": rounds,
    }


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def disk_bytes(path: str) -> int:
    """Bytes of the safetensors files of a folder or Hub id."""
    return sum(file.stat().st_size for file in fetch(path, None).glob("*.safetensors"))


def journalled(path: Path) -> Figures | None:
    """Seconds and peak memory of a quantization, from the journal beside the folder; None if gone.

    The seconds are those of the blocks only. The peak is that of the whole process, whatever else
    it held.
    """
    blocks = Journal.read(Journal.beside(path))[1:]
    if not blocks:
        return None
    seconds = sum(line["seconds"] for line in blocks)
    return {
        "seconds": seconds,
        "peak_bytes": max(line["peak_bytes"] for line in blocks),
        "from": "journal",
    }


@contextmanager
def peak_memory(device: str) -> Iterator[Figures]:
    """Fills a dict with the memory that the body of the `with` takes.

    peak_bytes: of the process, resident, or allocated on the GPU. added_bytes: the part of it that
    was added since the start. Neither is there where the system cannot start a new peak for a
    running process; on CPUs, only Linux can.
    """
    memory: Figures = {}
    cuda = device.startswith("cuda")
    start = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    known = _reset_peak(cuda)
    yield memory
    if known:
        memory["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
        memory["added_bytes"] = max(memory["peak_bytes"] - start, 0)


def _reset_peak(cuda: bool) -> bool:
    """Start the peak anew; False where that cannot be done."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(
    base: str, paths: list[str], load: Workload, device: str, progress: PassListener
) -> dict[str, Figures]:
    """Figures of each packed model, timed in turn with the full-precision one in `base`.

    The figures of `base` itself are those of the last turn. Two models are in memory at a time, the
    full-precision one and one packed.
    """
    reference = load_model(base, device)
    measured: dict[str, Figures] = {base: {}}
    for path in paths:
        progress.stage(f"measuring {Path(path).name}", 2 * (load.rounds + 1))
        pair = {base: reference, path: load_model(path, device)}
        timed = compare(pair, load, progress.advance)
        measured[base] = timed[base]
        measured[path] = {
            **timed[path],
            "ratios": ratios(timed[path], timed[base]),
            "quantize": journalled(Path(path)),
        }
    return {name: {**figures, "disk_bytes": disk_bytes(name)} for name, figures in measured.items()}
