"""Turns drawings and questions into the processor and the training batches of the demo VLM.

Legend: B rows, T tokens, I tokens of the picture, C cells, N places where a head should look.

A row holds one picture and as many questions as fit. Each question attends to the picture and to
itself only, and has the positions that it has when it is asked alone. So one pass over a picture
serves many questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.image_utils import SizeDict

from . import drawings, train
from .drawings import CELLS, COLOURS, KINDS, SIDE_PIXELS, Item, Picture
from .world import seeded, shuffled

USER, ASSISTANT, IMAGE = "<|user|>", "<|assistant|>", "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TILE_PIXELS, PATCH_PIXELS = SIDE_PIXELS // 2, 12
TILE_PATCHES = TILE_PIXELS // PATCH_PIXELS
IMAGE_TOKENS = TILE_PATCHES**2 + 2 * TILE_PATCHES * (2 * TILE_PATCHES + 1)
IGNORED = -100  # label of a position that is not predicted


@dataclass(frozen=True, kw_only=True)
class VlmRecipe(train.Recipe):
    """All settings of a training, as in `train.Recipe`. The defaults are those of the bundled
    model.
    """

    looking_steps: int = 100  # of tower and projector alone
    sparse_steps: int = 50  # with one mark, as many with two, and so on to the fullest picture
    steps: int = 5000
    rows_per_step: int = 16
    tokens_per_row: int = 144
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    vocab_size: int = 448
    hidden_size: int = 128
    intermediate_size: int = 384
    head_dim: int = 32
    layers: int = 4
    tower_size: int = 96
    tower_layers: int = 2
    question_weight: float = 0.05
    data_seed: int = 0
    description_weight: float = 0.5
    verdict_weight: float = 2.0


# --- processor ------------------------------------------------------------------------------------


def make_processor(recipe: VlmRecipe) -> LlavaNextProcessor:
    """A tokenizer trained on questions, and LLaVA-Next's image processor for small pictures."""
    rng = seeded("tokenizer", recipe.seed)
    pictures = [picture for picture, _ in zip(drawings.stream("train"), range(2000), strict=False)]
    items = [item for picture in pictures for item in questions(picture, rng)]
    texts = [f"{item.question}\n{item.full_answer}" for item in items]
    tokenizer = train.make_tokenizer(recipe, texts, special=(USER, ASSISTANT, IMAGE))
    tokenizer.pad_token = train.EOS
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            image_grid_pinpoints=[
                [SIDE_PIXELS, SIDE_PIXELS],
                [TILE_PIXELS, SIDE_PIXELS],
                [SIDE_PIXELS, TILE_PIXELS],
            ],
            size={"shortest_edge": TILE_PIXELS},
            crop_size={"height": TILE_PIXELS, "width": TILE_PIXELS},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


# --- rows of tokens -------------------------------------------------------------------------------


def questions(picture: Picture, rng: Random) -> list[Item]:
    """All training questions about a picture in random order: each fact in its forms, and the
    description.
    """
    items = [drawings.description(picture)]
    for fact in drawings.facts(picture, rng):
        items += shuffled(rng, drawings.yes_no(fact))
        items.append(drawings.choice(fact, rng))
        if fact.category != "existence":  # "which of these" has no open form
            items.append(Item(fact.category, fact.question, "", fact.true, fact.marks))
    return shuffled(rng, items)


def endless_questions(picture: Picture, rng: Random) -> Iterator[Item]:
    """The same without end, in a new order each time."""
    while True:
        yield from questions(picture, rng)


class Row(NamedTuple):
    """The lists of one row of a `Batch`."""

    ids: list[int]
    positions: list[int]
    part: list[int]
    labels: list[int]
    weights: list[float]
    look: list[tuple[int, list[int]]]  # (a place, the places to attend to from there)
    pick: list[tuple[int, list[int]]]


@cache
def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, cached: questions recur, and tokenizing takes as long as a step."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_row(tokenizer: PreTrainedTokenizerFast, recipe: VlmRecipe, items: Iterable[Item]) -> Row:
    """A row: the picture's tokens, then whole questions while they fit, then padding."""
    user, assistant, image = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, IMAGE])
    ids = [tokenizer.bos_token_id, user] + [image] * IMAGE_TOKENS
    first = len(ids)
    T = recipe.tokens_per_row
    row = Row(ids, list(range(first)), [0] * first, [IGNORED] * first, [0.0] * first, [], [])
    for part, item in enumerate(items, start=1):
        question = token_ids(tokenizer, item.question)
        answer = token_ids(tokenizer, item.full_answer)
        tokens = [*question, assistant, *answer, tokenizer.eos_token_id]
        begin = len(ids)
        asked_at = begin + len(question)
        if begin + len(tokens) - 1 > T:
            break
        has_verdict = bool(item.said and item.answer)
        is_description = item.category == "description"
        worth = [recipe.question_weight] * len(question)
        worth += [recipe.description_weight if is_description else 1.0] * (len(answer) + 1)
        if has_verdict:
            worth[-2] = recipe.verdict_weight
        ids += tokens[:-1]
        row.positions.extend(range(first, first + len(tokens) - 1))
        row.part.extend([part] * (len(tokens) - 1))
        row.labels.extend(tokens[1:])
        row.weights.extend(worth)
        if not is_description:
            row.look.append((asked_at, [0, *(place_of(mark) for mark in item.marks)]))
            row.pick.append((asked_at, [0]))
        if has_verdict:  # predicted from the last word of what is said
            place = place_of_verdict(tokenizer, item, question, begin)
            row.pick.append((asked_at + len(answer) - 1, [place]))
    missing = T - len(ids)
    padding = Row(
        [0] * missing, [0] * missing, [-1] * missing, [IGNORED] * missing, [0.0] * missing, [], []
    )
    return Row(*(mine + more for mine, more in zip(row, padding, strict=True)))  # type: ignore[operator]


