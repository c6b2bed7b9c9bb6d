"""Rewrites nf4.safetensors from what bitsandbytes and IR-QLoRA's own code gave (shared/golden)."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def sha256(tensor: Tensor) -> Tensor:
    """Digest [32] of a tensor's bytes: stands for one that must be equal to the last bit."""
    return torch.frombuffer(
        bytearray(hashlib.sha256(tensor.numpy().tobytes()).digest()), dtype=torch.uint8
    )


def main(shared: Path) -> None:
    golden = torch.load(shared / "golden" / "nf4_icq.pt", weights_only=True)
    tensors: dict[str, Tensor] = {"levels": golden["nf4"], "dynamic_levels": golden["dynamic_map"]}
    for case, found in golden["cases"].items():
        for name in ("W", "nf4_packed", "dq_qabsmax", "dq_absmax2", "dq_offset"):
            tensors[f"{case}.{name}"] = found[name].contiguous()
        for steps in (50, 100, 125):
            for name in ("packed", "tau_idx", "tau_absmax"):
                tensors[f"{case}.icq_{steps}.{name}"] = found[f"icq_n{steps}"][name].contiguous()
        tensors[f"{case}.sha256"] = sha256(found["nf4_deq_dq"])
    save_file(
        tensors,
        Path(__file__).parent / "nf4.safetensors",
        metadata={"code": "bitsandbytes, IR-QLoRA"},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
