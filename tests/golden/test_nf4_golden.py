"""NF4 against bitsandbytes and IR-QLoRA's own code on three weights [128, 256]; make_nf4.py
gathered the numbers.

Codes, scales and shifts to the bit; the dequantized NF4 weight too. tau's absmax differs by one
unit in the last place (the authors multiply in another order).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract import checks
from golden.make_nf4 import sha256
from safetensors.torch import load_file
from torch import Tensor

from llq_hf.method import Packed
from llq_hf.methods import build
from llq_hf.methods.nf4 import NF4_LEVELS, dynamic_levels, levels

GOLDEN = load_file(Path(__file__).parent / "nf4.safetensors")
CASES = ("gauss", "shift", "t3")


def bytes_of(packed: Packed) -> Tensor:
    return packed["weight"].view(torch.uint8)


def test_levels_are_theirs():
    assert torch.equal(levels(4)[0], GOLDEN["levels"])
    assert torch.equal(torch.tensor(NF4_LEVELS), GOLDEN["levels"])
    assert torch.equal(dynamic_levels()[0], GOLDEN["dynamic_levels"])


@pytest.mark.parametrize("case", CASES)
def test_nf4_equals_bitsandbytes(case: str):
    method, weight_OI = build("nf4"), GOLDEN[f"{case}.W"]
    packed = checks.quantize(method, weight_OI)
    assert torch.equal(bytes_of(packed), GOLDEN[f"{case}.nf4_packed"].flatten())
    assert torch.equal(packed["scale"], GOLDEN[f"{case}.dq_qabsmax"])
    assert torch.equal(packed["scale_absmax"], GOLDEN[f"{case}.dq_absmax2"])
    assert torch.equal(packed["scale_mean"].squeeze(), GOLDEN[f"{case}.dq_offset"])
    assert torch.equal(sha256(checks.restore(method, packed, weight_OI)), GOLDEN[f"{case}.sha256"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [50, 100, 125])
def test_information_calibration_equals_the_authors_code(case: str, steps: int):
    packed = checks.quantize(build("nf4", icq=True, tau_steps=steps), GOLDEN[f"{case}.W"])
    assert torch.equal(bytes_of(packed), GOLDEN[f"{case}.icq_{steps}.packed"].flatten())
    assert torch.equal(packed["tau"], GOLDEN[f"{case}.icq_{steps}.tau_idx"].flatten())
    assert torch.allclose(
        packed["tau_absmax"], GOLDEN[f"{case}.icq_{steps}.tau_absmax"].flatten(), rtol=2e-7, atol=0
    )


def test_installed_bitsandbytes_gives_the_same():
    """Against the package itself, where there is one; its CPU code rounds scales to 65536 points
    before coding them.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    weight_OI = torch.randn(256, 4096, generator=torch.Generator().manual_seed(5))
    packed = checks.quantize(build("nf4"), weight_OI)
    codes, state = functional.quantize_4bit(
        weight_OI, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(bytes_of(packed), codes.flatten())
    assert torch.equal(packed["scale_absmax"], state.state2.absmax)
    apart = (packed["scale"].int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.004
    plain = checks.quantize(build("nf4", double_quant=False), weight_OI)
    assert torch.equal(
        plain["scale"],
        functional.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")[1].absmax,
    )
