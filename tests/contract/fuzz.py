"""Damages checkpoints, deterministically, and says what came of loading and running each.

A case is a number: it decides the checkpoint, what is changed in it, and how it is loaded. The same
number gives the same case on every machine. tests/contract/test_fuzz.py runs some in each test run;
tests/bench/fuzz_checkpoints.py runs thousands, and runs them with kernels built for sanitizers.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llq_hf
from llq_hf.checkpoints.format import CONFIG, HASHES, PackedConfig
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.checkpoints.shards import Shards
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.methods import build

PACKAGE = str(Path(llq_hf.__file__).parent)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Whole blocks of 128 columns, which the fastest kernels want, and five groups of 128.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Every method, and every kind of storage that it has.
VARIANTS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("rtn", 4, {}),
    ("rtn", 3, {"group_size": 40, "scale_bits": 32, "sym": True}),
    ("gptq", 3, {"group_size": 64, "act_order": True}),
    ("quip", 2, {}),
    ("db_llm", 2, {"steps": 0}),
    ("pb_llm", 1.7, {}),
    ("pb_llm", 3.0, {"group_size": 64}),
    ("billm", 1.1, {}),
    ("spinquant", 4, {"a_bits": 8, "kv_bits": 8}),
    ("awq", 4, {"ratios": 2}),
    ("smoothquant", 8, {}),
    ("omniquant", 2, {"group_size": 64, "epochs": 1}),
    ("slim_llm", 2, {}),
    ("hybrid", 3, {"rules": "*.down_proj=slim_llm:2+*.self_attn.*=pb_llm:1.7+*=quip:3"}),
    ("nf4", 4, {}),
    ("nf4", 3, {"icq": True, "tau_steps": 2}),
    ("efficient_qat", 2, {"epochs": 1, "tune_epochs": 0}),
)
SHARDED = 0  # the variant that lies in shards with an index
# The few numbers that lead to others are hit more often than their bytes are many.
STEERING = ("order", "seeds", "widths", "position", "position_low", "salient", "in_scale", "zero")
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 16, 127, 128, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**32 + 1),
    *(2**40, 2**63 - 1, 2**63, 2**64, 2**100, -(2**31), -(2**63), 0.5, -0.0, 1e-30, 1e30, 1e308),
    *(math.nan, math.inf, -math.inf),
)
OTHERS = (None, True, False, "", "x", "0", "../x", "\x00", "é" * 9, [], [1], {}, {"a": 1}, [[]])
# What the two kinds of results are called. Only the first two are right without a word; `changed`
# is right where nobody asked for every tensor to be compared.
SAME, REFUSED, CHANGED, NOT_FINITE = "same", "refused", "changed", "not finite"
THEIRS, OURS = "error of transformers", "error inside llq_hf"


@dataclass(frozen=True)
class Variant:
    """A whole checkpoint, and the logits that it gives."""

    name: str
    folder: Path
    logits: Tensor


@dataclass(frozen=True)
class Outcome:
    """What came of a case. what: one of the words above."""

    number: int
    variant: str
    change: str
    mode: str
    what: str
    text: str = ""


def ids() -> Tensor:
    """Two sequences: enough tokens for the kernels of many, few enough for those of few."""
    return torch.randint(2, 320, (2, 3), generator=torch.Generator().manual_seed(7))


def run(folder: Path) -> Tensor:
    """Logits of a few tokens, and of many; every kernel that serves a weight is called."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():  # each tensor in memory of its own, where sanitizers see its end
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.clone()
    with torch.no_grad():
        few = model(ids()[:1, :1]).logits.flatten()
        some = model(ids()).logits.flatten()
        many = model(ids().repeat(1, 12)).logits.flatten()
    return torch.cat([few, some, many]).float()


