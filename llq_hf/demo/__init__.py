"""The bundled demo models, a Llama of 3.7 million parameters and a small LLaVA-Next, and the code
that made them.

They let one try every feature of this package in seconds, offline, on a model whose best possible
score is known. Random weights would not do: nothing is lost when they are rounded.

    world.py         writes documents about an invented world, and reports their exact entropy
    train.py         trains a tokenizer and a Llama-3-style model on them
    llama/           the result, an ordinary Hugging Face folder
    instructions.py  questions about the same world, for fine-tuning
    drawings.py      draws pictures and asks questions about them
    vlm_data.py      turns them into batches for a vision-language model
    train_vlm.py     trains that model
    vlm/             the result

`resolve` gives their folders, and those of GGUF files, by gguf_base.py.

Importing this module imports nothing heavy.
"""

from pathlib import Path

MODELS: dict[str, Path] = {
    "demo": Path(__file__).parent / "llama",
    "demo-vlm": Path(__file__).parent / "vlm",
}
SMOLLM2 = "smollm2"  # the GGUF file that a package brings along


def resolve(model: str) -> str:
    """The folder of a model that is no folder by itself, else `model` as it is.

    It is that of a bundled model ("demo"), or that into which a GGUF file is converted once: the
    file at a path, or that of the extra `smollm2`. LLQError where such a file is missing or broken.
    """
    if model in MODELS:
        return str(MODELS[model])
    if model == SMOLLM2:
        from . import gguf_base

        return str(gguf_base.converted(gguf_base.bundled_file(), SMOLLM2))
    if model.lower().endswith(".gguf"):
        from . import gguf_base

        return str(gguf_base.converted(Path(model)))
    return model
