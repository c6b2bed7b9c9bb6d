"""The bundled demo models: a Llama of 3.7 million parameters and a small LLaVA-Next, and the code
that made them.

Every feature of this package can be tried in seconds, offline, on a model whose best possible score
is known: ``world.py`` invents a small world and reports the exact entropy of what it tells;
``train.py`` trains a tokenizer and a Llama-3-style model on it; ``llama/`` is the result, an
ordinary Hugging Face folder. In the same way ``drawings.py`` draws pictures and asks questions
about them, ``train_vlm.py`` trains a model that sees, and ``vlm/`` is the result. Random weights
would not do: they survive any rounding, as there is nothing in them to lose.

Importing this module imports nothing heavy.
"""

from pathlib import Path

MODELS: dict[str, Path] = {
    "demo": Path(__file__).parent / "llama",
    "demo-vlm": Path(__file__).parent / "vlm",
}


def resolve(model: str) -> str:
    """The folder of a bundled model if `model` names one ("demo"), else `model` itself."""
    return str(MODELS[model]) if model in MODELS else model
