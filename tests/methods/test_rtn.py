"""RTN: equal to its literal loop code for code, and as many bits as the study's tables say."""

from __future__ import annotations

import pytest
import torch
from contract import checks
from reference.grid import value_of
from reference.rtn import rtn

from llq_hf.kernels.bitpack import unpack
from llq_hf.method import stored_bits
from llq_hf.methods import build


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sym", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((16, 32), -1), ((16, 32), 8), ((24, 160), 128), ((20, 45), 16)]
)
@pytest.mark.parametrize("scale_bits", [16, 32])
def test_equals_the_literal_loops(
    bits: int, sym: bool, shape: tuple[int, int], group_size: int, scale_bits: int
):
    weight_OI = checks.weight(*shape)
    method = build("rtn", bits=bits, group_size=group_size, sym=sym, scale_bits=scale_bits)
    packed = checks.quantize(method, weight_OI)
    codes, scales, zeros = rtn(weight_OI.tolist(), bits, group_size, sym, scale_bits)
    assert torch.allclose(
        packed["scale"].float(), torch.tensor(scales), rtol=1e-6 if scale_bits == 32 else 0, atol=0
    )
    different = (unpack(packed["weight"], bits, shape[1]) != torch.tensor(codes)).float().mean()
    assert different == 0
    if not sym:
        assert unpack(packed["zero"], bits, len(scales) * len(scales[0])).tolist() == [
            z for row in zeros for z in row
        ]
    size = shape[1] if group_size == -1 else group_size
    expected = [
        [value_of(code, scales[o][i // size], zeros[o][i // size]) for i, code in enumerate(row)]
        for o, row in enumerate(codes)
    ]
    assert torch.allclose(
        checks.restore(method, packed, weight_OI), torch.tensor(expected), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize(("bits", "most"), [(4, 4.16), (3, 3.15), (2, 2.15)])
def test_bits_stored_in_groups_of_128_are_those_of_the_tables(name: str, bits: int, most: float):
    method = build(name, bits=bits, group_size=128)
    stored = stored_bits(method.layout(4096, 4096), 4096, 4096)
    assert stored <= most
    assert stored == pytest.approx(bits + (16 + bits) / 128)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_scale_that_fp16_cannot_hold_is_refused_and_a_tiny_one_is_not_zero(bits: int):
    from llq_hf.common.errors import LLQError

    weight_OI = checks.weight(4, 32) * 1e-9
    packed = checks.quantize(build("rtn", bits=bits), weight_OI)
    assert (packed["scale"] > 0).all()
    assert torch.isfinite(checks.restore(build("rtn", bits=bits), packed, weight_OI)).all()
    with pytest.raises(LLQError, match="too large"):
        checks.quantize(build("rtn", bits=bits), checks.weight(4, 32) * 1e9)
