"""Make the demo VLM from nothing: tokenizer, tower, projector and decoder at once, then the
measurement.

    uv run --extra vision python -m llq_hf.demo.train_vlm OUT                 the bundled model again
    uv run --extra vision python -m llq_hf.demo.train_vlm OUT --minutes 5     a weaker one

The architecture is LLaVA-Next's, with its anyres images: a picture of 48 x 48 pixels is seen once
as a whole, shrunk to 24 x 24, and once in four tiles of 24 x 24, four patches each, with a newline
after each row of patches: 24 tokens.

Large VLMs start from a trained tower and a trained decoder. This one starts from nothing, and five
things make up for it, so that an hour of one core is enough:

* A row of training holds one picture and as many questions as fit. Each question sees the picture and itself, and
  stands at the positions that it has when it is asked alone: one pass over the picture serves many
  questions.
* Questions come in the two forms of the test, and also open ("red"), and as a description of the whole picture, which
  tells the decoder far more about a picture than a yes or no.
* The projected patch of a cell is trained to lie near the embeddings of the words that name what is in the cell, as
  in CLIP. In the first steps tower and projector learn from that alone, which is cheap: the decoder
  then starts on patches that it can read like words.
* One attention head is told where to look, another which word to pick: the weights of the first are trained towards the
  cells that the question is about, those of the second towards the word that the answer has just
  said, where it stands in the question: in the claim, if it is true, or in the right option.
  Finding by content is what takes longest to learn from answers alone.
* Pictures are sparse at first: one mark, then two, and so on.
"""

# B rows, T tokens, I tokens of the picture, V vocabulary, D hidden size, C cells, W words

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import SizeDict

from . import drawings, train
from .drawings import CELLS, COLOURS, KINDS, SIDE_PIXELS, Item, Picture
from .world import seeded, shuffled

USER, ASSISTANT, IMAGE = "<|user|>", "<|assistant|>", "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TILE_PIXELS, PATCH_PIXELS = SIDE_PIXELS // 2, 12
TILE_PATCHES = TILE_PIXELS // PATCH_PIXELS
IMAGE_TOKENS = TILE_PATCHES**2 + 2 * TILE_PATCHES * (2 * TILE_PATCHES + 1)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class VlmRecipe(train.Recipe):
    """Everything that decides the result, as in `train.Recipe`. The defaults are those of the
    bundled model.
    """

    looking_steps: int = 100
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


# Processor


def make_processor(recipe: VlmRecipe) -> LlavaNextProcessor:
    """Tokenizer of the questions' own words, and LLaVA-Next's image processor for small pictures."""
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


# Data


class Attention(NamedTuple):
    """Where a head should look from N places: row and position of each, and the share of every
    position.
    """

    row_N: Tensor
    place_N: Tensor
    share_NT: Tensor


class Batch(NamedTuple):
    """What one step learns from. Labels and weights stand at the position that predicts."""

    ids_BT: Tensor
    positions_BT: Tensor
    part_BT: Tensor  # 0 picture, 1.. the questions of the row
    labels_BT: Tensor
    weights_BT: Tensor
    pixels: Tensor  # [B, tiles + 1, 3, TILE_PIXELS, TILE_PIXELS]
    sizes_B2: Tensor
    kinds_BC: Tensor
    colours_BC: Tensor
    look: Attention
    pick: Attention


def questions(picture: Picture, rng: Random) -> list[Item]:
    """Everything a picture is asked in training, in random order: each fact in a few forms, and the
    description.
    """
    items = [drawings.description(picture)]
    for fact in drawings.facts(picture, rng):
        items += shuffled(rng, drawings.yes_no(fact))
        items.append(drawings.choice(fact, rng))
        if fact.category != "existence":  # "which of these" has no open form
            items.append(Item(fact.category, fact.question, "", fact.true, fact.marks))
    return shuffled(rng, items)


class Row(NamedTuple):
    """The lists of one row; see Batch."""

    ids: list[int]
    positions: list[int]
    part: list[int]
    labels: list[int]
    weights: list[float]
    look: list[tuple[int, list[int]]]  # (a place, the places to look at from there)
    pick: list[tuple[int, list[int]]]