def place_of_verdict(
    tokenizer: PreTrainedTokenizerFast, item: Item, question: list[int], begin: int
) -> int:
    """Position in a row of the last token of the right option, or of the word of a true claim; else
    0.

    question: the question's tokens, which start at position `begin`.
    """
    newline = token_ids(tokenizer, "\n")[0]
    ends = [begin + i for i, token in enumerate(question) if token == newline]
    if ends:  # one after the question itself, then one after each option
        return ends[1 + "ABCD".index(item.answer)] - 1
    return begin + len(token_ids(tokenizer, item.claimed)) - 1 if item.answer == "yes" else 0


def place_of(mark: drawings.Mark) -> int:
    """Position in a row of the patch of a mark's cell.

    Before it come two tokens, the patches of the whole picture, and the cells of earlier lines.
    """
    return 2 + TILE_PATCHES**2 + mark.row * (CELLS + 1) + mark.column


# --- batches --------------------------------------------------------------------------------------


class WantedAttention(NamedTuple):
    """Where a head should look from N places: row and position of each place, and the share of
    attention that every position of the row should get.
    """

    row_N: Tensor
    place_N: Tensor
    share_NT: Tensor


class Batch(NamedTuple):
    """The data of one training step. Labels and weights stand at the position that predicts."""

    ids_BT: Tensor
    positions_BT: Tensor
    part_BT: Tensor  # 0 picture, 1.. the questions of the row, -1 padding
    labels_BT: Tensor
    weights_BT: Tensor
    pixels: Tensor  # [B, tiles + 1, 3, TILE_PIXELS, TILE_PIXELS]
    sizes_B2: Tensor
    kinds_BC: Tensor
    colours_BC: Tensor
    look: WantedAttention  # of the head that looks at the cells of a question
    pick: WantedAttention  # of the head that picks the word or option of the verdict


def wanted_attention(
    places_of_rows: Sequence[list[tuple[int, list[int]]]], T: int
) -> WantedAttention:
    """From the lists of all rows. Position 0 stands for looking at nothing."""
    every = [
        (row, place, targets)
        for row, places in enumerate(places_of_rows)
        for place, targets in places
    ]
    share_NT = torch.zeros(len(every), T)
    for n, (_, _, targets) in enumerate(every):
        share_NT[n, targets] = 1 / len(targets)
    pairs_N2 = torch.tensor([(row, place) for row, place, _ in every], dtype=torch.int64)
    row_N, place_N = pairs_N2.view(-1, 2).unbind(1)
    return WantedAttention(row_N, place_N, share_NT)


def cells_of(picture: Picture) -> tuple[list[int], list[int]]:
    """Kind (0: nothing) and colour of the mark in each cell, row by row."""
    kinds = [0] * CELLS**2
    colours = [IGNORED] * CELLS**2
    for mark in picture.marks:
        place = mark.row * CELLS + mark.column
        kinds[place] = 1 + KINDS.index(mark.kind)
        colours[place] = list(COLOURS).index(mark.colour)
    return kinds, colours


def pixels_of(processor: LlavaNextImageProcessor, pictures: Sequence[Picture]) -> Tensor:
    """The image processor's output for pictures, by its own steps, but for all at once."""
    drawn = np.stack([np.asarray(drawings.draw(picture)) for picture in pictures])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    whole = processor.resize(
        images, SizeDict(height=TILE_PIXELS, width=TILE_PIXELS), resample=processor.resample
    )
    cut = images.reshape(-1, 3, 2, TILE_PIXELS, 2, TILE_PIXELS)
    tiles = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    every = torch.cat([whole[:, None], tiles], 1)
    return processor.rescale_and_normalize(every, True, processor.rescale_factor, True, mean, std)  # type: ignore[no-any-return]


def make_batch(
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    pictures: list[Picture],
    items: Sequence[Iterable[Item]],
) -> Batch:
    """A batch of pictures, each with its questions in `items`."""
    rows = [make_row(processor.tokenizer, recipe, asked) for asked in items]
    columns = list(zip(*rows, strict=True))
    ids, positions, part, labels, weights = map(torch.tensor, columns[:5])
    look, pick = (wanted_attention(column, recipe.tokens_per_row) for column in columns[5:])
    pixels = pixels_of(processor.image_processor, pictures)
    sizes = torch.full((len(pictures), 2), SIDE_PIXELS)
    kinds, colours = map(torch.tensor, zip(*map(cells_of, pictures), strict=True))
    return Batch(ids, positions, part, labels, weights, pixels, sizes, kinds, colours, look, pick)


def batches(processor: LlavaNextProcessor, recipe: VlmRecipe) -> Iterator[Batch]:
    """Batches without end, of pictures with more and more marks."""
    rng = seeded("questions", recipe.data_seed)
    pictures = drawings.stream("train", recipe.data_seed)
    for step in count():
        # Any picture while only tower and projector learn; then one mark, and one more every
        # `sparse_steps`.
        if step < recipe.looking_steps:
            most_marks = 5
        else:
            most_marks = 1 + (step - recipe.looking_steps) // recipe.sparse_steps
        sparse = (picture for picture in pictures if len(picture.marks) <= most_marks)
        chosen = list(islice(sparse, recipe.rows_per_step))
        asked = [endless_questions(picture, rng) for picture in chosen]
        yield make_batch(processor, recipe, chosen, asked)
