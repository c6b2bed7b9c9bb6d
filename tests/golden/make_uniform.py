"""Rewrites uniform.json from reference results of the authors' own code (shared/golden)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPOSITORIES = {"rtn": "IST-DASLab/gptq", "gptq": "IST-DASLab/gptq", "quip": "Cornell-RelaxML/QuIP"}
COMMIT_OF = {"rtn": "gptq", "gptq": "gptq", "quip": "QuIP"}


def row_of(run: dict) -> dict:
    options = {"bits": run["bits"]}
    if run["method"] in ("rtn", "gptq"):
        options |= {"group_size": run["group"], "sym": run["sym"]}
    if run["method"] == "gptq":
        options |= {key: run[key] for key in ("act_order", "true_sequential", "static_groups")}
    if run["method"] == "quip":
        options |= {
            "incoherence": run["incoh"],
            "rescale": run["rescale"],
            "blocked": run["pre_proj_extra"] == 0,
        }
        options |= {} if run["incoh"] else {"blocked": False}
    row = {
        "method": run["method"],
        "options": options,
        "ppl": run["ppl"],
        "weight_error": run["weight_rel_mse"],
    }
    return row | ({"reference_seed": run["seed"]} if run["method"] == "quip" else {})


def main(shared: Path) -> None:
    results = json.loads((shared / "golden" / "reference_results_a.json").read_text())
    model = results["models"]["stories260K"]
    runs = [
        r for r in model["runs"] if r["method"] in REPOSITORIES and r.get("quant", "ldlq") == "ldlq"
    ]
    golden = {
        "what": "Perplexity and weight error of stories260K quantized by the authors' own code on "
        "a CPU in fp32. ppl: 200 windows of 256, fp32 logits; weight_error: sum (W - What)^2 / sum "
        "W^2 over the linears of all blocks; calibration: 128 windows of 256.",
        "code": {
            name: {"repository": repository, "commit": results["commits"][COMMIT_OF[name]]}
            for name, repository in REPOSITORIES.items()
        },
        "files": {
            "model": model["dir"],
            "model_sha256": model["safetensors_sha256"],
            "calibration": model["calib"],
            "calibration_sha256": model["calib_sha256"],
            "evaluation": model["eval"],
            "evaluation_sha256": model["eval_sha256"],
            "windows": model["eval_windows_used"],
        },
        "full_precision_ppl": next(r["ppl"] for r in model["runs"] if r["method"] == "fp"),
        "rows": [row_of(run) for run in runs],
    }
    Path(__file__).with_name("uniform.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
