"""Calibration data: the options that choose it, and the token windows that are drawn from a text.

Draws follow the GPTQ repository (IST-DASLab/gptq, `datautils.py`), which every method of the study
copies, to the exact call of Python's `random`. Legend: N windows, S tokens in a window, T tokens of
the whole text.

calibration  | text                                             | window
`wikitext2`  | WikiText-2 train rows joined by two newlines     | at `randint(0, T - S - 1)`
`ptb`        | Penn Treebank train sentences joined by a space  | the same
`c4`         | first C4 train shard                             | a random place in a random
             |                                                  | document of T > S
`demo`       | the bundled small world                          | as wikitext2
`demo-vlm`   | questions and answers about the bundled drawings | as wikitext2
a text file  | its documents joined by two newlines             | as wikitext2
a .npy file  | int token ids `[N, S]`                           | its rows, as they are

A text is tokenized once as a whole, so it holds at most one BOS token. The original draws a C4
document of at least S tokens and then fails on one of exactly S; here a document must be longer
than S. Where the original does not fail, the draws are the same. Folders of image-text pairs are
read by `pairs.py`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.files import read_json
from ..common.words import either, nearest
from ..demo import MODELS, resolve
from .pairs import HUB
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
STUDY_SEQLEN = 2048
BUNDLED_SEQLEN = 256  # what the bundled models were trained on


@dataclass(frozen=True)
class Calibration:
    """Calibration data, fully specified; the defaults are those of the GPTQ repository.

    Raises LLQError for a value that cannot be used. Messages name the options of
    `CalibrationOptions`, which is how a user gives them.
    """

    source: str = "wikitext2"  # a name of CALIBRATION_SOURCES or a path
    samples: int = 128
    seqlen: int = STUDY_SEQLEN
    seed: int = 0

    def __post_init__(self) -> None:
        check_source(self.source)
        check_positive("calibration_samples", self.samples)
        check_positive("calibration_seqlen", self.seqlen)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise LLQError(
                f"calibration_seed={self.seed!r} cannot seed the calibration draws; give an integer"
                " that is 0 or more."
            )

    @property
    def has_images(self) -> bool:
        """Whether the data are image-text pairs (`pairs.py`) and not a text."""
        path = Path(self.source).expanduser()
        # A folder that is named like a file is a mistake; the reader of files then refuses it.
        named_like_a_file = path.suffix.lower() in (*TEXT_SUFFIXES, ".npy")
        return self.source.startswith(HUB) or (path.is_dir() and not named_like_a_file)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the data are a text; a `.npy` file holds token ids already."""
        return Path(self.source).suffix.lower() != ".npy"

    @property
    def described(self) -> dict[str, Any]:
        """The fields for a model card, which gives a file's name without its folder."""
        name = self.source if self.source in CALIBRATION_SOURCES else Path(self.source).name
        return {"source": name, "samples": self.samples, "seqlen": self.seqlen, "seed": self.seed}

    def ids(self, tokenizer: Any, vocab_size: int | None = None) -> Tensor:
        """Token windows, int64 `[N, S]`; see `calibration_ids`."""
        return calibration_ids(
            self.source,
            tokenizer,
            samples=self.samples,
            seqlen=self.seqlen,
            seed=self.seed,
            vocab_size=vocab_size,
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user says about the calibration data; None where the user leaves it open.

    Every place where a user can ask for a quantization takes these fields, under the names of
    `option_names`: the command line, model_args, `quantization_config`, the model classes. A study
    plan has them as a mapping. Raises LLQError for a value that no model could be calibrated with.
    """

    source: str | None = field(
        default=None,
        metadata={
            "help": "wikitext2, c4, ptb, demo, demo-vlm; a .txt, .json, .jsonl, .parquet or .npy "
            "file; a folder of image-text pairs.",
            "default": "wikitext2; a bundled model's own text",
        },
    )
    samples: int | None = field(
        default=None, metadata={"help": "Sequences to calibrate on.", "default": "128"}
    )
    seqlen: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a sequence.",
            "default": "2048, or the model's context; for a bundled model 256",
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the draws from the text.", "default": "0"}
    )

    def __post_init__(self) -> None:
        Calibration(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that the user did not leave open."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def option_names(cls) -> dict[str, str]:
        """Name of the option -> field: {"calibration": "source", "calibration_samples": "samples",
        ...}.
        """
        return {
            "calibration" if each.name == "source" else f"calibration_{each.name}": each.name
            for each in fields(cls)
        }

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """(the calibration options among `options`, the rest of `options`).

        Raises LLQError for an option `calibration_...` that there is not.
        """
        names = cls.option_names()
        own: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in options.items():
            if name in names:
                own[names[name]] = value
            elif name.startswith("calibration"):
                raise LLQError(
                    f"unknown option {name!r}{nearest(name, names)}; the options of the"
                    f" calibration are {', '.join(names)}"
                )
            else:
                rest[name] = value
        return cls(**own), rest

    def for_model(self, model: str) -> Calibration:
        """The calibration of `model` (a folder, a Hub id or a bundled model's name).

        What was left open is the study's setting, 128 windows of 2048 tokens of wikitext2, or of as
        many as the model takes; for a bundled model it is its own text, which is the source of that
        name, in windows of 256.
        """
        folder = Path(resolve(model))
        bundled = next((name for name, own in MODELS.items() if own == folder), None)
        defaults: dict[str, Any] = {"seqlen": min(STUDY_SEQLEN, _context(folder) or STUDY_SEQLEN)}
        if bundled:
            defaults = {"source": bundled, "seqlen": BUNDLED_SEQLEN}
        return Calibration(**{**defaults, **self.given})


def _context(folder: Path) -> int | None:
    """Tokens that the model in a folder takes; None where its config.json does not say."""
    if not (folder / "config.json").is_file():  # a model on the Hub
        return None
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    longest = {**config, **(text if isinstance(text, dict) else {})}.get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > 0 else None


def calibration_ids(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """Calibration windows, int64 `[samples, seqlen]`, drawn as the head of this file says.

    A `.npy` file is used as it is: its first `samples` rows and first `seqlen` columns. Where it
    has fewer rows, all are used, with a warning. `tokenizer` may be None then. Raises LLQError for
    an unknown source, unusable data, too few tokens, and ids outside `vocab_size`.
    """
    check_source(source)
    check_positive("samples", samples)
    check_positive("seqlen", seqlen)
    if source in CALIBRATION_SOURCES:
        windows_NS = _sampled_source(source, tokenizer, samples, seqlen, seed)
        return check_ids(windows_NS, vocab_size, source)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npy":
        windows_NS = _stored_windows(path, samples, seqlen)
    else:
        text = "\n\n".join(read_texts(path))
        windows_NS = random_windows(
            tokens_of(text, tokenizer), samples, seqlen, random.Random(seed), str(path)
        )
    return check_ids(windows_NS, vocab_size, source)


def check_source(source: object) -> None:
    """LLQError unless `source` is the name of a calibration source, or looks like a path."""
    if not isinstance(source, str) or not source:
        raise LLQError(f"calibration={source!r} names no calibration data; give {_sources()}.")
    if source not in CALIBRATION_SOURCES and not _looks_like_path(source):
        raise LLQError(
            f"Unknown calibration source {source!r}{nearest(source, CALIBRATION_SOURCES)};"
            f" give {_sources()}."
        )


def _sampled_source(source: str, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    cure = (
        "pass calibration=FILE with a local .txt, .json, .jsonl, .parquet or .npy file, or"
        " calibration=demo."
    )
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
