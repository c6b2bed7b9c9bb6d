"""PB-LLM and BiLLM against what the authors' own classes give on one linear [64, 256]: not a bit
differs.

Weights, the Hessian that their class gathered, and their quantized weights, in fp32 on a CPU;
make_binary.py names code and commits. Their scales are fp32, so scale_bits=32 here. One test runs
our own Hessian (it sums in another order).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import checks
from safetensors.torch import load_file
from torch import Tensor

from llq_hf.methods import build
from llq_hf.numerics.stats import PairedHessian

HERE = Path(__file__).parent
PB_LLM, BILLM = load_file(HERE / "pb_llm.safetensors"), load_file(HERE / "billm.safetensors")
W_OI, H_II = PB_LLM.pop("W"), PB_LLM.pop("H")


class Theirs(PairedHessian):
    """Their Hessian, to the last bit."""

    @property
    def H_II(self) -> Tensor:
        return H_II.clone()


def pb_options(case: str) -> dict[str, Any]:
    salience, group, share, solver = case.split("_")
    return {
        "salience": salience,
        "group_size": int(group.removeprefix("gs")),
        "bits": {"lf0.9000": 1.7, "lf0.8571": 2.0}[share],
        "feedback": solver == "gptq",
    }


def billm_options(case: str) -> dict[str, Any]:
    salience, block, solver = case.split("_")
    return {
        "salience": salience,
        "block_size": int(block.removeprefix("bs")),
        "feedback": solver == "gptq",
    }


def restored(name: str, stat: PairedHessian, **options: Any) -> Tensor:
    method = build(name, **options)
    return method.dequantize(method.quantize(W_OI, stat, checks.job()), *W_OI.shape)


def theirs() -> Theirs:
    return Theirs(W_OI.shape[1], W_OI.device)


def test_all_cases_are_there():
    assert (len(PB_LLM), len(BILLM)) == (16, 8)


@pytest.mark.parametrize("case", PB_LLM)
def test_pb_llm_equals_the_authors_code(case: str):
    mine_OI = restored("pb_llm", theirs(), scale_bits=32, **pb_options(case))
    assert float((mine_OI - PB_LLM[case]).abs().max()) == 0


@pytest.mark.parametrize("case", BILLM)
def test_billm_equals_the_authors_code(case: str):
    mine_OI = restored("billm", theirs(), scale_bits=32, **billm_options(case))
    assert float((mine_OI - BILLM[case]).abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "cases"), [("pb_llm", PB_LLM), ("billm", BILLM)], ids=["pb_llm", "billm"]
)
def test_fp16_scales_stay_close(name: str, cases: dict[str, Tensor]):
    """By output error, which is what feedback keeps down: single weights may well take another
    level.
    """

    def output_error(Q_OI: Tensor) -> float:
        error_OI = W_OI - Q_OI
        return float(((error_OI @ H_II) * error_OI).sum())

    for case, Q_OI in cases.items():
        options = pb_options(case) if name == "pb_llm" else billm_options(case)
        assert output_error(restored(name, theirs(), **options)) == pytest.approx(
            output_error(Q_OI), rel=0.05
        ), case


@pytest.mark.parametrize("name", ["pb_llm", "billm"])
def test_our_own_hessian_gives_the_same(name: str, shared: Path):
    golden = torch.load(shared / "golden" / f"{name}.pt", weights_only=True)
    stat = PairedHessian(W_OI.shape[1], W_OI.device)
    for x_TI in golden["X"]:
        stat.update(x_TI, 1)
    for case, found in golden["cases"].items():
        options = pb_options(case) if name == "pb_llm" else billm_options(case)
        mine_OI = restored(name, stat, scale_bits=32, **options)
        assert float((mine_OI - found["Q"]).abs().max()) < 1e-6, case
