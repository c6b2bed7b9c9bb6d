"""Spec 2: round to nearest, row by row, slice by slice, weight by weight."""

from __future__ import annotations

from reference.grid import code_of, grid_of


def rtn(rows: list[list[float]], bits: int, group_size: int, sym: bool, scale_bits: int = 32):
    """codes [O][I], scales [O][G], zeros [O][G]; the last group may be shorter."""
    codes, scales, zeros = [], [], []
    for row in rows:
        size = len(row) if group_size == -1 else group_size
        codes.append([])
        scales.append([])
        zeros.append([])
        for start in range(0, len(row), size):
            piece = row[start : start + size]
            scale, zero = grid_of(piece, bits, sym, scale_bits)
            scales[-1].append(scale)
            zeros[-1].append(zero)
            codes[-1] += [code_of(x, scale, zero, bits) for x in piece]
    return codes, scales, zeros
