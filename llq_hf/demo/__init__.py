"""The bundled demo model: a Llama of 3.7 million parameters that was really trained, and the code that made it.

Every feature of this package can be tried in seconds, offline, on a model whose best possible score is known:
``world.py`` invents a small world and reports the exact entropy of what it tells; ``train.py`` trains a tokenizer and a
Llama-3-style model on it; ``llama/`` is the result, an ordinary Hugging Face folder. Random weights would not do: they
survive any rounding, as there is nothing in them to lose.

Importing this module imports nothing heavy.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Calibration

MODELS: dict[str, Path] = {"demo": Path(__file__).parent / "llama"}


def resolve(model: str) -> str:
    """The folder of a bundled model if `model` names one ("demo"), else `model` itself."""
    return str(MODELS[model]) if model in MODELS else model


def calibration_for(
    model: str, source: str | None, samples: int | None, seqlen: int | None, seed: int = 0
) -> "Calibration":
    """The calibration of a run; what the user left open is the study's setting, or the bundled model's own text."""
    from ..data import Calibration

    bundled = resolve(model) in {str(folder) for folder in MODELS.values()}
    return Calibration(
        source=source or ("demo" if bundled else "wikitext2"),
        samples=128 if samples is None else samples,
        seqlen=(256 if bundled else 2048) if seqlen is None else seqlen,
        seed=seed,
    )
