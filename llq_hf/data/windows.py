"""Cut token windows out of texts, and check token ids.

Legend: N windows, S tokens in a window, T tokens of the whole text.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError
from .readers import existing_file

MAX_REJECTED_DRAWS = 20_000  # of C4 documents, in a row; the first shard needs about 30 at S = 2048


def ids_sha256(ids: Tensor) -> str:
    """Hex digest of token ids: of their shape, and of their values as little-endian int64."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.detach().cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def random_windows(
    ids_T: Tensor, samples: int, seqlen: int, draw: random.Random, what: str
) -> Tensor:
    """`[samples, seqlen]`: windows of one text, each at a random place. `what`: for errors."""
    tokens = ids_T.numel()
    if tokens <= seqlen:
        raise LLQError(
            f"{what} has {tokens} tokens, and a random window of {seqlen} needs at least"
            f" {seqlen + 1}; give a longer text or a smaller seqlen."
        )
    starts = [draw.randint(0, tokens - seqlen - 1) for _ in range(samples)]
    return torch.stack([ids_T[start : start + seqlen] for start in starts])


def document_windows(
    documents: Sequence[str],
    tokenizer: Any,
    samples: int,
    seqlen: int,
    draw: random.Random,
    what: str,
) -> Tensor:
    """`[samples, seqlen]`: for each window a random document of more than seqlen tokens, and a
    random place in it.
    """
    too_short: set[int] = set()
    windows: list[Tensor] = []
    rejected = longest = 0
    while len(windows) < samples:
        index = draw.randint(0, len(documents) - 1)
        ids_T = None if index in too_short else tokens_of(documents[index], tokenizer)
        if ids_T is not None and ids_T.numel() > seqlen:
            start = draw.randint(0, ids_T.numel() - seqlen - 1)
            windows.append(ids_T[start : start + seqlen])
            rejected = 0
            continue
        if ids_T is not None:
            longest = max(longest, ids_T.numel())
        too_short.add(index)
        rejected += 1
        if len(too_short) == len(documents) or rejected >= MAX_REJECTED_DRAWS:
            raise LLQError(
                f"No document of {what} with more than {seqlen} tokens was found among"
                f" {len(too_short)} drawn (the longest has {longest}); give longer documents or a"
                " smaller seqlen."
            )
    return torch.stack(windows)


def load_ids(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """The token ids `[N, S]` of a `.npy` file; LLQError where it holds anything else."""
    path = existing_file(path, (".npy",))
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LLQError(
            f"{path} is not a readable .npy file of numbers ({error}); write it with numpy.save."
        ) from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise LLQError(
            f"{path} holds {ids.dtype}, not integers; save the token ids as int32 or int64."
        )
    if ids.ndim != 2 or 0 in ids.shape:
        raise LLQError(
            f"{path} has shape {list(ids.shape)}; give token ids of shape [windows, tokens], none"
            " of them 0."
        )
    return np.asarray(ids)


def check_ids(ids: Tensor, vocab_size: int | None, what: str) -> Tensor:
    """The ids themselves; LLQError for a negative one or one outside the vocabulary."""
    if (smallest := int(ids.min())) < 0:
        raise LLQError(f"{what} holds the token id {smallest}; token ids are 0 or more.")
    if vocab_size is not None and (largest := int(ids.max())) >= vocab_size:
        raise LLQError(
            f"{what} gives the token id {largest}, outside the model's vocabulary of {vocab_size};"
            " use the tokenizer that belongs to the model."
        )
    return ids


def tokens_of(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, int64 `[T]`, with the special tokens that the tokenizer adds by itself
    (a BOS for LLaMA).
    """
    if tokenizer is None:
        raise LLQError(
            "Texts need a tokenizer and none was given; pass the model's, or use a .npy file of"
            " token ids."
        )
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def check_positive(name: str, value: object) -> None:
    """Raise LLQError unless `value` is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LLQError(f"{name}={value!r} is not a positive integer; give 1 or more.")