@cache
def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Cached: questions come again and again, and tokenizing would take as long as a step."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_row(tokenizer: PreTrainedTokenizerFast, recipe: VlmRecipe, items: Iterable[Item]) -> Row:
    """The picture's place, then whole questions while they fit, then padding that nobody sees."""
    user, assistant, image = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, IMAGE])
    ids = [tokenizer.bos_token_id, user] + [image] * IMAGE_TOKENS
    row = Row(
        ids, list(range(len(ids))), [0] * len(ids), [IGNORED] * len(ids), [0.0] * len(ids), [], []
    )
    first, T = len(ids), recipe.tokens_per_row
    for part, item in enumerate(items, start=1):
        question, answer = (
            token_ids(tokenizer, item.question),
            token_ids(tokenizer, item.full_answer),
        )
        tokens = [*question, assistant, *answer, tokenizer.eos_token_id]
        begin, asked_at = len(ids), len(ids) + len(question)
        decided = bool(item.said and item.answer)
        if begin + len(tokens) - 1 > T:
            break
        described = item.category == "description"
        worth = [recipe.question_weight] * len(question)
        worth += [recipe.description_weight if described else 1.0] * (len(answer) + 1)
        if decided:
            worth[-2] = recipe.verdict_weight
        ids += tokens[:-1]
        row.positions.extend(range(first, first + len(tokens) - 1))
        row.part.extend([part] * (len(tokens) - 1))
        row.labels.extend(tokens[1:])
        row.weights.extend(worth)
        if not described:
            row.look.append((asked_at, [0, *(place_of(mark) for mark in item.marks)]))
            row.pick.append((asked_at, [0]))
        if decided:  # from the last word that was said
            row.pick.append(
                (asked_at + len(answer) - 1, [picked(tokenizer, item, question, begin)])
            )
    missing = T - len(ids)
    fill = Row(
        [0] * missing, [0] * missing, [-1] * missing, [IGNORED] * missing, [0.0] * missing, [], []
    )
    return Row(*(mine + more for mine, more in zip(row, fill, strict=True)))  # type: ignore[operator]


def picked(tokenizer: PreTrainedTokenizerFast, item: Item, question: list[int], begin: int) -> int:
    """Where in a row the right option ends, or the word of a true claim stands; 0: nowhere.

    question: its tokens, which stand from `begin` on.
    """
    newline = token_ids(tokenizer, "\n")[0]
    ends = [begin + i for i, token in enumerate(question) if token == newline]
    if ends:  # one after the question itself, then one after every option
        return ends[1 + "ABCD".index(item.answer)] - 1
    return begin + len(token_ids(tokenizer, item.claimed)) - 1 if item.answer == "yes" else 0


def place_of(mark: drawings.Mark) -> int:
    """Where in a row the patch of a mark's cell stands: after two tokens and the patches of the
    whole, line by line.
    """
    return 2 + TILE_PATCHES**2 + mark.row * (CELLS + 1) + mark.column


def attention(wanted: Sequence[list[tuple[int, list[int]]]], T: int) -> Attention:
    """From the lists of all rows. Looking at nothing means looking at position 0."""
    every = [(row, place, seen) for row, places in enumerate(wanted) for place, seen in places]
    share_NT = torch.zeros(len(every), T)
    for n, (_, _, seen) in enumerate(every):
        share_NT[n, seen] = 1 / len(seen)
    row_N, place_N = (
        torch.tensor([(row, place) for row, place, _ in every], dtype=torch.int64)
        .view(-1, 2)
        .unbind(1)
    )
    return Attention(row_N, place_N, share_NT)


def cells_of(picture: Picture) -> tuple[list[int], list[int]]:
    """What lies in each cell, row by row (0: nothing), and its colour."""
    kinds, colours = [0] * CELLS**2, [IGNORED] * CELLS**2
    for mark in picture.marks:
        place = mark.row * CELLS + mark.column
        kinds[place], colours[place] = 1 + KINDS.index(mark.kind), list(COLOURS).index(mark.colour)
    return kinds, colours


def pixels_of(processor: LlavaNextImageProcessor, pictures: Sequence[Picture]) -> Tensor:
    """What the image processor makes of pictures, by its own steps, but all pictures at a time."""
    images = torch.from_numpy(
        np.stack([np.asarray(drawings.draw(picture)) for picture in pictures])
    ).permute(0, 3, 1, 2)
    whole = processor.resize(
        images, SizeDict(height=TILE_PIXELS, width=TILE_PIXELS), resample=processor.resample
    )
    cut = images.reshape(-1, 3, 2, TILE_PIXELS, 2, TILE_PIXELS)
    tiles = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    every = torch.cat([whole[:, None], tiles], 1)
    return processor.rescale_and_normalize(every, True, processor.rescale_factor, True, mean, std)  # type: ignore[no-any-return]


