"""Image-text pairs as calibration data of a vision-language model, whose visual tokens then take
part in the statistics.

calibration | pairs
a folder    | its one `.jsonl` file, a pair a line
`hub:NAME`  | the train split of a Hub dataset with columns of the same names, `image` an image

A line is {"image": "a.png", "question": "...", "answer": "..."} or, for a caption, {"image":
"a.png", "text": "..."}. Paths start at the folder. `file_name` may stand for `image`.

Every pair is a sequence of its own: question and answer as the model's chat template renders them,
neither padded nor cut nor joined with others. Pairs are drawn at random without replacement. Images
are read when they are needed.

A method that learns from a pair learns its answer, with what the template writes behind it; image
and question are context.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import LLQError
from ..models.sequences import Batch
from ..models.vision import render_chat, tokenize_chats, truncated_images_refused
from .readers import read_records
from .sources import hub_rows

HUB = "hub:"


@dataclass(frozen=True)
class Pair:
    """A question about an image, and its answer; for a caption the question is empty."""

    image: Callable[[], Any]  # reads the image (PIL)
    question: str
    answer: str
    where: str  # what errors call the pair


@dataclass(frozen=True)
class Pairs:
    """The pairs that a model is calibrated on; `measured` fills in lengths and digest."""

    rows: Sequence[Pair]
    processor: Any  # the model's
    lengths: Sequence[int] = ()  # tokens of each pair
    sha256: str = ""  # of what the model is given: token ids and pixels

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self, index: int) -> dict[str, Tensor]:
        """The model's arguments for one pair: token ids [1, S], pixels, sizes.

        Raises LLQError, which names the pair, where its image cannot be read.
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

    def inputs_on(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same on a device, pixels in the model's dtype."""
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs(index).items()
        }

    def answer_tokens(self, index: int) -> int:
        """How many tokens at the end of a pair are its answer. LLQError where none is."""
        pair = self.rows[index]
        asked, whole = (
            self._ids(render_chat(self.processor, pair.question, 1, answer))
            for answer in (None, pair.answer)
        )
        shared = next(
            (i for i, (one, other) in enumerate(zip(asked, whole, strict=False)) if one != other),
            min(len(asked), len(whole)),
        )
        if shared == len(whole):
            raise LLQError(
                f"{pair.where} has no answer that the chat template writes down, so there is"
                " nothing to learn from it; leave it out"
            )
        return len(whole) - shared

    def _ids(self, text: str) -> list[int]:
        """Tokens of a rendered chat, with one for the image."""
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def image_token_id(self) -> int:
        token = getattr(self.processor, "image_token", "<image>")
        return int(self.processor.tokenizer.convert_tokens_to_ids(token))

    def check_answers(self) -> None:
        """LLQError for a pair from whose answer nothing can be learned."""
        for index in range(len(self)):
            self.answer_tokens(index)

    def measured(self, longest: int, on_pair: Callable[[int], None] = lambda count: None) -> Pairs:
        """The same pairs with lengths and digest; LLQError for a pair of more than `longest`
        tokens.
        """
        lengths = []
        digest = hashlib.sha256()
        for index, pair in enumerate(self.rows):
            inputs = self.inputs(index)
            lengths.append(inputs["input_ids"].shape[1])
            if lengths[-1] > longest:
                raise LLQError(
                    f"{pair.where} has {lengths[-1]} tokens, and the model takes {longest}; leave"
                    " it out"
                )
            for name in sorted(inputs):
                digest.update(f"{name} {tuple(inputs[name].shape)}".encode())
                digest.update(inputs[name].contiguous().numpy().tobytes())
            on_pair(1)
        return Pairs(self.rows, self.processor, lengths, digest.hexdigest())

    def described(self) -> dict[str, Any]:
        """What a checkpoint says about the pairs that it was calibrated on."""
        return {"pairs_sha256": self.sha256, "samples": len(self), "tokens": sum(self.lengths)}


@dataclass(frozen=True)
class PairSequences:
    """Pairs as the whole model takes them: one by one, on its device and in its dtype."""

    pairs: Pairs
    device: torch.device
    dtype: torch.dtype

    @property
    def lengths(self) -> Sequence[int]:
        return self.pairs.lengths

    def __len__(self) -> int:
        return len(self.pairs)

    def head(self, count: int) -> PairSequences:
        rows, lengths = self.pairs.rows[:count], self.pairs.lengths[:count]
        return replace(self, pairs=replace(self.pairs, rows=rows, lengths=lengths))

    def batches(self, rows: Sequence[int], tokens: int = 0) -> Iterator[Batch]:
        return map(self._batch, rows)

    def _batch(self, index: int) -> Batch:
        inputs = self.pairs.inputs_on(index, self.device, self.dtype)
        ids_S = inputs["input_ids"][0]
        first = len(ids_S) - self.pairs.answer_tokens(index)
        return Batch(
            inputs,
            text_P=(ids_S != self.pairs.image_token_id).nonzero()[:, 0],
            # The token before predicts a token.
            asked_P=torch.arange(first - 1, len(ids_S) - 1, device=self.device),
        )


def read_pairs(source: str, processor: Any, samples: int, seed: int) -> Pairs:
    """`samples` pairs of a folder or of `hub:NAME`, drawn with `seed`.

    Where there are fewer, all are used, with a warning.
    """
    if source.startswith(HUB):
        found = _hub(source.removeprefix(HUB))
    else:
        found = _folder(Path(source).expanduser())
    if len(found) < samples:
        warnings.warn(
            f"{source} holds {len(found)} pairs, fewer than samples={samples}: all are used.",
            stacklevel=2,
        )
        samples = len(found)
    drawn = random.Random(seed).sample(range(len(found)), samples)
    return Pairs([found[index] for index in drawn], processor)


def _folder(folder: Path) -> list[Pair]:
    from PIL import Image

    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        raise LLQError(
            f"{folder} holds {len(files)} .jsonl files; give a folder with images and one .jsonl"
            " about them"
        )
    pairs = []
    for number, record in enumerate(read_records(files[0]), start=1):
        where = f"Pair {number} of {files[0]}"
        name = record.get("image", record.get("file_name"))
        if not isinstance(name, str):
            raise LLQError(f"{where} has no path in a field `image` (fields: {', '.join(record)})")
        pairs.append(Pair(partial(Image.open, folder / name), *_texts_of(record, where), where))
    return pairs


def _hub(name: str) -> list[Pair]:
    rows = hub_rows(
        name, split="train", offline_cure="give a local folder of images and a .jsonl about them."
    )
    texts = rows.remove_columns("image") if "image" in rows.column_names else rows
    if texts is rows:
        raise LLQError(
            f"The dataset {name} has no column `image` (columns: {', '.join(rows.column_names)});"
            " give one that has"
        )
    pairs = []
    for index, record in enumerate(texts):
        where = f"Row {index} of the dataset {name}"
        pairs.append(Pair(partial(_image_of, rows, index), *_texts_of(record, where), where))
    return pairs


def _image_of(rows: Any, index: int) -> Any:
    return rows[index]["image"]


def _texts_of(record: dict[str, Any], where: str) -> tuple[str, str]:
    """(question, answer) of a record; a caption is the answer to an empty question."""
    for question, answer in (("question", "answer"), (None, "text")):
        asked = "" if question is None else record.get(question)
        if isinstance(asked, str) and isinstance(record.get(answer), str):
            return asked, record[answer]
    raise LLQError(
        f"{where} has neither `question` and `answer` nor `text` (fields: {', '.join(record)})"
    )
