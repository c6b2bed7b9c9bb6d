"""Packed weights with random bits, for tests of what reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from llq_hf.method import Method, Packed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(y: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return float((y.double() - expected).norm() / expected.norm())


def random_packed(method: Method, out_features: int, in_features: int) -> Packed:
    """Random tensors of a method's layout, valid where not all values are."""
    random, packed = generator(5), {}
    for key, spec in method.layout(out_features, in_features).items():
        if key == "order":
            packed[key] = torch.randperm(in_features, generator=random).to(spec.dtype)
        elif key == "widths":
            cycle = torch.tensor([0, -1, 0, 1]) + int(method.bits)
            packed[key] = cycle.repeat(-(-spec.shape[0] // 4))[: spec.shape[0]].to(spec.dtype)
        elif spec.dtype.is_floating_point:
            packed[key] = (torch.rand(spec.shape, generator=random) + 0.5).to(spec.dtype)
        elif key == "seeds":
            packed[key] = torch.randint(0, 2**31 - 1, spec.shape, generator=random).to(spec.dtype)
        else:
            info = torch.iinfo(spec.dtype)
            bits = torch.randint(info.min, info.max, spec.shape, generator=random)
            packed[key] = bits.to(spec.dtype)
    if "position" in packed:  # a list of positions: only one that belongs to a mask can be read
        positions = method._positions(out_features, in_features)
        mask_N = torch.zeros(positions.total, dtype=torch.bool)
        mask_N[torch.randperm(positions.total, generator=random)[: positions.count]] = True
        packed.update(positions.pack(mask_N))
    return packed
