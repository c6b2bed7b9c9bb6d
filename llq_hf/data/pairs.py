"""Image-text pairs: what a model that sees can be calibrated on, so that visual tokens take part in
the statistics.

calibration | pairs
a folder    | its one `.jsonl` file, a line a pair: {"image": "a.png", "question": "...", "answer": "..."}, or, for a
            | caption, {"image": "a.png", "text": "..."}; paths start at the folder, `file_name` is good for `image`
`hub:NAME`  | the train split of a Hub dataset with columns of these names, `image` an image

Every pair is a sequence of its own, as the model's chat template renders question and answer, of
the length it comes to: nothing is padded, cut or joined. Pairs are drawn at random, each once.
Images are read when they are needed.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import LLQError
from ..models.vision import render_chat, tokenize_chats, truncated_images_refused
from .readers import read_records
from .sources import hub_rows

HUB = "hub:"


@dataclass(frozen=True)
class Pair:
    """where: what errors call it."""

    image: Callable[[], Any]  # reads it (PIL)
    question: str
    answer: str
    where: str


@dataclass(frozen=True)
class Pairs:
    """`lengths` in tokens; `sha256` covers what the model gets of them: token ids and pixels."""

    rows: Sequence[Pair]
    processor: Any
    lengths: Sequence[int] = ()
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self, index: int) -> dict[str, Tensor]:
        """What the model is called with for one pair: token ids [1, S], pixels, sizes. LLQError
        names a bad pair.
        """
        pair = self.rows[index]
        try:
            with truncated_images_refused():
                image = pair.image().convert("RGB")
        except Exception as error:  # of Pillow, of datasets, of the file system
            raise LLQError(f"{pair.where}: its image is missing or damaged ({error})") from error
        found = tokenize_chats(
            self.processor, [render_chat(self.processor, pair.question, 1, pair.answer)], [image]
        )
        return {name: tensor for name, tensor in found.items() if name != "attention_mask"}

    def measured(self, longest: int, on_pair: Callable[[int], None] = lambda count: None) -> Pairs:
        """The same, with lengths and digest. LLQError for a pair of more than `longest` tokens."""
        lengths, digest = [], hashlib.sha256()
        for index, pair in enumerate(self.rows):
            inputs = self.inputs(index)
            lengths.append(inputs["input_ids"].shape[1])
            if lengths[-1] > longest:
                raise LLQError(
                    f"{pair.where} has {lengths[-1]} tokens, and the model takes {longest}; leave it out"
                )
            for name in sorted(inputs):
                digest.update(f"{name} {tuple(inputs[name].shape)}".encode())
                digest.update(inputs[name].contiguous().numpy().tobytes())
            on_pair(1)
        return Pairs(self.rows, self.processor, lengths, digest.hexdigest())

    def described(self) -> dict[str, Any]:
        """What identifies them in a checkpoint."""
        return {"pairs_sha256": self.sha256, "samples": len(self), "tokens": sum(self.lengths)}


def read_pairs(source: str, processor: Any, samples: int, seed: int) -> Pairs:
    """`samples` pairs of a folder or of `hub:NAME`, drawn with `seed`; all where there are fewer,
    with a warning.
    """
    found = (
        _hub(source.removeprefix(HUB))
        if source.startswith(HUB)
        else _folder(Path(source).expanduser())
    )
    if len(found) < samples:
        warnings.warn(
            f"{source} holds {len(found)} pairs, fewer than samples={samples}: all are used.",
            stacklevel=2,
        )
        samples = len(found)
    return Pairs(
        [found[i] for i in random.Random(seed).sample(range(len(found)), samples)], processor
    )


def _folder(folder: Path) -> list[Pair]:
    from PIL import Image

    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        raise LLQError(
            f"{folder} holds {len(files)} .jsonl files; give a folder with images and one .jsonl about them"
        )
    pairs = []
    for number, record in enumerate(read_records(files[0]), start=1):
        where = f"Pair {number} of {files[0]}"
        name = record.get("image", record.get("file_name"))
        if not isinstance(name, str):
            raise LLQError(f"{where} has no path in a field `image` (fields: {', '.join(record)})")
        pairs.append(Pair(partial(Image.open, folder / name), *_said(record, where), where))
    return pairs


def _hub(name: str) -> list[Pair]:
    rows = hub_rows(
        name, split="train", offline_cure="give a local folder of images and a .jsonl about them."
    )
    texts = rows.remove_columns("image") if "image" in rows.column_names else rows
    if texts is rows:
        raise LLQError(
            f"The dataset {name} has no column `image` (columns: {', '.join(rows.column_names)})"
        )
    pairs = []
    for index, record in enumerate(texts):
        where = f"Row {index} of the dataset {name}"
        pairs.append(Pair(lambda index=index: rows[index]["image"], *_said(record, where), where))  # type: ignore[misc]
    return pairs


def _said(record: dict[str, Any], where: str) -> tuple[str, str]:
    """(question, answer); a caption answers no question."""
    for question, answer in (("question", "answer"), (None, "text")):
        asked = "" if question is None else record.get(question)
        if isinstance(asked, str) and isinstance(record.get(answer), str):
            return asked, record[answer]
    raise LLQError(
        f"{where} has neither `question` and `answer` nor `text` (fields: {', '.join(record)})"
    )


# --- what models are told, here and when they are asked -------------------------------------------
