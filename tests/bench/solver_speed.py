"""Measures one GPTQ solve beside the algorithm as its authors wrote it, on the same matrix.

    python tests/bench/solver_speed.py [--shape 4096x4096] [--bits 4] [--rounds 3] [--threads 1]

The other side is the published algorithm in its published order of operations (one column after
the other, an outer product for each, the grid of a group when it is reached), with the same torch
operations and the same Cholesky factor. Both must choose the same codes; the ratio of medians is
what counts. With one thread, its own seconds count (time.thread_time), so that a shared machine's
other work does not; with more threads, the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llq_hf.kernels.bitpack import unpack
from llq_hf.method import Job
from llq_hf.methods import build
from llq_hf.numerics.stats import PairedHessian

GROUP = BLOCK = 128


def published(weight_OI: Tensor, H_II: Tensor, bits: int, damp: float = 0.01) -> Tensor:
    """Codes [O, I]."""
    W_OI, columns, top = weight_OI.clone(), weight_OI.shape[1], 2**bits - 1
    codes_OI = torch.zeros_like(W_OI)
    dead_I = torch.diag(H_II) == 0
    H_II[dead_I, dead_I] = 1
    W_OI[:, dead_I] = 0
    diagonal = torch.arange(columns)
    H_II[diagonal, diagonal] += damp * torch.mean(torch.diag(H_II))
    U_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H_II)), upper=True)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block_OB, U_BB = W_OI[:, first:last].clone(), U_II[first:last, first:last]
        errors_OB = torch.zeros_like(block_OB)
        for i in range(last - first):
            w_O, d = block_OB[:, i], U_BB[i, i]
            if (first + i) % GROUP == 0:
                group = W_OI[:, first + i : first + i + GROUP]
                low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
                # As stored, so that codes can be compared
                scale_O = ((high - low) / top).half().float()
                zero_O = torch.round(-low / scale_O)
            code_O = torch.clamp(torch.round(w_O / scale_O) + zero_O, 0, top)
            codes_OI[:, first + i] = code_O
            error_O = (w_O - scale_O * (code_O - zero_O)) / d
            block_OB[:, i:] -= error_O.unsqueeze(1).matmul(U_BB[i, i:].unsqueeze(0))
            errors_OB[:, i] = error_O
        W_OI[:, last:] -= errors_OB.matmul(U_II[first:last, last:])
    return codes_OI


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    result = work()
    return now() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="out_features x in_features")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, columns = map(int, args.shape.split("x"))
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=random) * columns**-0.5
    stat = PairedHessian(columns, torch.device("cpu"))
    stat.update(torch.randn(2 * columns, columns, generator=random), 128)
    method = build("gptq", bits=args.bits)
    ours, theirs = [], []
    for round_number in range(args.rounds):
        seconds, codes_OI = timed(lambda: published(weight_OI, stat.H_II, args.bits))
        theirs.append(seconds)
        seconds, packed = timed(lambda: method.quantize(weight_OI, stat, Job("x"))["weight"])
        ours.append(seconds)
        same = float((unpack(packed, args.bits, columns) == codes_OI).float().mean())
        print(
            f"round {round_number + 1}: published {theirs[-1]:.2f} s, llq {ours[-1]:.2f} s, "
            f"same codes {same:.4%}"
        )
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"llq / published = {ratio:.2f}  ({args.shape}, {args.bits} bits, threads: {args.threads})"
    )


if __name__ == "__main__":
    main()
