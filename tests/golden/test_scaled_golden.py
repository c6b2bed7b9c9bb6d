"""AWQ and SmoothQuant against what the authors' own code gives on stories260K (scaled.json names
code and commits).

Their scales stay in fp32, so scale_bits=32 here; one test says what our default fp16 changes. AWQ's
3 bits and SmoothQuant's published setting run by default; LLQ_FULL_GOLDEN=1 runs all rows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf.engine.in_memory import quantize_model
from llq_hf.methods import build

GOLDEN = json.loads(Path(__file__).with_name("scaled.json").read_text())
ROWS = GOLDEN["rows"]
FULL = os.environ.get("LLQ_FULL_GOLDEN", "") not in ("", "0")
BATCH = 20  # windows evaluated together

PPL_TOLERANCE = {"awq": 1e-3, "smoothquant": 3e-3}


def words(row: dict[str, Any]) -> str:
    flags = {
        key: value
        for key, value in row["options"].items()
        if key not in ("bits", "a_bits", "ratios", "sym")
    }
    return "-".join(
        [row["method"], f"{row['options']['bits']}-bits", *(f"{k}={v}" for k, v in flags.items())]
    )


def chosen(row: dict[str, Any]) -> bool:
    options = row["options"]
    if row["method"] == "awq":
        return FULL or options["bits"] == 3
    return FULL or (
        options.get("alpha") == 0.85 and (options["quantize_bmm_input"] or options["bits"] == 4)
    )


@cache
def data(shared: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, calibration ids, evaluation ids): the very files of the reference runs."""
    from transformers import AutoModelForCausalLM

    files = GOLDEN["files"]
    for name in ("calibration", "evaluation"):
        assert (
            hashlib.sha256((shared / files[name]).read_bytes()).hexdigest()
            == files[f"{name}_sha256"]
        )
    calibration, evaluation = (
        torch.from_numpy(np.load(shared / files[name]).astype(np.int64))
        for name in ("calibration", "evaluation")
    )
    model = AutoModelForCausalLM.from_pretrained(shared / files["model"], dtype=torch.float32)
    return model, calibration, evaluation[: files["windows"]]


@torch.no_grad()
def perplexity(model: nn.Module, windows_NS: Tensor) -> float:
    total = 0.0
    for start in range(0, len(windows_NS), BATCH):
        ids = windows_NS[start : start + BATCH]
        logits = model(ids).logits.float()
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    return float(np.exp(total / (len(windows_NS) * (windows_NS.shape[1] - 1))))


@cache
def run(shared: Path, method: str, **options: Any) -> tuple[list[dict[str, Any]], float, float]:
    """(records, perplexity, weight error of all linears together)."""
    dense, calibration, evaluation = data(shared)
    model = copy.deepcopy(dense)
    records = quantize_model(model, build(method, **options), calibration)
    sizes = [float(dense.get_submodule(r["name"]).weight.detach().square().sum()) for r in records]
    error = sum(r["weight_error"] * size for r, size in zip(records, sizes, strict=True)) / sum(
        sizes
    )
    return records, perplexity(model, evaluation), error


def ratios_of(records: list[dict[str, Any]]) -> list[float]:
    """Those of q/k/v, gate/up and down of each block in turn; o_proj has none, its value heads are
    shared.
    """
    by_name = {record["name"]: record for record in records}
    blocks = sorted({name.rsplit(".", 2)[0] for name in by_name})
    return [
        by_name[f"{block}.{name}"]["ratio"]
        for block in blocks
        for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    ]


@pytest.mark.parametrize("row", [row for row in ROWS if chosen(row)], ids=words)
def test_equals_the_authors_code(row: dict[str, Any], shared: Path):
    records, ppl, error = run(shared, row["method"], scale_bits=32, **row["options"])
    assert error == pytest.approx(row["weight_error"], rel=5e-3)
    assert ppl == pytest.approx(row["ppl"], rel=PPL_TOLERANCE[row["method"]])
    if "ratios" in row:
        assert ratios_of(records) == pytest.approx(row["ratios"]), "all fifteen searches"


@pytest.mark.parametrize("bits", [8, 6] if FULL else [6])
def test_fp16_scales_stay_close(bits: int, shared: Path):
    """SmoothQuant's 4 bits with quantized q, k and v, at a perplexity of 37, move by 2 % with any
    rounding.
    """
    row = next(
        r
        for r in ROWS
        if r["method"] == "smoothquant" and r["options"]["bits"] == bits and chosen(r)
    )
    assert run(shared, "smoothquant", **row["options"])[1] == pytest.approx(row["ppl"], rel=5e-3)


@pytest.mark.skipif(not FULL, reason="three minutes: LLQ_FULL_GOLDEN=1")
@pytest.mark.parametrize(("bits", "factor"), [(2, 0.5), (3, 0.95), (4, 1.0)])
def test_best_is_better_than_the_authors(bits: int, factor: float, shared: Path):
    row = next(r for r in ROWS if r["method"] == "awq" and r["options"]["bits"] == bits)
    best = {**build("awq", "best").to_dict(), "bits": bits, "group_size": -1}
    assert run(shared, "awq", **best)[1] <= factor * row["ppl"]
