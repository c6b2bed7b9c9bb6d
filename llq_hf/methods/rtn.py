"""RTN: round to nearest, the baseline of every study.

Idea
    Each group of `group_size` consecutive weights of a row has its own uniform grid, whose range
    always contains zero. Each weight is rounded to the nearest of the 2**bits levels. There is no
    calibration data and no error compensation, so RTN shows what the other methods gain by them.

    The study's rows are IST-DASLab/gptq's `--nearest` (per channel, asymmetric: `group_size=-1`)
    and the same grid on groups of 128. Its 8.5 at 4 bits and group 128 is worse than what this grid
    gives on most models; which grid the authors used is unknown.

Storage (uniform grid; G = ceil(I / group_size) groups)
    name    shape                 dtype   bits per weight
    weight  [O, I * bits / 32]    int32   bits
    scale   [O, G]                fp16    16 / group_size (fp32, twice that, with scale_bits=32)
    zero    [O * G * bits / 32]   int32   bits / group_size (absent if sym)

Departures
    Scales are rounded to the stored fp16 before codes are chosen. (The authors keep fp32 and cast
    later.)

Presets
    "best" searches the range of each group for the least sum of |error|**2.4. It stores the same
    bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..method import Job, Packed
from ..numerics.grids import Uniform
from ..numerics.stats import Stat
from .uniform import OnUniformGrid


@dataclass(frozen=True, kw_only=True)
class RTN(OnUniformGrid):
    """group_size: -1 is one group per row. sym: symmetric grids, no zero points. search_range:
    shrink each range to the least error. scale_bits: 16 or 32.
    """

    name: ClassVar[str] = "rtn"
    title: ClassVar[str] = "RTN (round to nearest)"
    best: ClassVar[dict[str, Any]] = {"search_range": True}
    # How their codes were found is not known here; what is stored is this grid. (AWQ's input scales
    # are folded into the layers before.)
    adopts: ClassVar[tuple[str, ...]] = ("awq", "compressed-tensors")

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    search_range: bool = False
    scale_bits: int = 16

    def check(self) -> None:
        _ = self.grid  # validates group_size and scale_bits

    @cached_property
    def grid(self) -> Uniform:
        return Uniform(self.bits, self.group_size, self.sym, self.search_range, self.scale_bits)

    def quantize(self, weight_OI: Tensor, stat: Stat | None, job: Job) -> Packed:
        grid_OG = self.grid.grids(weight_OI)
        codes_OI = self.grid.spread(grid_OG, weight_OI.shape[1]).codes(weight_OI, self.bits)
        return self.grid.pack(codes_OI, grid_OG)
