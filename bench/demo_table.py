"""The table of README: every method and width on the bundled demo model, through lm-eval as a user would run it.

    uv run python bench/demo_table.py [--out FILE.md]

One process, CPU; the seconds are of quantizing (calibration included), side by side in one run on one machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lm_eval
import torch

ROWS: list[tuple[str, dict[str, object]]] = [
    ("full precision", {"method": "none"}),
    *((f"RTN, {bits} bits", {"method": "rtn", "bits": bits}) for bits in (8, 4, 3, 2)),
    *((f"GPTQ, {bits} bits", {"method": "gptq", "bits": bits}) for bits in (8, 4, 3, 2)),
    *((f"GPTQ, {bits} bits, `preset=best`", {"method": "gptq", "bits": bits, "preset": "best"}) for bits in (3, 2)),
    *((f"GPTQ, {bits} bits, per channel", {"method": "gptq", "bits": bits, "group_size": -1}) for bits in (4, 2)),
    *((f"QuIP, {bits} bits", {"method": "quip", "bits": bits}) for bits in (8, 4, 3, 2)),
    *((f"QuIP, {bits} bits, `preset=best`", {"method": "quip", "bits": bits, "preset": "best"}) for bits in (8, 3, 2)),
]


def score(args: dict[str, object], cache: str) -> tuple[float, float, dict[str, object], float]:
    """(perplexity, accuracy, what was scored, seconds to load or quantize) of one row."""
    from lm_eval.models import huggingface  # noqa: F401 (registers what the hook extends)

    from llq_hf.lm_eval import LLQLM

    started = time.perf_counter()
    model = LLQLM(pretrained="demo", cache_dir=cache, batch_size=16, device="cpu", **args)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    found = lm_eval.simple_evaluate(model=model, tasks=["llq_demo"], verbosity="ERROR")
    results = found["results"]
    ppl = results["llq_demo_ppl"]["token_perplexity,none"]
    return ppl, results["llq_demo_mc"]["acc,none"], model.get_model_info()["llq"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    out, only = (lambda a: (a.out, a.only))(parser.parse_args())
    lines = ["| | nominal bits | stored bits | perplexity | accuracy | seconds |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, args in ROWS:
            if only not in name:
                continue
            ppl, accuracy, info, seconds = score(args, cache)
            nominal, stored = info.get("nominal_bits"), info.get("stored_bits")
            packed = isinstance(nominal, float) and isinstance(stored, float)
            bits = f"{nominal:g} | {stored:.3f}" if packed else "16 | 16"
            lines.append(f"| {name} | {bits} | {ppl:.3f} | {100 * accuracy:.1f} % | {seconds:.0f} |")
            print(lines[-1], flush=True)
    lines.append(f"\nCPU, {torch.get_num_threads()} threads, torch {torch.__version__}.")
    print(lines[-1])
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
