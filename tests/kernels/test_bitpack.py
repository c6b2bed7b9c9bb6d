"""Dense packing against a literal reading of its layout, bit by bit."""

from __future__ import annotations

import pytest
import torch

from llq_hf.kernels.bitpack import count_ones, pack, packed_words, plane_widths, unpack

WIDTHS = range(1, 9)
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 172, 255, 256, 300, 513]


def random_codes(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(
        0, 1 << bits, shape, generator=torch.Generator().manual_seed(sum(shape) + bits)
    )


def literal(codes: list[int], bits: int) -> bytes:
    """The layout read aloud: blocks of 128 codes, then units of 32; planes, widest first; chunks;
    fields of a byte.
    """
    out = bytearray()
    while codes:
        size = 128 if len(codes) >= 128 else 32
        block, codes = codes[:size] + [0] * (size - len(codes[:size])), codes[size:]
        low = bits
        for width in (8, 4, 2, 1):
            if not bits & width:
                continue
            low -= width
            chunk_bytes = 16 if size == 128 else 4 * width
            per_chunk = chunk_bytes * 8 // width
            for chunk in range(size // per_chunk):
                for byte in range(chunk_bytes):
                    value = 0
                    for place in range(8 // width):
                        code = block[chunk * per_chunk + place * chunk_bytes + byte]
                        value |= (code >> low & ((1 << width) - 1)) << place * width
                    out.append(value)
    return bytes(out)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_round_trip(n: int, bits: int):
    codes = random_codes(3, n, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, packed_words(n, bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, n), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 32, 40, 128, 172, 300])
def test_bits_lie_where_the_layout_says(n: int, bits: int):
    codes = random_codes(2, n, bits=bits)
    for row, packed in zip(codes, pack(codes, bits), strict=True):
        assert packed.view(torch.uint8).numpy().tobytes() == literal(row.tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_exactly_b_bits_a_code(bits: int):
    assert packed_words(4096, bits) * 32 == 4096 * bits
    assert packed_words(14336, bits) * 32 == 14336 * bits
    for n in LENGTHS:  # a tail pays for at most 31 codes
        assert 0 <= packed_words(n, bits) * 32 - n * bits < 32 * bits


def test_planes_are_the_binary_expansion():
    assert [plane_widths(bits) for bits in WIDTHS] == [
        [1],
        [2],
        [2, 1],
        [4],
        [4, 1],
        [4, 2],
        [4, 2, 1],
        [8],
    ]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.float32], ids=str)
def test_a_code_out_of_range_is_refused(bits: int, dtype: torch.dtype):
    for wrong in (1 << bits, -1):
        codes = torch.zeros(2, 40, dtype=dtype)
        codes[1, 39] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            pack(codes, bits)


def test_shapes_of_any_rank_and_views():
    codes = random_codes(2, 3, 172, bits=5)
    assert torch.equal(unpack(pack(codes, 5), 5, 172), codes.to(torch.uint8))
    flat = random_codes(77, bits=3)
    assert torch.equal(unpack(pack(flat, 3), 3, 77), flat.to(torch.uint8))
    turned = random_codes(172, 6, bits=3).T  # not contiguous
    assert torch.equal(unpack(pack(turned, 3), 3, 172), turned.to(torch.uint8))
    assert torch.equal(unpack(pack(turned, 3)[::2], 3, 172), turned[::2].to(torch.uint8))


def test_floats_that_are_not_whole_never_reach_the_file_as_their_neighbours():
    with pytest.raises(ValueError):  # noqa: PT011 (any text: what matters is that nothing is stored)
        pack(torch.tensor([float("nan"), 0.0]), 4)


def test_ones_are_counted():
    words = torch.tensor([[0, -1], [1, -(1 << 31)]], dtype=torch.int32)
    assert count_ones(words) == 0 + 32 + 1 + 1