def endless_questions(picture: Picture, rng: Random) -> Iterator[Item]:
    while True:
        yield from questions(picture, rng)


def make_batch(
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    pictures: list[Picture],
    items: Sequence[Iterable[Item]],
) -> Batch:
    rows = [make_row(processor.tokenizer, recipe, asked) for asked in items]
    columns = list(zip(*rows, strict=True))
    ids, positions, part, labels, weights = map(torch.tensor, columns[:5])
    look, pick = (attention(column, recipe.tokens_per_row) for column in columns[5:])
    pixels, sizes = (
        pixels_of(processor.image_processor, pictures),
        torch.full((len(pictures), 2), SIDE_PIXELS),
    )
    kinds, colours = map(torch.tensor, zip(*map(cells_of, pictures), strict=True))
    return Batch(ids, positions, part, labels, weights, pixels, sizes, kinds, colours, look, pick)


def batches(processor: LlavaNextProcessor, recipe: VlmRecipe) -> Iterator[Batch]:
    """Batches without end of pictures that grow fuller."""
    rng, pictures = (
        seeded("questions", recipe.data_seed),
        drawings.stream("train", recipe.data_seed),
    )
    for step in count():
        most_marks = (
            1 + max(0, step - recipe.looking_steps) // recipe.sparse_steps
            if step >= recipe.looking_steps
            else 5
        )
        sparse = (picture for picture in pictures if len(picture.marks) <= most_marks)
        chosen = list(islice(sparse, recipe.rows_per_step))
        yield make_batch(
            processor, recipe, chosen, [endless_questions(picture, rng) for picture in chosen]
        )


# Model and training


def make_model(
    processor: LlavaNextProcessor, recipe: VlmRecipe
) -> LlavaNextForConditionalGeneration:
    """LLaVA-Next in miniature, with random weights: a CLIP tower, a projector, a Llama-3-style
    decoder.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = processor.tokenizer
    heads = recipe.hidden_size // recipe.head_dim
    tower = CLIPVisionConfig(
        hidden_size=recipe.tower_size,
        intermediate_size=4 * recipe.tower_size,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=recipe.tower_size // 32,
        image_size=TILE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=recipe.tower_size,
    )
    text = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=recipe.head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaNextConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        image_seq_length=IMAGE_TOKENS,
        # all layers are trained here, so there is no reason to stop before the last one
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # the others do not show their attention
    return model


def words_of(processor: LlavaNextProcessor) -> tuple[Tensor, Tensor]:
    """Tokens that name the kinds (first of all nothing, for which the unused `<image>` stands) and
    the colours.
    """
    tokenizer = processor.tokenizer
    shapes = [f"Ġ{kind}" if kind in drawings.SHAPES else kind for kind in KINDS]
    kinds = tokenizer.convert_tokens_to_ids([IMAGE, *shapes])
    colours = tokenizer.convert_tokens_to_ids([f"Ġ{colour}" for colour in COLOURS])
    assert tokenizer.unk_token_id not in (*kinds, *colours), (
        "every kind and colour must be one token"
    )
    return torch.tensor(kinds), torch.tensor(colours)


def naming_loss(
    model: LlavaNextForConditionalGeneration,
    image_BID: Tensor,
    words: tuple[Tensor, Tensor],
    batch: Batch,
) -> Tensor:
    """Mean nats per cell of telling kind and colour by the nearest embedding of a word."""
    B, _, D = image_BID.shape
    grid_BRCD = image_BID[:, TILE_PATCHES**2 :].reshape(B, CELLS, CELLS + 1, D)[
        :, :, :-1
    ]  # without newlines
    cells_BCD = grid_BRCD.flatten(1, 2) * D**0.5
    embeddings = model.get_input_embeddings().weight
    losses = [
        F.cross_entropy(
            (cells_BCD @ embeddings[words_W].T).flatten(0, 1),
            labels_BC.flatten(),
            ignore_index=IGNORED,
        )
        for words_W, labels_BC in zip(words, (batch.kinds_BC, batch.colours_BC), strict=True)
    ]
    return losses[0] + losses[1]


def image_features(model: LlavaNextForConditionalGeneration, batch: Batch) -> Tensor:
    """image_BID: what the decoder gets in place of a picture's tokens."""
    return torch.stack(model.model.get_image_features(batch.pixels, batch.sizes_B2).pooler_output)


