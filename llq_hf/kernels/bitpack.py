"""Pack codes of b = 1..8 bits densely: exactly b bits a code, so 3 bits cost 3.0.

Legend: n codes per row, W int32 words per row.

Blocks: a row is cut into blocks of 128 codes. The rest is cut into units of 32 codes, the last one
padded with zeros, so a tail never pays for a whole block.

Planes: a block of b-bit codes is the concatenation of *planes* whose widths are the binary
expansion of b, widest first: 3 = 2 + 1, 5 = 4 + 1, 7 = 4 + 2 + 1. The widest plane holds the most
significant bits.

Chunks: in a plane of width v, a *chunk* of 16 bytes (of 4v bytes in a 32-code unit) holds 128 / v
codes (32 in a unit). Field f of byte j, its bits f*v .. f*v+v-1, is code f * 16 + j of the chunk
(f * 4v + j in a unit).

Why this order: decoding shifts and masks whole vectors, its results are in column order without a
gather, and a fast kernel only has to interleave rows. In the bit streams of GPTQ's format, 3-bit
codes straddle words.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

BLOCK, UNIT = 128, 32
SLOT = 16  # columns that kernels read at once
_CHUNK_BYTES = 16


def plane_widths(bits: int) -> list[int]:
    """The binary expansion of `bits`, widest first: 7 -> [4, 2, 1]."""
    return [v for v in (8, 4, 2, 1) if bits & v]


def packed_words(n: int, bits: int) -> int:
    """int32 words that hold `n` codes of `bits` bits: 4 * bits for each 128, bits for each further
    32 or less.
    """
    return n // BLOCK * 4 * bits + -(-(n % BLOCK) // UNIT) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., n] in 0..2**bits - 1 -> int32 [..., packed_words(n, bits)].

    Raises ValueError on a code outside this range, which would wrap around to another weight.
    """
    least, most = map(int, torch.aminmax(codes)) if codes.numel() else (0, 0)
    if least < 0 or most >= 1 << bits:
        raise ValueError(f"codes span {least}..{most}, which {bits} bits cannot hold")
    n = codes.shape[-1]
    whole = n // BLOCK * BLOCK
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -(n - whole) % UNIT))
    parts = [
        _pack_blocks(codes[..., :whole], bits, BLOCK),
        _pack_blocks(codes[..., whole:], bits, UNIT),
    ]
    return torch.cat(parts, dim=-1).contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., packed_words(n, bits)] -> uint8 codes [..., n]; the inverse of `pack`."""
    whole = n // BLOCK * BLOCK
    as_bytes = packed.contiguous().view(torch.uint8)
    split = whole * bits // 8
    head = _unpack_blocks(as_bytes[..., :split], bits, BLOCK)
    if n == whole:
        return head
    tail = _unpack_blocks(as_bytes[..., split:], bits, UNIT)
    return torch.cat([head, tail], dim=-1)[..., :n]


def _chunks(width: int, block: int) -> tuple[int, int, int]:
    """How a plane of a block is cut: (chunks, fields per byte, bytes per chunk)."""
    chunk_bytes = _CHUNK_BYTES if block == BLOCK else UNIT * width // 8
    return block * width // 8 // chunk_bytes, 8 // width, chunk_bytes


def _shifts(width: int, like: Tensor) -> Tensor:
    return torch.arange(8 // width, device=like.device, dtype=torch.uint8).unsqueeze(-1) * width


def _pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """uint8 codes [..., k * block] -> bytes [..., k * block * bits / 8]."""
    lead, count = codes.shape[:-1], codes.shape[-1] // block
    blocks = codes.reshape(*lead, count, block)
    planes, low = [], bits
    for width in plane_widths(bits):
        low -= width  # this plane holds bits low .. low + width - 1 of every code
        plane = (blocks >> low).bitwise_and_((1 << width) - 1)
        fields = plane.view(*lead, count, *_chunks(width, block)).bitwise_left_shift_(
            _shifts(width, codes)
        )
        planes.append(reduce(torch.bitwise_or, fields.unbind(-2)).flatten(-2))
    return torch.cat(planes, dim=-1).reshape(*lead, count * block * bits // 8)


def _unpack_blocks(as_bytes: Tensor, bits: int, block: int) -> Tensor:
    """Bytes [..., k * block * bits / 8] -> uint8 codes [..., k * block]."""
    lead, count = as_bytes.shape[:-1], as_bytes.shape[-1] * 8 // (block * bits)
    blocks = as_bytes.reshape(*lead, count, block * bits // 8)
    codes: Tensor | None = None
    start = 0
    for width in plane_widths(bits):
        stop = start + block * width // 8
        chunks, _, chunk_bytes = _chunks(width, block)
        plane = blocks[..., start:stop].reshape(*lead, count, chunks, 1, chunk_bytes)
        plane = ((plane >> _shifts(width, as_bytes)) & ((1 << width) - 1)).reshape(
            *lead, count, block
        )
        codes = plane if codes is None else (codes << width) | plane
        start = stop
    assert codes is not None
    return codes.reshape(*lead, count * block)


def count_ones(words: Tensor) -> int:
    """Number of bits that are set in an int32 tensor."""
    of_byte_256 = torch.tensor(
        [byte.bit_count() for byte in range(256)], dtype=torch.int32, device=words.device
    )
    return int(of_byte_256[words.view(torch.uint8).int()].sum())
