"""RTN, GPTQ and QuIP against what the authors' own code gives on stories260K (uniform.json names
code and commits).

Their scales stay in fp32, so scale_bits=32 here; one test looks at what our default fp16 scales
change. By default the rows at 3 bits and a few others run (about a minute); LLQ_FULL_GOLDEN=1 runs
all.

QuIP with rotations is random, and the authors' runs are not seeded: single seeds of ours differ in
weight error by a standard deviation of 0.7 % (2 bits) to 6 % (4 bits). So the mean of five seeds is
compared, with a tolerance of about two standard errors of that difference, and the authors'
perplexity must lie inside the spread of ours.
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
from llq_hf.methods.quip import QuIP
from llq_hf.numerics.grids import Uniform

GOLDEN = json.loads(Path(__file__).with_name("uniform.json").read_text())
ROWS = GOLDEN["rows"]
FULL = os.environ.get("LLQ_FULL_GOLDEN", "") not in ("", "0")
BATCH = 20  # windows evaluated together
SEEDS = range(5)

PPL_TOLERANCE = {
    "rtn": {8: 1e-3, 4: 1e-3, 3: 1e-3, 2: 1e-3},
    "gptq": {8: 3e-3, 4: 3e-3, 3: 3e-3, 2: 5e-2},
}
PPL_TOLERANCE["quip"] = PPL_TOLERANCE["gptq"]
WEIGHT_TOLERANCE = {"rtn": 1e-3, "gptq": 1e-2, "quip": 1e-2}
# Mean of five seeds against one run of theirs, by (bits, blocked): from the spread over 15 seeds of
# ours.
RANDOM_TOLERANCE = {2: 0.02, 3: 0.04, 4: 0.07, 8: 0.12}


def words(row: dict[str, Any]) -> str:
    options = row["options"]
    flags = [key.replace("_", "-") for key, value in options.items() if value is True]
    size = options.get("group_size")
    where = [] if size is None else ["per-row" if size == -1 else f"groups-of-{size}"]
    return "-".join([row["method"], f"{options['bits']}-bits", *where, *flags])


ALSO = (
    "rtn-2-bits-per-row",
    "rtn-4-bits-groups-of-32",
    "gptq-2-bits-per-row",
    "gptq-4-bits-groups-of-32",
)


def random(row: dict[str, Any]) -> bool:
    return bool(row["options"].get("incoherence"))


def chosen(row: dict[str, Any]) -> bool:
    options = row["options"]
    return FULL or options["bits"] == 3 or words(row) in ALSO


EXACT = list({words(row): row for row in ROWS if not random(row) and chosen(row)}.values())


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


def run(shared: Path, method: str, **options: Any) -> tuple[nn.Module, float]:
    """(quantized model, weight error of all linears together)."""
    dense, calibration, _ = data(shared)
    model = copy.deepcopy(dense)
    records = quantize_model(model, build(method, **options), calibration)
    sizes = [float(dense.get_submodule(r["name"]).weight.detach().square().sum()) for r in records]
    return model, sum(
        r["weight_error"] * size for r, size in zip(records, sizes, strict=True)
    ) / sum(sizes)


def test_the_full_precision_model_scores_as_theirs(shared: Path):
    model, _, evaluation = data(shared)
    assert perplexity(model, evaluation) == pytest.approx(GOLDEN["full_precision_ppl"], rel=1e-5)


class TheirRows(Uniform):
    """QuIP's grid per row as the authors keep it: fp32 scales, and the rounded matrix itself cast
    to fp16.
    """

    def unpack(self, packed: dict[str, Tensor], in_features: int) -> Tensor:
        return super().unpack(packed, in_features).half().float()


@pytest.mark.parametrize("row", EXACT, ids=words)
def test_equals_the_authors_code(
    row: dict[str, Any], shared: Path, monkeypatch: pytest.MonkeyPatch
):
    method, options = row["method"], dict(row["options"])
    if method == "quip":
        monkeypatch.setattr(
            QuIP, "row_grid", property(lambda self: TheirRows(self.bits, scale_bits=32))
        )
    else:
        options["scale_bits"] = 32
    model, weight_error = run(shared, method, **options)
    assert weight_error == pytest.approx(row["weight_error"], rel=WEIGHT_TOLERANCE[method])
    tolerance = PPL_TOLERANCE[method][options["bits"]]
    assert perplexity(model, data(shared)[2]) == pytest.approx(row["ppl"], rel=tolerance)


@pytest.mark.parametrize("bits", [8, 4] if FULL else [4])
@pytest.mark.parametrize("method", ["rtn", "gptq", "quip"])
def test_fp16_scales_stay_close(method: str, bits: int, shared: Path):
    options = {"incoherence": False, "rescale": False} if method == "quip" else {"group_size": -1}
    row = next(
        row
        for row in ROWS
        if row["method"] == method
        and row["options"]["bits"] == bits
        and all(row["options"][key] == value for key, value in options.items())
        and not any(row["options"].get(key) for key in ("sym", "act_order", "true_sequential"))
    )
    model, _ = run(shared, method, bits=bits, **options)
    assert perplexity(model, data(shared)[2]) == pytest.approx(row["ppl"], rel=3e-3)


@cache
def random_runs(shared: Path, bits: int, blocked: bool) -> list[tuple[float, float]]:
    """(weight error, perplexity) of five seeds of ours."""
    found = []
    for seed in SEEDS:
        model, weight_error = run(shared, "quip", bits=bits, blocked=blocked, seed=seed)
        found.append((weight_error, perplexity(model, data(shared)[2])))
    return found


RANDOM_RUNS = (
    [(bits, blocked) for bits in (2, 3, 4, 8) for blocked in (False, True)]
    if FULL
    else [(3, False)]
)
each_random_run = pytest.mark.parametrize(
    ("bits", "blocked"),
    RANDOM_RUNS,
    ids=[f"{bits}-bits-{'blocked' if b else 'kronecker'}" for bits, b in RANDOM_RUNS],
)


@each_random_run
def test_quip_with_rotations_agrees_in_the_mean(bits: int, blocked: bool, shared: Path):
    theirs = [row["weight_error"] for row in ROWS if matches(row, bits, blocked)]
    ours = [weight_error for weight_error, _ in random_runs(shared, bits, blocked)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=RANDOM_TOLERANCE[bits])


@each_random_run
def test_the_authors_quip_perplexity_lies_in_the_spread_of_our_seeds(
    bits: int, blocked: bool, shared: Path
):
    if bits == 2:
        pytest.skip("perplexities in the hundreds: the weight error is compared")
    theirs = [row["ppl"] for row in ROWS if matches(row, bits, blocked)]
    ours = [ppl for _, ppl in random_runs(shared, bits, blocked)]
    for ppl in theirs:
        assert 0.97 * min(ours) <= ppl <= 1.03 * max(ours)


def matches(row: dict[str, Any], bits: int, blocked: bool) -> bool:
    options = row["options"]
    return (
        random(row)
        and options["rescale"]
        and options["bits"] == bits
        and options["blocked"] == blocked
    )