def decode(model: LlavaNextForConditionalGeneration, image_BID: Tensor, batch: Batch) -> Any:
    """The decoder's output, with attentions, where every question sees the picture and itself."""
    embeds_BTD = model.get_input_embeddings()(batch.ids_BT)
    embeds_BTD = torch.cat(
        [embeds_BTD[:, :2], image_BID.to(embeds_BTD), embeds_BTD[:, 2 + IMAGE_TOKENS :]], 1
    )
    own = batch.part_BT[:, :, None] == batch.part_BT[:, None, :]
    seen_BTT = (own | (batch.part_BT[:, None, :] == 0)) & torch.ones_like(own).tril()
    # Eager attention adds its mask: a boolean one would hide nothing.
    mask_BTT = torch.zeros(seen_BTT.shape).masked_fill(~seen_BTT, torch.finfo(torch.float32).min)
    return model.model.language_model(
        inputs_embeds=embeds_BTD,
        attention_mask=mask_BTT[:, None],
        position_ids=batch.positions_BT,
        use_cache=False,
        output_attentions=True,
    )


def answer_loss(
    model: LlavaNextForConditionalGeneration, image_BID: Tensor, batch: Batch
) -> Tensor:
    """Weighted mean nats per predicted token, and those of the two heads that are told where to
    look.
    """
    chosen = batch.labels_BT != IGNORED
    output = decode(model, image_BID, batch)
    logits_NV, weights_N = model.lm_head(output.last_hidden_state[chosen]), batch.weights_BT[chosen]
    nats_N = F.cross_entropy(logits_NV, batch.labels_BT[chosen], reduction="none")
    *_, look_BHTT, pick_BHTT = output.attentions
    heads = attention_loss(look_BHTT[:, 0], batch.look) + attention_loss(
        pick_BHTT[:, 0], batch.pick
    )
    return (nats_N * weights_N).sum() / weights_N.sum() + heads


def attention_loss(weights_BTT: Tensor, wanted: Attention) -> Tensor:
    """Mean nats between a head's attention and the wanted one."""
    weights_NT = weights_BTT[wanted.row_N, wanted.place_N]
    return -(wanted.share_NT * (weights_NT + 1e-6).log()).sum() / max(1, len(weights_NT))


def train_vlm(
    out: Path,
    recipe: VlmRecipe,
    minutes: float = math.inf,
    start: Path | None = None,
    save_every: int = 100,
) -> None:
    """Train, and write the folder at the end and every `save_every` steps. The schedule is that of
    `train.train`.

    start: a folder that this wrote, to go on from its weights.
    """
    processor = (
        make_processor(recipe) if start is None else LlavaNextProcessor.from_pretrained(start)
    )
    model = make_model(processor, recipe).train()
    if start is not None:
        load(model, recipe, start)
    words = words_of(processor)
    optimizer = train.make_optimizer(model, recipe)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    began, smooth = time.monotonic(), 0.0
    with Progress(*columns, console=train.console) as bar:
        task = bar.add_task("training", total=recipe.steps)
        for step, batch in enumerate(batches(processor, recipe)):
            progress = max(step / recipe.steps, (time.monotonic() - began) / (60 * minutes))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * train.schedule(step, progress, recipe)
            image_BID = image_features(model, batch)
            loss: Any = naming_loss(model, image_BID, words, batch)
            if step >= recipe.looking_steps:
                loss = loss + answer_loss(model, image_BID, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            smooth = 0.95 * smooth + 0.05 * loss.item() if step else loss.item()
            bar.update(task, advance=1, description=f"loss {smooth:.3f}")
            if (step + 1) % save_every == 0:
                seconds = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} s of processor time"
                bar.console.print(f"step {step + 1}: loss {smooth:.3f}, {seconds}")
                if step >= recipe.looking_steps:
                    bar.console.print(told(accuracy(model, processor, recipe, pictures=96)))
                save(model, processor, recipe, out)
    save(model, processor, recipe, out)
    seconds = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} s of processor time"
    train.console.print(f"{step} steps, {seconds}")