def make_variants(
    base: Path, calibration: Path, out: Path, which: range | None = None
) -> list[Variant]:
    """Quantize the base by every variant."""
    variants = []
    for number in which or range(len(VARIANTS)):
        name, bits, options = VARIANTS[number]
        folder = out / f"{number:02d}-{name}"
        limit = 200_000 if number == SHARDED else Shards.limit_bytes
        with mock.patch.object(Shards, "limit_bytes", limit):
            quantize_checkpoint(
                str(base),
                folder,
                build(name, bits=bits, **options),
                Calibration(str(calibration), samples=4),
            )
        variants.append(Variant(folder.name, folder, run(folder)))
    return variants


# --- cases ----------------------------------------------------------------------------------------


def run_case(number: int, variants: list[Variant], scratch: Path) -> Outcome:
    """Make the damaged copy of a case, load it and run it."""
    dice = random.Random(number)
    variant = dice.choice(variants)
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(variant.folder, folder)
    change = dice.choices(KINDS, [weight for _, weight in WEIGHTED])[0](folder, dice)
    # As it is; as of an older version, which wrote no hashes; with every tensor compared.
    mode = dice.choice(("quick", "quick", "no hashes", "no hashes", "all"))
    if mode == "no hashes":
        (folder / HASHES).unlink(missing_ok=True)
    with environment("LLQ_VERIFY", "1" if mode == "all" else "0"):
        what, text = outcome(folder, variant.logits)
    return Outcome(number, variant.name, change, mode, what, text)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {name: value}):
        yield


def outcome(folder: Path, expected: Tensor) -> tuple[str, str]:
    try:
        inspect_checkpoint(folder)
    except LLQError:
        pass  # loading may refuse as well, or may not look at what was changed
    except Exception as error:
        return OURS, "llq info: " + "".join(traceback.format_exception(error)[-3:])
    try:
        logits = run(folder)
    except LLQError as error:
        one_line = len(str(error).splitlines()) == 1
        return (REFUSED if one_line else OURS), str(error)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = frames[-1].filename.startswith(PACKAGE)
        last = "".join(traceback.format_exception(error)[-2:])
        return (OURS if ours else THEIRS), f"{type(error).__name__}: {last if ours else error}"
    if not logits.isfinite().all():
        return NOT_FINITE, ""
    return (SAME if torch.equal(logits, expected) else CHANGED), ""


def is_wrong(found: Outcome) -> bool:
    """Whether a case shows a fault: an error from inside, or another model where every tensor was
    compared.
    """
    silent = found.mode == "all" and found.what in (CHANGED, NOT_FINITE)
    return found.what == OURS or silent


# --- changes of the data --------------------------------------------------------------------------


def parts_of(file: Path) -> tuple[dict[str, Any], bytearray]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def put(file: Path, head: dict[str, Any], data: bytes) -> None:
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def weight_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.glob("*.safetensors")))


def some_tensor(head: dict[str, Any], dice: random.Random) -> str:
    """A tensor: half of the time one whose numbers lead to others, or a scale."""
    names = sorted(name for name in head if name != "__metadata__")
    steering = [name for name in names if name.rpartition(".")[2] in STEERING]
    packed = [name for name in names if "layers." in name and not name.endswith("norm.weight")]
    return dice.choice(dice.choice([names, packed or names, steering or names, steering or names]))


def change_data(folder: Path, dice: random.Random) -> str:
    file = weight_file(folder, dice)
    head, data = parts_of(file)
    name = some_tensor(head, dice)
    start, stop = head[name]["data_offsets"]
    if start == stop:
        return "nothing: the tensor is empty"
    at = dice.randrange(start, stop)
    end = min(stop, at + dice.choice([1, 2, 4, 16, 256, stop - start]))
    kind = dice.choice(["flip", "zero", "ones", "random", "reverse", "fill", "NaN", "swap"])
    if kind == "flip":
        data[at] ^= 1 << dice.randrange(8)
    elif kind in ("zero", "ones"):
        data[at:end] = bytes([0 if kind == "zero" else 255]) * (end - at)
    elif kind == "random":
        data[at:end] = dice.randbytes(end - at)
    elif kind == "reverse":
        data[start:stop] = data[start:stop][::-1]
    elif kind == "fill":
        data[start:stop] = bytes([dice.randrange(256)]) * (stop - start)
    elif kind == "NaN":
        at -= (at - start) % 4
        data[at : at + 4] = dice.choice([b"\x00\x7e\x00\x7e", b"\x00\x00\xc0\x7f", b"\x00\x7c"])[
            : stop - at
        ].ljust(min(4, stop - at), b"\x00")
    else:
        half = (stop - start) // 2
        data[start : start + half], data[stop - half : stop] = (
            data[stop - half : stop],
            data[start : start + half],
        )
    put(file, head, data)
    return f"data: {kind} in {name}"


