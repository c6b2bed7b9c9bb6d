"""Rewrites pb_llm.safetensors and billm.safetensors from what the authors' own classes gave
(shared/golden).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SOURCES = {
    "pb_llm": "hahnyuan/PB-LLM fe85da9",
    "billm": "Aaronhuang-778/BiLLM dc137eb",
}


def main(shared: Path) -> None:
    here = Path(__file__).parent
    problem = torch.load(shared / "golden" / "pb_llm.pt", weights_only=True)
    for name, source in SOURCES.items():
        golden = torch.load(shared / "golden" / f"{name}.pt", weights_only=True)
        assert torch.equal(golden["W"], problem["W"])
        assert torch.equal(golden["X"], problem["X"])
        tensors = {case: found["Q"].contiguous() for case, found in golden["cases"].items()}
        if name == "pb_llm":  # both methods were run on the same weight and Hessian
            tensors |= {"W": problem["W"].contiguous(), "H": problem["H"].contiguous()}
        save_file(tensors, here / f"{name}.safetensors", metadata={"code": source})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
