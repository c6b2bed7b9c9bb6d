"""Trains the demo model from scratch: tokenizer, training and evaluation in one file.

    python -m llq_hf.demo.train OUT                 the bundled model again
    python -m llq_hf.demo.train OUT --minutes 5     a weaker one

The first takes about half an hour on two cores. `--minutes` fits the whole learning-rate schedule
into that time.

Model
    Shapes follow Llama-3 (GQA, SwiGLU, RoPE with theta 5e5, untied head). Both widths are multiples
    of 128, so that all group sizes and packed layouts fit. With four layers, errors already add up
    from block to block, which is what GPTQ-style calibration repairs.

Training
    It is long for the size: every fact of the world occurs more than a hundred times. A short
    training would leave slack in the weights that rounding does not hurt. The study that this
    project rebuilds (arXiv 2404.14047) finds that LLaMA-3 suffers more at low bits than its
    predecessors, and suspects its long training; the demo model should behave like that.

Data
    No text repeats, because each chunk is generated with a new seed. Rows are cut from running
    text, as from a corpus. A third of them start at the beginning of a page. So the model learns
    both forms in which it will be used: a prompt after ``<|begin_of_text|>``, and a perplexity
    window that starts in the middle of a sentence.
"""

# B rows, T tokens, V vocabulary, N tokens of a stream, I input channels, K key-value heads, D
# head_dim

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from . import world

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
console = Console()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training. The defaults are those of the bundled model.

    The bundled model was trained with `--minutes 34` on two busy cores, which gave 3258 steps. A
    second run ends close to it but not in the same bits, because the order of sums depends on the
    compiler and the number of threads.
    """

    steps: int = 3300
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    channel_spread: float = 0.9
    documents_per_chunk: int = 32768
    seed: int = 2404


# Tokenizer


def make_tokenizer(
    recipe: Recipe, texts: Iterable[str] | None = None, special: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the style of Llama-3, but with one token per digit, to make sums easier.

    texts: training text, by default the world's. special: further special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        texts or (d.text for d in world.documents("train", 20000)), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=10**6,
    )


# Data


def chunk(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, index: int) -> Tensor:
    """ids_N of new text: pages of 32 documents, each page between BOS and EOS."""
    docs = world.documents("train", recipe.documents_per_chunk, seed=index)
    pages = [world.page(docs[i : i + 32]) + EOS for i in range(0, len(docs), 32)]
    return torch.tensor([token for ids in tokenizer(pages)["input_ids"] for token in ids])


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Tensor]:
    """An endless stream of ids_BT. Every eighth batch has T = 512 or 1024, the others T = 256."""
    rng = random.Random(recipe.seed)
    index = 0
    while True:
        ids_N = chunk(tokenizer, recipe, index)
        starts = (ids_N == tokenizer.bos_token_id).nonzero().flatten().tolist()
        for step in range(max(1, len(ids_N) // recipe.tokens_per_step)):
            T = {7: 512, 15: 1024}.get(step % 16, 256)
            rows = []
            for _ in range(max(1, recipe.tokens_per_step // T)):
                start = int(rng.random() * (len(ids_N) - T))
                if rng.random() < 1 / 3:
                    start = min(starts[int(rng.random() * len(starts))], len(ids_N) - T)
                rows.append(ids_N[start : start + T])
            yield torch.stack(rows)
        index += 1


# Model and training


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama-3 in miniature, with random weights."""
    torch.manual_seed(recipe.seed)
    heads = recipe.hidden_size // 64
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Eager attention compiles into fewer passes over memory than the CPU flash kernel, whose
        # backward is slow.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, without weight decay for the norms' gains."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean nats per predicted token."""
    logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def schedule(step: int, progress: float, recipe: Recipe) -> float:
    """Factor of the learning rate: warm-up, then a cosine down to a tenth of a percent.

    It ends so low because weights that still fluctuate round badly. progress: 0 at the start, 1 at
    the end.
    """
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return warmup * max(1e-3, 0.5 * (1 + math.cos(math.pi * progress)))


def training_bar() -> Progress:
    """The progress bar of a training."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def train(
    out: Path,
    recipe: Recipe,
    minutes: float = math.inf,
    save_every: int = 500,
    compiled: bool = True,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train, and write the folder `out` every `save_every` steps and at the end.

    Progress is measured in steps or in minutes, whichever is further on. So a time limit shortens
    the cosine instead of cutting it off.
    """
    tokenizer = make_tokenizer(recipe)
    model = make_model(tokenizer, recipe).train()
    optimizer = make_optimizer(model, recipe)
    step_loss: Any = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    began = time.monotonic()
    tokens = 0
    smooth = math.log(recipe.vocab_size)  # the loss before training, then its moving average
    with training_bar() as bar:
        task = bar.add_task("training", total=recipe.steps)
        for step, ids_BT in enumerate(batches(tokenizer, recipe)):
            progress = max(step / recipe.steps, (time.monotonic() - began) / (60 * minutes))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, progress, recipe)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = step_loss(model, ids_BT)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            tokens += ids_BT.numel()
            smooth += 0.02 * (loss.item() - smooth)
            bar.update(
                task, advance=1, description=f"loss {smooth:.4f}  {tokens / 1e6:.1f}M tokens"
            )
            if (step + 1) % save_every == 0:
                bar.console.print(
                    f"step {step + 1}: loss {smooth:.4f}, {time.monotonic() - began:.0f} s"
                )
                save(model, tokenizer, recipe, out)
    save(model, tokenizer, recipe, out)
    console.print(f"{step} steps, {tokens / 1e6:.1f}M tokens, {time.monotonic() - began:.0f} s")
    return model, tokenizer