def craft_data(folder: Path, dice: random.Random) -> str:
    """Numbers that pass a careless check: sorted, repeated or extreme ones, lists with the right
    number of ones.
    """
    file = weight_file(folder, dice)
    head, data = parts_of(file)
    names = [name for name in sorted(head) if name.rpartition(".")[2] in STEERING[:5]]
    if not names:
        return change_data(folder, dice)
    name = dice.choice(names)
    start, stop = head[name]["data_offsets"]
    kinds = {"I16": torch.int16, "I32": torch.int32, "U8": torch.uint8}
    dtype = kinds[head[name]["dtype"]]
    values = torch.frombuffer(bytearray(data[start:stop]), dtype=dtype).clone()
    kind = dice.choice(
        ["sorted", "one for all", "extreme", "ones to the front", "ones to the back"]
    )
    if kind == "sorted":
        values = values.sort(descending=dice.random() < 0.5).values
    elif kind == "one for all":
        values = values[dice.randrange(len(values))].expand(len(values)).clone()
    elif kind == "extreme":
        limits = torch.iinfo(dtype)
        values[dice.randrange(len(values))] = dice.choice([limits.min, limits.max, 0, 1, 9])
    else:
        as_bytes = values.view(torch.uint8)
        bits = (as_bytes[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        bits = bits.flatten().sort(descending=kind == "ones in front").values.view(-1, 8)
        weights = 2 ** torch.arange(8)
        values = (bits * weights).sum(1).to(torch.uint8).view(dtype)
    data[start:stop] = values.contiguous().view(torch.uint8).numpy().tobytes()
    put(file, head, data)
    return f"crafted: {kind} in {name}"


def change_length(folder: Path, dice: random.Random) -> str:
    file = weight_file(folder, dice)
    raw = file.read_bytes()
    keep = dice.choice([0, 1, 7, 8, 9, dice.randrange(len(raw)), len(raw) - 1])
    more = dice.random() < 0.2
    file.write_bytes(raw + b"\x00" * 8 if more else raw[:keep])
    return f"length: {len(raw) + 8 if more else keep} bytes"


# --- changes of the header ------------------------------------------------------------------------


def change_header(folder: Path, dice: random.Random) -> str:
    file = weight_file(folder, dice)
    head, data = parts_of(file)
    name = some_tensor(head, dice)
    kind = dice.choice(
        ["offsets", "swap", "dtype", "shape", "remove", "rename", "length", "text", "metadata"]
    )
    entry = head[name]
    if kind == "offsets":
        entry["data_offsets"] = [
            dice.choice([0, 1, -1, 2**40, 2**64, *entry["data_offsets"]]) for _ in range(2)
        ]
    elif kind == "swap":
        alike = [
            other
            for other in sorted(head)
            if other not in (name, "__metadata__")
            and head[other]["shape"] == entry["shape"]
            and head[other]["dtype"] == entry["dtype"]
        ]
        other = dice.choice(alike or [name])
        entry["data_offsets"], head[other]["data_offsets"] = (
            head[other]["data_offsets"],
            entry["data_offsets"],
        )
    elif kind == "dtype":
        entry["dtype"] = dice.choice(["F16", "BF16", "I16", "U8", "I32", "F32", "F64", "F8_E4M3"])
    elif kind == "shape":
        size = math.prod(entry["shape"])
        entry["shape"] = dice.choice(
            [[], [size], [1, size], entry["shape"][::-1], [2**40, 2**40], [0], [-1], [size, 1]]
        )
    elif kind == "remove":
        del head[name]
    elif kind == "rename":
        head[dice.choice(["x", name.replace("layers.0", "layers.1"), name + "x"])] = head.pop(name)
    elif kind == "metadata":
        head["__metadata__"] = dice.choice([{}, {"format": "tf"}, {"format": 1}, []])
    put(file, head, data)
    raw = bytearray(file.read_bytes())
    if kind == "length":
        value = dice.choice([0, 1, 2**31, 2**40, 2**63, len(raw)])
        raw[:8] = value.to_bytes(8, "little")
    elif kind == "text":
        raw[8 + dice.randrange(int.from_bytes(raw[:8], "little"))] = dice.randrange(256)
    file.write_bytes(raw)
    return f"header: {kind} of {name}"


# --- changes of config.json, the hashes, the report and the index ---------------------------------


def other_value(value: Any, dice: random.Random) -> Any:
    """A value near to another, or one that nobody expects."""
    if dice.random() < 0.3 and isinstance(value, int | float) and not isinstance(value, bool):
        return dice.choice([value + 1, value - 1, 2 * value, value / 2, -value])
    if dice.random() < 0.3 and isinstance(value, bool):
        return not value
    return dice.choice([dice.choice(NUMBERS), dice.choice(NUMBERS), dice.choice(OTHERS)])


def change_json(file: Path, dice: random.Random, section: str | None = None) -> str:
    """Change, delete or add a field of a JSON file, or of one object in it."""
    whole = json.loads(file.read_text())
    content = whole if section is None else whole[section]
    if not isinstance(content, dict) or not content:
        return "nothing"
    key = dice.choice(sorted(content))
    how = dice.choice(["change", "change", "change", "delete", "add", "text"])
    if how == "change":
        old = content[key]
        if isinstance(old, dict) and old and dice.random() < 0.7:
            content, key = old, dice.choice(sorted(old))
        content[key] = other_value(content[key], dice)
    elif how == "delete":
        del content[key]
    elif how == "add":
        content[dice.choice(["x", "bits", "head_dim", "rope_scaling", "dtype"])] = other_value(
            1, dice
        )
    file.write_text(json.dumps(whole))
    if how == "text":
        text = bytearray(file.read_bytes())
        text[dice.randrange(len(text))] = dice.randrange(256)
        file.write_bytes(text)
    return f"{file.name}: {how} {section or ''} {key}"


def change_config(folder: Path, dice: random.Random) -> str:
    return change_json(folder / CONFIG, dice)


def change_section(folder: Path, dice: random.Random) -> str:
    return change_json(folder / CONFIG, dice, "quantization_config")


def forge_section(folder: Path, dice: random.Random) -> str:
    """An option changed together with the digest of the options."""
    text = change_json(folder / CONFIG, dice, "quantization_config")
    try:
        config = json.loads((folder / CONFIG).read_text())
        section = config["quantization_config"]
        config["quantization_config"] = PackedConfig.from_section(section).to_section()
        (folder / CONFIG).write_text(json.dumps(config))
    except (LLQError, ValueError, KeyError, TypeError):
        return text
    return f"{text}, with its digest"


def change_small(folder: Path, dice: random.Random) -> str:
    """The hashes, the report, or the index."""
    names = [HASHES, "llq_report.json", INDEX, INDEX]
    file = folder / dice.choice([name for name in names if (folder / name).is_file()])
    if file.name == INDEX and dice.random() < 0.8:
        return change_json(file, dice, "weight_map")
    return change_json(file, dice)


WEIGHTED: tuple[tuple[Callable[[Path, random.Random], str], int], ...] = (
    (change_data, 5),
    (craft_data, 4),
    (change_length, 1),
    (change_header, 4),
    (change_config, 3),
    (change_section, 2),
    (forge_section, 4),
    (change_small, 2),
)
KINDS = [kind for kind, _ in WEIGHTED]
