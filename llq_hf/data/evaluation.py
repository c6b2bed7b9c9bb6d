"""The texts that perplexity is measured on, and the windows that are cut from them.

Both follow the GPTQ repository (IST-DASLab/gptq, `datautils.py`). Legend: N windows, S tokens in a
window.

evaluation   | text                                              | windows
`wikitext2`  | test rows joined by two newlines                  | all disjoint ones
`ptb`        | validation sentences joined by two newlines       | the same
`ptb_new`    | test sentences joined by a space                  | the same
`c4_new`     | first 1100 documents of the first validation      | the first 256 disjoint ones
             | shard, joined by a space                          |
`c4`         | documents of the same shard                       | 256 random ones, seed 0
`demo`       | the held-out text of the bundled small world      | all disjoint ones
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from ..common.words import nearest
from .readers import read_texts
from .sources import c4, ptb, wikitext2
from .windows import document_windows, ids_sha256, load_ids, tokens_of

EVALUATION_TEXTS = ("wikitext2", "c4", "c4_new", "ptb", "ptb_new", "demo")
C4_WINDOWS = 256  # both C4 variants score this many windows
C4_NEW_DOCUMENTS = 1100


@dataclass(frozen=True)
class EvaluationText:
    """One text of the table above: its documents or stored windows, and how windows are cut."""

    name: str
    source: str  # "hub", "demo" or the file's path
    documents: tuple[str, ...] = ()
    stored_NS: Tensor | None = None
    first: int | None = None  # only so many windows, from the start

    def text(self) -> str:
        """The joined text. `c4` has none: it scores windows of single documents."""
        if self.name == "c4" or self.stored_NS is not None:
            raise LLQError(
                f"The evaluation text {self.name!r} is a set of token windows; call windows()"
                " instead."
            )
        return (" " if self.name in ("ptb_new", "c4_new") else "\n\n").join(self.documents)

    def windows(self, tokenizer: Any, seqlen: int) -> Tensor:
        """Disjoint windows in order, int64 `[N, S]`; a shorter last piece is dropped. N is 1 or
        more.
        """
        return self._windows(tokenizer, seqlen)[: self.first]

    def _windows(self, tokenizer: Any, seqlen: int) -> Tensor:
        if self.stored_NS is not None:
            return self.stored_NS[:, :seqlen]
        if self.name == "c4":
            return document_windows(
                self.documents, tokenizer, C4_WINDOWS, seqlen, random.Random(0), self._what()
            )
        ids_T = tokens_of(self.text(), tokenizer)
        count = ids_T.numel() // seqlen
        if count == 0:
            raise LLQError(
                f"{self._what()} has {ids_T.numel()} tokens, fewer than one window of {seqlen};"
                " give a longer text or a smaller seqlen."
            )
        windows_NS = ids_T[: count * seqlen].view(count, seqlen)
        return windows_NS[:C4_WINDOWS] if self.name == "c4_new" else windows_NS

    @cached_property
    def sha256(self) -> str:
        """Digest of the data and of the name, which stands for the rule that cuts it."""
        if self.stored_NS is not None:
            return ids_sha256(self.stored_NS)
        digest = hashlib.sha256(self.name.encode())
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def __str__(self) -> str:  # what lm-eval writes into sample logs in place of the text
        part = "" if self.first is None else f"first {self.first} windows, "
        return f"{self.name} ({part}{self.source}, sha256 {self.sha256})"

    def _what(self) -> str:
        return f"The evaluation text {self.name!r} ({self.source})"


def load_evaluation(name: str, file: str | Path | None = None) -> EvaluationText:
    """The evaluation text `name`, from the Hub or, with the rules of that name, from a local file.

    Files are those of `read_texts`. For `ptb` and `ptb_new` every line of a `.txt` file is a
    sentence, as in the usual copies of the treebank. A `.npy` file of ids `[N, S]` is scored row by
    row.
    """
    if name not in EVALUATION_TEXTS:
        known = ", ".join(EVALUATION_TEXTS)
        raise LLQError(
            f"Unknown evaluation text {name!r}{nearest(name, EVALUATION_TEXTS)}; give one of"
            f" {known}."
        )
    if file is None:
        if name == "demo":
            from ..demo import world

            return EvaluationText(name, "demo", (world.heldout_text(),))
        return _of_documents(name, "hub", _HUB_EVALUATION[name]())
    path = Path(file).expanduser()
    if path.suffix.lower() == ".npy":
        return EvaluationText(
            name, str(path), stored_NS=torch.from_numpy(load_ids(path).astype(np.int64))
        )
    documents = read_texts(path)
    if name in ("ptb", "ptb_new") and path.suffix.lower() == ".txt":
        documents = [line.strip() for line in documents[0].split("\n") if line.strip()]
    return _of_documents(name, str(path), documents)


def _of_documents(name: str, source: str, documents: list[str]) -> EvaluationText:
    return EvaluationText(
        name, source, tuple(documents[:C4_NEW_DOCUMENTS] if name == "c4_new" else documents)
    )


def evaluation_text(name: str, file: str | Path | None = None) -> str:
    """The joined text of a name of EVALUATION_TEXTS except `c4`, which is windows only."""
    return load_evaluation(name, file).text()


def evaluation_windows(
    name: str, tokenizer: Any, seqlen: int = 2048, file: str | Path | None = None
) -> Tensor:
    """The windows that the protocol scores for any name of EVALUATION_TEXTS, int64 `[N, S]`."""
    return load_evaluation(name, file).windows(tokenizer, seqlen)


_EVALUATION_CURE = (
    'pass --metadata \'{"text_file": "FILE"}\' with a local .txt, .json, .jsonl or .parquet file.'
)
_HUB_EVALUATION: dict[str, Callable[[], list[str]]] = {
    "wikitext2": lambda: wikitext2("test", _EVALUATION_CURE),
    "ptb": lambda: ptb("validation", _EVALUATION_CURE),
    "ptb_new": lambda: ptb("test", _EVALUATION_CURE),
    "c4": lambda: c4("validation", _EVALUATION_CURE),
    "c4_new": lambda: c4("validation", _EVALUATION_CURE),
}
