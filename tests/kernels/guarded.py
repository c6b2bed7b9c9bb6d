"""Runs the CPU kernels on tensors that end where readable memory ends.

    python tests/kernels/guarded.py [--stray] avx2=PATH_OF_LIBRARY ...

A kernel that reads or writes a byte too many is killed by SIGSEGV. --stray makes one do so, which
shows that this would be seen.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

STRAY = "--stray"
PAGE = mmap.PAGESIZE
ROWS = 21  # no whole tiles
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last one of a page that nothing readable follows."""
    count = tensor.numel() * tensor.element_size()
    pages = -(-max(count, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = pages * PAGE
    assert LIBC.mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(PAGE), 0) == 0
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=end - count)
    copy = raw.view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def main() -> None:
    from contract.random_weights import random_packed

    from llq_hf import kernels
    from llq_hf.kernels import native
    from llq_hf.methods import build

    stray = STRAY in sys.argv
    paths = dict(each.split("=") for each in sys.argv[1:] if each != STRAY)
    empty = torch.empty
    torch.empty = lambda *shape, **options: guarded(empty(*shape, **options))  # outputs too
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("rtn", {"bits": bits, "group_size": group, "sym": sym}, columns)
        for bits in (2, 4, 7, 8)
        for group in (16, 64, 48, 20, -1)
        for sym in (False, True)
        for columns in (8, 72, 200, 576)
    ]
    cases += [("slim_llm", {"bits": 2}, 512), ("smoothquant", {"bits": 8}, 200)]
    cases += [("nf4", {"bits": bits}, columns) for bits in (3, 4) for columns in (128, 576, 1024)]
    cases += [
        (name, {}, columns)
        for name in ("db_llm", "billm", "pb_llm")
        for columns in (128, 576, 1024)
    ]
    calls = 0
    for isa, path in paths.items():
        found = native.Backend(isa, Path(path), ctypes.CDLL(path))
        native.backend = lambda found=found: found
        for name, options, columns in [] if stray else cases:
            method = build(name, **options)
            packed = random_packed(method, ROWS, columns)
            packed = {key: guarded(tensor) for key, tensor in packed.items()}
            for tokens, dtype in ((1, torch.bfloat16), (3, torch.float32), (20, torch.bfloat16)):
                x = guarded(torch.ones(tokens, columns, dtype=dtype))
                method.linear(x, packed, None, ROWS)
                calls += 1
    if stray:
        method = build("rtn", bits=4)
        packed = random_packed(method, 64, 128)
        stored = method.grid.readable({k: guarded(t) for k, t in packed.items()}, 128)
        given = native.structs(stored)
        given[0].rows += 1
        out_RI = torch.empty(65, 128)
        native._function(kernels.UniformCodes, "decode")(
            given, 1, 128, 64, 65, native.DTYPES[out_RI.dtype], out_RI.data_ptr(), 1
        )
    print(f"all {calls} calls kept to their tensors")


if __name__ == "__main__":
    main()
