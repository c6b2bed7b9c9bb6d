"""Storage of SliM-LLM: packs and unpacks codes of up to three widths and the grids of groups.

Legend: O out_features, I in_features, G groups, g weights of a group, K blocks of codes.

The head of this package lists the stored tensors. Nothing is rounded here but zeros, by
`round_zero`.

Codes
    `weight` is three runs: all groups of bits - 1, then of bits, then of bits + 1, each packed as
    kernels/bitpack.py says. So a kernel reads three matrices of a fixed width, over the columns in
    the order of argsort(widths). The size is known before the allocation is, because a short last
    group keeps `bits`. Runs that are no multiple of 32 columns are padded.

Zeros
    A zero is a fixed-point number of 4 bits, in steps of 2**width / 16. Up to 4 bits it holds each
    whole zero exactly; in wider groups every 2nd to 16th. In a group of 1 bit it holds the mean, to
    1/16 of the distance of the two levels. An fp16 mean would be a second scale (16 bits more), and
    the number of such groups is not known before the search. So every width costs 20 / group_size
    more: 2.156 bits at 2 bits and groups of 128. scale_bits=32 stores exact means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import LLQError
from ...common.spec import Spec
from ...kernels import Part, UniformCodes, once
from ...kernels.bitpack import BLOCK, pack, packed_words, unpack
from ...method import Packed
from ...numerics.grids import checked_scale
from .levels import Levels

FEWEST_GROUPS = 4  # with fewer the authors' search has no candidates


@dataclass(frozen=True)
class Storage:
    """Layout of linears whose groups have bits - 1, bits or bits + 1 bits.

    pairs: how many groups have bits - 1, and as many bits + 1; -1: as the allocation decides.
    """

    bits: int
    group_size: int
    scale_bits: int
    pairs: int

    @property
    def exact(self) -> bool:
        """Whether scales and means are fp32: then the authors' grids are stored as they are."""
        return self.scale_bits == 32

    @property
    def zero_bits(self) -> int:
        return 8 if self.exact else 4

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def most_pairs(self, in_features: int) -> int:
        """The most groups that can get bits - 1, and as many bits + 1."""
        whole = in_features // self.group_size
        if self.pairs == -1:
            groups = self.groups(in_features)
            return groups // 2 - 1 if groups >= FEWEST_GROUPS else 0
        if 2 * self.pairs > whole:
            raise LLQError(
                f"pairs={self.pairs} takes {2 * self.pairs} whole groups; "
                f"{in_features} columns have {whole}"
            )
        return self.pairs

    # --- zeros ------------------------------------------------------------------------------------

    def zero_steps(self, width: Tensor) -> Tensor:
        """Steps of a stored zero in one step of the codes of `width` bits."""
        return torch.exp2(self.zero_bits - width.float())

    def round_zero(self, zero: Tensor, width: int | Tensor) -> Tensor:
        """Zeros, in steps of the codes, rounded to the fixed-point numbers that are stored."""
        if isinstance(width, int):
            steps: float | Tensor = 2.0 ** (self.zero_bits - width)
        else:
            steps = self.zero_steps(width)
        return torch.round(zero * steps).clamp_(0, 2**self.zero_bits - 1) / steps

    # --- layout, packing, unpacking ---------------------------------------------------------------

    def _words(self, in_features: int, pairs: int) -> int:
        """int32 words of a row in which `pairs` groups have a bit less, and as many a bit more."""
        moved = pairs * self.group_size
        columns = {self.bits - 1: moved, self.bits: in_features - 2 * moved, self.bits + 1: moved}
        return sum(packed_words(count, width) for width, count in columns.items())

    def layout(self, out_features: int, in_features: int) -> dict[str, Spec]:
        groups = self.groups(in_features)
        # The allocation is not known yet; the sizes that it may give differ by padding only.
        most = self.most_pairs(in_features)
        words = max(self._words(in_features, pairs) for pairs in range(most + 1))
        layout = {
            "weight": Spec((out_features, words), torch.int32),
            "scale": Spec((out_features, groups), torch.float32 if self.exact else torch.float16),
            "zero": Spec((packed_words(out_features * groups, self.zero_bits),), torch.int32),
            "widths": Spec((groups,), torch.uint8),
        }
        if self.exact and self.bits == 2:
            layout["mean"] = Spec((out_features, groups), torch.float32)
        return layout

    def _runs(
        self, widths: list[int], in_features: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """(width, columns of all groups of this width), narrow to wide."""
        parts = torch.split(torch.arange(in_features, device=device), self.group_size)
        for width in sorted(set(widths)):
            own = [part for part, other in zip(parts, widths, strict=True) if other == width]
            yield width, torch.cat(own)

    def pack(self, codes_OI: Tensor, levels_OG: Levels, widths: list[int]) -> Packed:
        """The stored tensors of codes and grids, both in the model's order of columns."""
        layout, device = self.layout(*codes_OI.shape), codes_OI.device
        runs = self._runs(widths, codes_OI.shape[1], device)
        weight = torch.cat([pack(codes_OI[:, columns], width) for width, columns in runs], dim=1)
        widths_G = torch.tensor(widths, dtype=torch.uint8, device=device)
        packed = {
            "weight": F.pad(weight, (0, layout["weight"].shape[1] - weight.shape[1])),
            "scale": checked_scale(levels_OG.scale, layout["scale"].dtype),
            "zero": pack((levels_OG.zero * self.zero_steps(widths_G)).flatten(), self.zero_bits),
            "widths": widths_G,
        }
        return {**packed, "mean": levels_OG.mean.contiguous()} if "mean" in layout else packed

    def widths(self, packed: Packed, in_features: int) -> list[int]:
        """The stored width of each group. LLQError for an allocation that `pack` does not store: it
        would read codes from behind the end of a row.
        """
        widths: list[int] = packed["widths"].tolist()
        fewer, same, more = (widths.count(self.bits + step) for step in (-1, 0, 1))
        short = in_features % self.group_size != 0 and widths[-1] != self.bits
        if fewer + same + more < len(widths) or fewer != more or short:
            raise LLQError(f"widths {widths} are no allocation of {self.bits} bits a weight")
        if fewer > self.most_pairs(in_features):
            raise LLQError(f"widths move bits between more groups than pairs={self.pairs} allows")
        return widths

    def unpack(self, packed: Packed, out_features: int, in_features: int) -> Tensor:
        """fp32 weight [O, I] of the stored tensors."""
        # 1. Codes, one run after the other.
        weight = packed["weight"]
        weight_OI = torch.empty(out_features, in_features, device=weight.device)
        widths = once(packed, lambda: self.widths(packed, in_features), "widths")
        start = 0
        for width, columns in self._runs(widths, in_features, weight.device):
            stop = start + packed_words(len(columns), width)
            weight_OI[:, columns] = unpack(weight[:, start:stop], width, len(columns)).float()
            start = stop
        # 2. Grids.
        scale_OG = packed["scale"].float()
        zero_OG = unpack(packed["zero"], self.zero_bits, scale_OG.numel()).view_as(scale_OG)
        zero_OG = zero_OG / self.zero_steps(packed["widths"])
        # 3. Values in place: whole groups, then a short last one.
        whole = in_features // self.group_size
        end = whole * self.group_size
        head_OGg = weight_OI[:, :end].view(out_features, whole, self.group_size)
        tail_O1g = weight_OI[:, None, end:]
        for part, groups in ((head_OGg, slice(whole)), (tail_O1g, slice(whole, None))):
            if part.numel():
                part.sub_(zero_OG[:, groups, None]).mul_(scale_OG[:, groups, None])
            if part.numel() and "mean" in packed:
                part.add_(packed["mean"][:, groups, None])
        return weight_OI

    def view(self, packed: Packed, in_features: int) -> UniformCodes | None:
        """The codes as kernels read them: one part for each width.

        None if groups are no whole blocks of codes or have means.
        """
        if self.group_size % BLOCK or in_features % BLOCK or "mean" in packed:
            return None
        widths_G = packed["widths"]
        widths = once(packed, lambda: self.widths(packed, in_features), "widths")
        parts = []
        start = 0
        blocks_K = torch.arange(in_features // BLOCK, dtype=torch.int32, device=widths_G.device)
        widths_K = widths_G.repeat_interleave(self.group_size // BLOCK)[: len(blocks_K)]
        for width in sorted(set(widths)):
            blocks = blocks_K[widths_K == width]
            columns = len(blocks) * BLOCK
            parts.append(Part(width, columns, start, blocks, 2.0 ** (width - self.zero_bits)))
            start += packed_words(columns, width) * 4
        return UniformCodes(
            packed["weight"],
            in_features,
            tuple(parts),
            packed["scale"],
            packed["zero"],
            self.group_size,
            self.zero_bits,
        )
