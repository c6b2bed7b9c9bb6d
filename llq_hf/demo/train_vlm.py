"""Trains the demo vision-language model from scratch (tower, projector and decoder at once), and
measures it.

    uv run --extra vision python -m llq_hf.demo.train_vlm OUT                 the bundled model
    uv run --extra vision python -m llq_hf.demo.train_vlm OUT --minutes 5     a weaker one

Legend: B rows, T tokens, I tokens of the picture, V vocabulary, D hidden size, C cells, W words.

Model
    The architecture is LLaVA-Next's, with its "anyres" images. A picture of 48 x 48 pixels enters
    once as a whole, shrunk to 24 x 24, and once as four tiles of 24 x 24. Each of these five has
    four patches, and a newline follows each row of the tiles' patches: 24 tokens in all.

Training
    Large vision-language models start from a trained tower and a trained decoder. This one starts
    from random weights, and five things make an hour of one core enough:

    * A row of training holds one picture and many questions (see `vlm_data`).
    * Besides the two forms of the test, there are open questions ("red") and a description of the
      whole picture, which carries far more about it than a yes or no.
    * The projected patch of a cell is trained to lie near the embeddings of the words that name
      what is in the cell, as in CLIP. In the first steps tower and projector learn from that alone,
      which is cheap. The decoder then starts on patches that it can read like words.
    * Two attention heads have targets of their own. One is trained towards the cells that the
      question is about. The other is trained towards the word that the answer has just said, where
      it stands in the question: in the claim if it is true, or in the right option. Learning to
      find by content takes longest from answers alone.
    * Pictures have few marks at first: one, then two, and so on.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from . import drawings, train
from .drawings import CELLS, COLOURS, KINDS, Item
from .vlm_data import (
    ASSISTANT,
    IGNORED,
    IMAGE,
    IMAGE_TOKENS,
    PATCH_PIXELS,
    TILE_PATCHES,
    TILE_PIXELS,
    Batch,
    VlmRecipe,
    WantedAttention,
    batches,
    make_batch,
    make_processor,
    token_ids,
)
from .world import seeded

# --- model ----------------------------------------------------------------------------------------


def make_model(
    processor: LlavaNextProcessor, recipe: VlmRecipe
) -> LlavaNextForConditionalGeneration:
    """A small LLaVA-Next with random weights: CLIP tower, projector and Llama-3-style decoder."""
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
        # All layers are trained here, so there is no reason to stop before the last one.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # the other implementations do not return attentions
    return model


# --- training -------------------------------------------------------------------------------------


def words_of(processor: LlavaNextProcessor) -> tuple[Tensor, Tensor]:
    """Token ids of the kinds and of the colours.

    The first kind is "nothing", for which the otherwise unused `<image>` stands.
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
    """Mean nats per cell for naming kind and colour by the nearest embedding of a word."""
    B, _, D = image_BID.shape
    lines_BRCD = image_BID[:, TILE_PATCHES**2 :].reshape(B, CELLS, CELLS + 1, D)
    without_newlines_BRCD = lines_BRCD[:, :, :-1]
    cells_BCD = without_newlines_BRCD.flatten(1, 2) * D**0.5
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
    """image_BID: the projected patches, which stand in place of a picture's tokens."""
    return torch.stack(model.model.get_image_features(batch.pixels, batch.sizes_B2).pooler_output)


def decode(model: LlavaNextForConditionalGeneration, image_BID: Tensor, batch: Batch) -> Any:
    """The decoder's output, with attentions. Each question attends to the picture and to itself."""
    embeds_BTD = model.get_input_embeddings()(batch.ids_BT)
    embeds_BTD = torch.cat(
        [embeds_BTD[:, :2], image_BID.to(embeds_BTD), embeds_BTD[:, 2 + IMAGE_TOKENS :]], 1
    )
    own_BTT = batch.part_BT[:, :, None] == batch.part_BT[:, None, :]
    picture_B1T = batch.part_BT[:, None, :] == 0
    visible_BTT = (own_BTT | picture_B1T) & torch.ones_like(own_BTT).tril()
    # Eager attention adds its mask, so a boolean one would hide nothing.
    hidden = torch.finfo(torch.float32).min
    mask_BTT = torch.zeros(visible_BTT.shape).masked_fill(~visible_BTT, hidden)
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
    """Weighted mean nats per predicted token, plus the losses of the two heads with targets."""
    chosen = batch.labels_BT != IGNORED
    output = decode(model, image_BID, batch)
    logits_NV = model.lm_head(output.last_hidden_state[chosen])
    weights_N = batch.weights_BT[chosen]
    nats_N = F.cross_entropy(logits_NV, batch.labels_BT[chosen], reduction="none")
    # The first head of the last block picks, that of the block before looks.
    *_, look_BHTT, pick_BHTT = output.attentions
    look = attention_loss(look_BHTT[:, 0], batch.look)
    pick = attention_loss(pick_BHTT[:, 0], batch.pick)
    return (nats_N * weights_N).sum() / weights_N.sum() + (look + pick)


