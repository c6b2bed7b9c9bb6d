"""The demo world, the bundled folder, and the training that makes it.

The central claim is that `nats` is the exact negative log-probability of a text. A decoder that
knows only the final text searches all sequences of choices that could have produced it: there must
be one, with the reported probability.
"""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf.demo import MODELS, resolve, train, world

FOLDER = Path(resolve("demo"))


class _AskedFor(Exception):
    """Raised when the list of choices has run out; carries the weights of the next choice."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)


def _parses(text: str) -> list[float]:
    """The probability of each sequence of choices that writes `text`."""
    found: list[float] = []
    pending: list[tuple[list[int], float]] = [([], 1.0)]
    while pending:
        script, probability = pending.pop()
        left = iter(script)

        def choose(weights, left=left):
            for index in left:
                return index
            raise _AskedFor(weights)

        writer = world.Writer(choose)
        try:
            writer.pick(world.KINDS, world.KIND_WEIGHTS)(writer)
        except _AskedFor as asked:
            if text.startswith("".join(writer.parts)):
                total = sum(asked.weights)
                pending += [
                    ([*script, i], probability * w / total) for i, w in enumerate(asked.weights)
                ]
        else:
            if "".join(writer.parts) == text:
                found.append(probability)
    return found


def _kind(text: str) -> str:
    """The kind of a document, from words that only this kind contains."""
    signs = {
        "counted": "count",
        "feast": "guests",
        "By night": "day",
        " more": "sum",
        "It often": "town",
    }
    return next((kind for sign, kind in signs.items() if sign in text), "portrait")


def test_text_has_one_parse_with_the_reported_probability() -> None:
    by_kind = {_kind(document.text): document for document in world.documents("heldout", 100)}
    assert len(by_kind) == len(world.KINDS)
    for document in by_kind.values():
        (probability,) = _parses(document.text)
        assert -math.log(probability) == pytest.approx(document.nats, abs=1e-9)


def test_frequencies_are_the_stated_ones() -> None:
    docs = world.documents("train", 8000)
    share = Counter(_kind(document.text) for document in docs)
    names = ("portrait", "town", "day", "sum", "count", "guests")
    for name, weight in zip(names, world.KIND_WEIGHTS, strict=True):
        p = weight / sum(world.KIND_WEIGHTS)
        assert abs(share[name] / len(docs) - p) < 4 * math.sqrt(p / len(docs))


def test_world_is_the_same_in_another_process() -> None:
    code = (
        "from llq_hf.demo.world import *; "
        "print(len(heldout_text()), heldout_text()[-200:], questions(3, seed=7))"
    )
    env = {"PYTHONHASHSEED": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    expected = (
        f"{len(world.heldout_text())} {world.heldout_text()[-200:]} {world.questions(3, seed=7)}\n"
    )
    assert run.stdout == expected


def test_splits_share_no_document() -> None:
    texts = {split: {d.text for d in world.documents(split, 1000)} for split in world.SPLITS}
    assert all(len(seen) > 950 for seen in texts.values())
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        world.documents("dev", 1)


def test_questions_are_four_way_and_balanced() -> None:
    questions = world.questions(2000)
    assert all(len(set(q.choices)) == 4 for q in questions)
    assert all(q.choices[q.gold].startswith(" ") for q in questions)
    gold = Counter(q.gold for q in questions)
    assert min(gold.values()) > 400


def test_questions_ask_about_facts_in_documents() -> None:
    text = "\n".join(d.text for d in world.documents("train", 8000))
    for question in world.questions(50):
        sentence = [question.query + choice + "." for choice in question.choices]
        assert sum(text.count(s) for i, s in enumerate(sentence) if i != question.gold) == 0
    assert any(q.query + q.choices[q.gold] + "." in text for q in world.questions(50))


def test_world_is_light() -> None:
    code = "import sys, llq_hf.demo.world; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resolve() -> None:
    assert resolve("demo") == str(MODELS["demo"])
    assert resolve("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"


def test_tokenizer_round_trip() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for text in (world.heldout_text(), "naïve façade — 12345\n\n\tend  "):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(world.calibration_text())["input_ids"]) >= 128 * 256
    assert len(tokenizer(world.heldout_text())["input_ids"]) >= 100 * 256


def test_folder_is_small_and_plain() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 9e6


def test_bundled_model_is_near_the_entropy_and_knows_the_facts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    docs = world.documents("heldout", 300)
    best = train.entropy_perplexity(tokenizer, docs)
    measured = train.perplexity(model, train.ids_of(tokenizer, world.page(docs)))
    assert best * 0.98 < measured < best * 1.07
    assert train.accuracy(model, tokenizer, world.questions(128)) >= 0.9


def test_spreading_channels_changes_no_bit_of_the_output() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids_BT = train.ids_of(tokenizer, world.heldout_text())[None, :64]
    before_BTV, down_OI = model(ids_BT).logits, model.model.layers[0].mlp.down_proj.weight.clone()
    train.spread_channels(model, train.Recipe(seed=7))
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, down_OI)
    assert torch.equal(model(ids_BT).logits, before_BTV)


def test_recipe_makes_a_loadable_folder(tmp_path: Path) -> None:
    tiny = train.Recipe(
        steps=3,
        tokens_per_step=1024,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        layers=1,
        documents_per_chunk=256,
    )
    trained, _ = train.train(tmp_path, tiny, compiled=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, trained.lm_head.weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path)("On Monday")["input_ids"][0] == 0
