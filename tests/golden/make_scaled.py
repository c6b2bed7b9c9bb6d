"""Rewrites scaled.json from reference results of the authors' own code (shared/golden)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPOSITORIES = {
    "awq": ("mit-han-lab/llm-awq", "llm-awq"),
    "smoothquant": ("mit-han-lab/smoothquant", "smoothquant"),
}


def row_of(run: dict) -> dict:
    if run["method"] == "awq":
        options = {
            "bits": run["bits"],
            "group_size": run["group"],
            "sym": run["sym"],
            "ratios": run["n_grid"],
        }
        options["ranges"] = "clip" if run["clip"] else "full"
    else:
        options = {"bits": run["wbits"], "a_bits": run["abits"], "quantize_bmm_input": run["bmm"]}
        options |= {"smooth": False} if run["alpha"] is None else {"alpha": run["alpha"]}
    row = {
        "method": run["method"],
        "options": options,
        "ppl": run["ppl"],
        "weight_error": run["weight_rel_mse"],
    }
    return row | ({"ratios": run["ratios"]} if "ratios" in run else {})


def main(shared: Path) -> None:
    results = json.loads((shared / "golden" / "reference_results_a.json").read_text())
    model = results["models"]["stories260K"]
    golden = {
        "what": "Perplexity, weight error and chosen ratios (q/k/v, gate/up, down, block by block) "
        "of stories260K quantized by the authors' own code on a CPU in fp32. ppl: 200 windows of "
        "256, fp32 logits; weight_error: sum (W - What)^2 / sum W^2 over the linears of all "
        "blocks; calibration: 128 windows of 256. AWQ's clip search is patched to work with one "
        "group a row.",
        "code": {
            name: {"repository": repository, "commit": results["commits"][key]}
            for name, (repository, key) in REPOSITORIES.items()
        },
        "files": {
            "model": model["dir"],
            "calibration": model["calib"],
            "calibration_sha256": model["calib_sha256"],
            "evaluation": model["eval"],
            "evaluation_sha256": model["eval_sha256"],
            "windows": model["eval_windows_used"],
        },
        "rows": [row_of(run) for run in model["runs"] if run["method"] in REPOSITORIES],
    }
    Path(__file__).with_name("scaled.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