def load(model: LlavaNextForConditionalGeneration, recipe: VlmRecipe, folder: Path) -> None:
    """Take the weights of a folder that `save` wrote, with the channels as they were before the
    spread.
    """
    saved = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    train.spread_channels(saved, replace(recipe, channel_spread=-recipe.channel_spread))
    model.load_state_dict(saved.state_dict())


def save(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    out: Path,
) -> None:
    """Write an ordinary Hugging Face folder with bf16 weights; the model in training keeps its fp32
    ones.
    """
    copy = LlavaNextForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    train.spread_channels(copy, recipe)
    copy.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


# Evaluation


@torch.no_grad()
def accuracy(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    pictures: int,
) -> dict[str, float]:
    """Share of held-out questions where every token of the full answer comes first, by category and
    form.

    That is what greedy generation then says; it is right a little more often, because a slip may
    still end in the right verdict. Many questions to a row: quick enough for the training loop.
    """
    recipe = replace(recipe, tokens_per_row=512)  # room for everything that a picture can be asked
    rng, stream = seeded("accuracy", recipe.seed), drawings.stream("heldout", recipe.seed)
    tokenizer = processor.tokenizer
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(0, pictures, recipe.rows_per_step):
        chosen = [next(stream) for _ in range(recipe.rows_per_step)]
        asked = [drawings.asked(picture, rng) for picture in chosen]
        batch = make_batch(processor, recipe, chosen, asked)
        best_BT = model.lm_head(
            decode(model, image_features(model, batch), batch).last_hidden_state
        ).argmax(-1)
        for b, items in enumerate(asked):
            places = (batch.ids_BT[b] == assistant).nonzero().flatten().tolist()
            for item, t in zip(items, places, strict=True):
                end = t + len(token_ids(tokenizer, item.full_answer))
                hits = best_BT[b, t:end] == batch.labels_BT[b, t:end]
                for key in keys_of(item):
                    right[key].append(bool(hits.all()))
                if item.said:
                    right["said"].append(bool(hits[:-1].all()))
                    right["verdict after the right word"].append(bool(hits[-1]))
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def keys_of(item: Item) -> tuple[str, str, str]:
    """What an item counts for."""
    return item.category, "yes-no" if item.answer in ("yes", "no") else "choice", "all"


def generated(folder: Path, pictures: int, batch_size: int = 64) -> dict[str, float]:
    """Share of right answers to everything that held-out pictures are asked, by category and form,
    as generated.
    """
    from ..models.vision import Prompt, VisionModel  # a layer above: the demo models are data to it

    seeing, rng = VisionModel.load(str(folder), dtype=torch.float32), seeded("generated")
    found = [
        (Prompt(item.question, [drawings.draw(picture)], f"picture {index}"), item)
        for index, picture in enumerate(islice(drawings.stream("heldout", 1), pictures))
        for item in drawings.asked(picture, rng)
    ]
    found.sort(key=lambda pair: len(pair[0].text))  # less padding
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(found), batch_size):
        prompts, items = zip(*found[begin : begin + batch_size], strict=True)
        for item, said in zip(items, seeing.answers(prompts, max_new_tokens=8), strict=True):
            for key in keys_of(item):
                right[key].append(drawings.is_right(item.answer, said))
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def told(shares: dict[str, float]) -> str:
    return "held out: " + ", ".join(f"{key} {share:.1%}" for key, share in sorted(shares.items()))


def main(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    steps: Annotated[int, typer.Option(help="Training steps of 32 pictures.")] = VlmRecipe.steps,
    minutes: Annotated[
        float, typer.Option(help="Shorten the schedule to fit this time.")
    ] = math.inf,
    start: Annotated[
        Path | None, typer.Option(help="A folder made by this command, to go on from.")
    ] = None,
    data_seed: Annotated[
        int, typer.Option(help="Of the pictures: another one when going on.")
    ] = VlmRecipe.data_seed,
) -> None:
    """Train the demo VLM and measure it."""
    recipe = VlmRecipe(steps=steps, data_seed=data_seed)
    if start is not None:
        recipe = replace(recipe, looking_steps=0, sparse_steps=1)  # that was learned
    train_vlm(out, recipe, minutes, start)
    train.console.print(told(generated(out, pictures=400)))


if __name__ == "__main__":
    typer.run(main)