@torch.no_grad()
def spread_channels(model: PreTrainedModel, recipe: Recipe) -> None:
    """Give the channels unequal scales, as in large models, without changing any output bit.

    Large LLaMAs have a few channels with far larger activations and others with far larger weights,
    which is the main reason why rounding hurts them. A model of width 256 develops no such
    channels, and 2 bits hardly hurt it. So each channel between two matrices is multiplied by a
    power of two on one side and divided by it on the other, which is exact in floating point.
    Exponents are drawn from a normal distribution. Now a group of weights holds large and small
    ones side by side, and better methods give better results.
    """
    generator = torch.Generator().manual_seed(recipe.seed)

    def powers(channels: int) -> Tensor:
        return 2.0 ** (torch.randn(channels, generator=generator) * recipe.channel_spread).round()

    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        inputs = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, readers in inputs.items():
            scale_I = powers(len(norm.weight))
            norm.weight /= scale_I
            for linear in readers:
                linear.weight *= scale_I
        # A value channel is read by every query head of its group; SwiGLU is linear in `up`.
        scale_KD = powers(attention.v_proj.out_features).view(-1, 1, attention.head_dim)
        attention.v_proj.weight /= scale_KD.view(-1, 1)
        attention.o_proj.weight *= scale_KD.expand(-1, attention.num_key_value_groups, -1).flatten()
        scale_I = powers(mlp.up_proj.out_features)
        mlp.up_proj.weight /= scale_I[:, None]
        mlp.down_proj.weight *= scale_I


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path
) -> None:
    """Write an ordinary Hugging Face folder with bf16 weights and spread channels.

    The model in training is not changed.
    """
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    spread_channels(copy, recipe)
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


# Evaluation


@torch.no_grad()
def perplexity(model: nn.Module, ids_N: Tensor, window: int = 256) -> float:
    """Token perplexity over windows that do not overlap, as GPTQ and its successors measure it."""
    ids_BT = ids_N[: len(ids_N) // window * window].view(-1, window)
    losses = [loss_of(model, rows_BT).item() * len(rows_BT) for rows_BT in torch.split(ids_BT, 16)]
    return math.exp(sum(losses) / len(ids_BT))


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """ids_N of a text, with BOS in front."""
    return torch.tensor(tokenizer(text)["input_ids"])


def entropy_perplexity(tokenizer: PreTrainedTokenizerFast, docs: list[world.Document]) -> float:
    """Perplexity of the generator itself on these documents: the best that a model can reach."""
    tokens = len(ids_of(tokenizer, world.page(docs))) - 1
    return math.exp(sum(document.nats for document in docs) / tokens)


@torch.no_grad()
def accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, questions: list[world.Question]
) -> float:
    """Share of questions whose true continuation has the highest log-likelihood.

    This is `acc` of lm-eval.
    """
    right = 0
    for begin in range(0, len(questions), 32):
        some = questions[begin : begin + 32]
        rows, prompts = [], []
        for question in some:
            rows += tokenizer([question.query + choice for choice in question.choices])["input_ids"]
            prompts += [len(tokenizer(question.query)["input_ids"])] * len(question.choices)
        T = max(map(len, rows))
        # Causal attention never reads padding on the right; prompts and padding are no
        # targets.
        ids_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        pairs = zip(rows, prompts, strict=True)
        target_BT = torch.tensor(
            [[-100] * n + row[n:] + [-100] * (T - len(row)) for row, n in pairs]
        )
        logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1].float()
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2), target_BT[:, 1:], reduction="none")
        best = nats_BT.sum(1).view(len(some), -1).argmin(1).tolist()
        right += sum(guess == question.gold for guess, question in zip(best, some, strict=True))
    return right / len(questions)


def main(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    steps: Annotated[int, typer.Option(help="Training steps of 4096 tokens.")] = Recipe.steps,
    minutes: Annotated[
        float, typer.Option(help="Shorten the schedule to fit this time.")
    ] = math.inf,
    compiled: Annotated[
        bool, typer.Option(help="torch.compile: twice as fast, needs a C++ compiler.")
    ] = True,
) -> None:
    """Train the demo model and measure it."""
    train(out, Recipe(steps=steps), minutes, compiled=compiled)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    docs = world.documents("heldout", world.HELDOUT_DOCUMENTS)
    ids_N = ids_of(tokenizer, world.heldout_text())
    console.print(
        f"entropy of the generator, as perplexity {entropy_perplexity(tokenizer, docs):.4f}"
    )
    for window in (256, 1024):
        console.print(
            f"held-out perplexity, windows of {window:4}  {perplexity(model, ids_N, window):.4f}"
        )
    share = accuracy(model, tokenizer, world.questions(1000))
    console.print(f"multiple choice, 1000 questions         {share:.1%}")


if __name__ == "__main__":
    typer.run(main)
