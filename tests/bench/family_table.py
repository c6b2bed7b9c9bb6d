"""Makes the table of families in `llq_hf/methods/README.md`: which work, and which are refused.

    python tests/bench/family_table.py [--write] [NAME ...]

A tiny random model of each family is quantized from files, loaded and run:

works     at 8 bits the packed model's logits are those of the base within a KL of 0.01 nats a
          token, and at 3 bits those of its own dequantized weights
refused   what the error says, without a file being written

It takes about three minutes on one core.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import BY_NAME, FAMILIES, Family, save_model

from llq_hf import Calibration, LLQError, build
from llq_hf.engine.execute import quantize_checkpoint

PAGE = Path(__file__).parents[2] / "llq_hf" / "methods" / "README.md"
HEAD = "| family | `model_type` | `rtn` | `gptq` | `spinquant` |"
METHODS = {"rtn": {}, "gptq": {}, "spinquant": {"w_clip": False}}
IDS_BS = torch.randint(3, 384, (4, 64), generator=torch.Generator().manual_seed(5))
REASONS = {
    "outside of linears": "experts would stay dense",
    "no list of blocks": "no list of blocks named `layers`",
    "more between its blocks": "more than hidden states between its blocks",
    "cannot be rotated": "no rotation passes",
    "no rotation passes": "no rotation passes",
    "stays unrotated": "no rotation passes",
    "does not stand where": "no rotation passes",
    "no RMSNorm": "no rotation passes",
    "leave the residual stream alone": "no rotation passes",
}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS_BS).logits


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL, nats per token."""
    difference = one.log_softmax(-1) - other.log_softmax(-1)
    return float((one.softmax(-1) * difference).sum(-1).mean())


def outcome(base: Path, scratch: Path, method: str, calibration: Path) -> str:
    """What a cell of the table says."""
    data = Calibration(str(calibration), 4, 64)

    def packed(bits: int) -> Any:
        out = scratch / f"{method}-{bits}"
        quantize_checkpoint(str(base), out, build(method, bits=bits, **METHODS[method]), data)
        return loaded(out)

    try:
        found = packed(8)
    except LLQError as error:
        assert not (scratch / f"{method}-8").exists()
        reason = next((text for part, text in REASONS.items() if part in str(error)), str(error))
        return f"refused: {reason}"
    if not divergence(logits(loaded(base)), logits(found)) < 0.01:
        return "FAILS: another model"
    model = packed(3)
    own = logits(model)
    if not (own - logits(model.dequantize())).abs().max() < 1e-3 * own.abs().max():
        return "FAILS: other weights"
    return "works"


def row(family: Family, tick: Callable[[str], None]) -> str:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        calibration = scratch / "ids.npy"
        np.save(calibration, IDS_BS.numpy())
        base = save_model(family, scratch / "base")
        cells = []
        for method in METHODS:
            tick(f"{family.name}: {method}")
            cells.append(outcome(base, scratch, method, calibration))
    if len(set(cells)) == 1 and cells[0] != "works":
        cells = [cells[0], "", ""]
    return f"| {family.name} | `{family.model_type}` | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; default: all")
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.name}")
    options = parser.parse_args()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = [BY_NAME[name] for name in options.names] or FAMILIES
    tick = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    rows = [HEAD, "|---|---|---|---|---|"]
    for each in families:
        rows.append(row(each, tick))
        print(rows[-1], flush=True)
    table = "\n".join(rows)
    if options.write:
        text = PAGE.read_text()
        pattern = re.escape(HEAD) + r"\n(\|.*\n)*"
        PAGE.write_text(re.sub(pattern, lambda _: table + "\n", text))


if __name__ == "__main__":
    main()
