"""Calibration: which data, how many windows of which length, drawn by which seed."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.words import either, nearest
from ..demo import MODELS, resolve
from .readers import TEXT_SUFFIXES, read_texts
from .sources import c4, ptb, wikitext2
from .windows import (
    check_ids,
    check_positive,
    document_windows,
    load_ids,
    random_windows,
    tokens_of,
)

CALIBRATION_SOURCES = ("wikitext2", "c4", "ptb", "demo", "demo-vlm")


@dataclass(frozen=True)
class Calibration:
    """Where the calibration windows come from; the defaults are those of the GPTQ repository."""

    source: str = "wikitext2"  # a name of CALIBRATION_SOURCES or a path
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("samples", self.samples)
        check_positive("seqlen", self.seqlen)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise LLQError(
                f"seed={self.seed!r} cannot seed the calibration draws; give an integer that is 0 or more."
            )
        if not isinstance(self.source, str) or not self.source:
            raise LLQError(f"source={self.source!r} names no calibration data; give {_sources()}.")

    @property
    def has_images(self) -> bool:
        """Whether it is image-text pairs (`pairs.py`) and not a text."""
        path = Path(self.source).expanduser()
        folder = path.is_dir() and path.suffix.lower() not in (
            *TEXT_SUFFIXES,
            ".npy",
        )  # else a file by mistake
        return folder or self.source.startswith("hub:")

    @property
    def needs_tokenizer(self) -> bool:
        return Path(self.source).suffix.lower() != ".npy"

    @property
    def described(self) -> dict[str, Any]:
        """The draw, as a card tells of it: a file by its name only."""
        name = self.source if self.source in CALIBRATION_SOURCES else Path(self.source).name
        return {"source": name, "samples": self.samples, "seqlen": self.seqlen, "seed": self.seed}

    def ids(self, tokenizer: Any, vocab_size: int | None = None) -> Tensor:
        """int64 `[N, S]`; see `calibration_ids`."""
        return calibration_ids(
            self.source,
            tokenizer,
            samples=self.samples,
            seqlen=self.seqlen,
            seed=self.seed,
            vocab_size=vocab_size,
        )


def calibration_ids(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """Calibration windows, int64 `[samples, seqlen]`, drawn as in the GPTQ repository (see the
    file's head).

    A `.npy` file is used as it is: its first `samples` rows and first `seqlen` columns, fewer where
    it has fewer (a lack of rows is warned about). `tokenizer` is not touched then. Raises LLQError
    for an unknown source, unusable data, too few tokens, and ids outside `vocab_size`.
    """
    check_positive("samples", samples)
    check_positive("seqlen", seqlen)
    if source in CALIBRATION_SOURCES:
        windows_NS = _sampled_source(source, tokenizer, samples, seqlen, seed)
    elif _looks_like_path(source):
        path = Path(source).expanduser()
        if path.suffix.lower() == ".npy":
            windows_NS = _stored_windows(path, samples, seqlen)
        else:
            text = "\n\n".join(read_texts(path))
            windows_NS = random_windows(
                tokens_of(text, tokenizer), samples, seqlen, random.Random(seed), str(path)
            )
    else:
        raise LLQError(
            f"Unknown calibration source {source!r}{nearest(source, CALIBRATION_SOURCES)}; give {_sources()}."
        )
    return check_ids(windows_NS, vocab_size, source)


def _sampled_source(source: str, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    cure = "pass calibration=FILE with a local .txt, .json, .jsonl, .parquet or .npy file, or calibration=demo."
    draw = random.Random(seed)
    if source == "c4":
        return document_windows(c4("train", cure), tokenizer, samples, seqlen, draw, source)
    if source == "wikitext2":
        text = "\n\n".join(wikitext2("train", cure))
    elif source == "ptb":
        text = " ".join(ptb("train", cure))
    elif source == "demo-vlm":
        from ..demo import drawings

        text = drawings.calibration_text()
    else:
        from ..demo import world

        text = world.calibration_text()
    return random_windows(tokens_of(text, tokenizer), samples, seqlen, draw, source)


def _stored_windows(path: Path, samples: int, seqlen: int) -> Tensor:
    ids = load_ids(path)
    if ids.shape[0] < samples:
        warnings.warn(
            f"{path} holds {ids.shape[0]} windows, fewer than samples={samples}: all are used.",
            stacklevel=3,
        )
    return torch.from_numpy(ids[:samples, :seqlen].astype(np.int64))


def _looks_like_path(source: str) -> bool:
    return "/" in source or "\\" in source or Path(source).suffix != "" or Path(source).exists()


def _sources() -> str:
    suffixes = either((*TEXT_SUFFIXES, ".npy"))
    return f"one of {', '.join(CALIBRATION_SOURCES)}, or the path of a file that ends in {suffixes}"


def calibration_for(
    model: str, source: str | None, samples: int | None, seqlen: int | None, seed: int = 0
) -> Calibration:
    """The calibration of a run; what the user left open is the study's setting, or the bundled
    model's own text.

    The text of a bundled model is the calibration source that has its name.
    """
    bundled = next((name for name, folder in MODELS.items() if resolve(model) == str(folder)), None)
    return Calibration(
        source=source or bundled or "wikitext2",
        samples=128 if samples is None else samples,
        seqlen=(256 if bundled else 2048) if seqlen is None else seqlen,
        seed=seed,
    )