def attention_loss(weights_BTT: Tensor, wanted: WantedAttention) -> Tensor:
    """Mean cross-entropy in nats of a head's attention and the wanted one."""
    weights_NT = weights_BTT[wanted.row_N, wanted.place_N]
    return -(wanted.share_NT * (weights_NT + 1e-6).log()).sum() / max(1, len(weights_NT))


def train_vlm(
    out: Path,
    recipe: VlmRecipe,
    minutes: float = math.inf,
    start: Path | None = None,
    save_every: int = 100,
) -> None:
    """Train, and write the folder `out` every `save_every` steps and at the end.

    The schedule is that of `train.train`. start: a folder written by this function; training goes
    on from its weights.
    """
    if start is None:
        processor = make_processor(recipe)
    else:
        processor = LlavaNextProcessor.from_pretrained(start)
    model = make_model(processor, recipe).train()
    if start is not None:
        load(model, recipe, start)
    words = words_of(processor)
    optimizer = train.make_optimizer(model, recipe)
    began = time.monotonic()
    smooth = 0.0
    with train.training_bar() as bar:
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
                bar.console.print(f"step {step + 1}: loss {smooth:.3f}, {seconds_since(began)}")
                if step >= recipe.looking_steps:
                    shares = accuracy(model, processor, recipe, pictures=96)
                    bar.console.print(summary(shares))
                save(model, processor, recipe, out)
    save(model, processor, recipe, out)
    train.console.print(f"{step} steps, {seconds_since(began)}")


def seconds_since(began: float) -> str:
    """Seconds since `began` (of `time.monotonic`), and the process's processor time, for people."""
    return f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} s of processor time"


def load(model: LlavaNextForConditionalGeneration, recipe: VlmRecipe, folder: Path) -> None:
    """Load the weights of a folder that `save` wrote, and undo its spread of the channels."""
    saved = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    train.spread_channels(saved, replace(recipe, channel_spread=-recipe.channel_spread))
    model.load_state_dict(saved.state_dict())


def save(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    out: Path,
) -> None:
    """Write an ordinary Hugging Face folder with bf16 weights and spread channels.

    The model in training is not changed.
    """
    copy = LlavaNextForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    train.spread_channels(copy, recipe)
    copy.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    recipe: VlmRecipe,
    pictures: int,
) -> dict[str, float]:
    """Share of held-out questions whose full answer greedy decoding gives, by category and form.

    Every token of the answer must be the most likely one, given the right tokens before it.
    Generated answers are right a little more often, because a slip may still end in the right
    verdict. Many questions share a row, so this is quick enough for the training loop.
    """
    recipe = replace(recipe, tokens_per_row=512)  # room for all questions about a picture
    rng = seeded("accuracy", recipe.seed)
    stream = drawings.stream("heldout", recipe.seed)
    tokenizer = processor.tokenizer
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(0, pictures, recipe.rows_per_step):
        chosen = [next(stream) for _ in range(recipe.rows_per_step)]
        asked = [drawings.asked(picture, rng) for picture in chosen]
        batch = make_batch(processor, recipe, chosen, asked)
        hidden_BTD = decode(model, image_features(model, batch), batch).last_hidden_state
        best_BT = model.lm_head(hidden_BTD).argmax(-1)
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
    """The keys of the result that an item counts for."""
    form = "yes-no" if item.answer in ("yes", "no") else "choice"
    return item.category, form, "all"


def generated(folder: Path, pictures: int, batch_size: int = 64) -> dict[str, float]:
    """Share of right generated answers to all questions about held-out pictures, by category and
    form.
    """
    # A higher row of imports, to which the demo models are data: test_style names this exception.
    from ..models.vision import Prompt, VisionModel

    model = VisionModel.load(str(folder), dtype=torch.float32)
    rng = seeded("generated")
    asked = [
        (Prompt(item.question, [drawings.draw(picture)], f"picture {index}"), item)
        for index, picture in enumerate(islice(drawings.stream("heldout", 1), pictures))
        for item in drawings.asked(picture, rng)
    ]
    asked.sort(key=lambda pair: len(pair[0].text))  # less padding
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(asked), batch_size):
        prompts, items = zip(*asked[begin : begin + batch_size], strict=True)
        for item, said in zip(items, model.answers(prompts, max_new_tokens=8), strict=True):
            for key in keys_of(item):
                right[key].append(drawings.is_right(item.answer, said))
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def summary(shares: dict[str, float]) -> str:
    """One line of shares, sorted by key."""
    return "held out: " + ", ".join(f"{key} {share:.1%}" for key, share in sorted(shares.items()))


def main(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    steps: Annotated[int, typer.Option(help="Training steps of 16 pictures.")] = VlmRecipe.steps,
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
        recipe = replace(recipe, looking_steps=0, sparse_steps=1)  # both phases are done
    train_vlm(out, recipe, minutes, start)
    train.console.print(summary(generated(out, pictures=400)))


if __name__ == "__main__":
    typer.run(main)
