"""The demo VLM: the bundled folder, the training that makes it, and its task for lmms-eval."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from llq_hf.data.calibration import CalibrationOptions, calibration_ids
from llq_hf.demo import MODELS, drawings, resolve
from llq_hf.demo.world import seeded
from llq_hf.engine.in_memory import quantize_model
from llq_hf.methods import build
from llq_hf.models.vision import Prompt, VisionModel

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: uv run --extra dev pytest")
train_vlm = pytest.importorskip("llq_hf.demo.train_vlm")
vlm_data = pytest.importorskip("llq_hf.demo.vlm_data")

FOLDER = Path(resolve("demo-vlm"))
TINY = vlm_data.VlmRecipe(
    steps=3,
    looking_steps=1,
    rows_per_step=4,
    hidden_size=32,
    intermediate_size=32,
    layers=2,
    tower_size=32,
)


def share_right(vision: VisionModel, facts_each: int) -> float:
    """Accuracy on the benchmark's yes-or-no questions, as generated. Chance is a half."""
    pictures = drawings.benchmark((*drawings.PERCEPTION, *drawings.COGNITION), facts_each)
    asked = [
        (drawings.draw(picture), item)
        for picture, items in pictures
        for item in items
        if item.claimed
    ]
    prompts = [
        Prompt(item.question, [image], str(index)) for index, (image, item) in enumerate(asked)
    ]
    answers = vision.answers(prompts, max_new_tokens=8)
    hits = [
        drawings.is_right(item.answer, said) for (_, item), said in zip(asked, answers, strict=True)
    ]
    return sum(hits) / len(hits)


def test_folder_is_small_and_plain() -> None:
    assert MODELS["demo-vlm"] == FOLDER
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(
        sizes
    )
    assert sum(sizes.values()) < 12e6


def test_bundled_model_tells_true_claims_from_false() -> None:
    """Its card says 85 to 90 %; over 96 questions one standard deviation is 3.4 points."""
    assert share_right(VisionModel.load(str(FOLDER)), 6) >= 0.75


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.7, 1.0), (2, 0.0, 0.4)])
def test_four_bits_keep_it_and_two_break_it(bits: int, least: float, most: float) -> None:
    """As in the study. At two bits the model gives no verdict; guesses would be half right."""
    vision = VisionModel.load(str(FOLDER), dtype=torch.float32)
    quantize_model(vision.model, build("rtn", bits=bits), None)
    assert least <= share_right(vision, 6) <= most


def test_calibration_text_is_its_own() -> None:
    data = CalibrationOptions().for_model("demo-vlm")
    assert (data.source, data.samples, data.seqlen) == ("demo-vlm", 128, 256)
    assert CalibrationOptions().for_model(str(FOLDER)) == data
    assert CalibrationOptions("wikitext2").for_model("demo-vlm").source == "wikitext2"
    tokenizer = VisionModel.load(str(FOLDER)).processor.tokenizer
    windows_NS = calibration_ids("demo-vlm", tokenizer, samples=4, seqlen=256)
    text = tokenizer.decode(windows_NS[0])
    assert re.search(r"<\|assistant\|>[^<]+ (yes|no|[A-D])<\|end_of_text\|>", text), (
        "what is seen, then the verdict"
    )


# --- the recipe -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained() -> tuple[Any, Any]:
    processor = vlm_data.make_processor(TINY)
    return processor, train_vlm.make_model(processor, TINY).eval()


def test_pixels_are_those_of_the_image_processor(untrained: tuple[Any, Any]) -> None:
    processor, _ = untrained
    pictures = list(islice(drawings.stream("train"), 5))
    seen = processor.image_processor(
        [drawings.draw(picture) for picture in pictures], return_tensors="pt"
    )
    assert torch.equal(
        vlm_data.pixels_of(processor.image_processor, pictures), seen["pixel_values"]
    )


@torch.no_grad()
def test_a_question_in_a_row_is_the_question_asked_alone(untrained: tuple[Any, Any]) -> None:
    """The trainer and the chat template give the same logits for an answer."""
    processor, _ = untrained
    model = train_vlm.make_model(processor, TINY).eval()
    # Untrained, attention is so even that a wrong mask would hardly change a logit.
    for weight in model.model.language_model.parameters():
        weight.mul_(4)
    picture = next(drawings.stream("train"))
    items = drawings.asked(picture, seeded("test"))[:3]
    batch = vlm_data.make_batch(processor, replace(TINY, tokens_per_row=256), [picture], [items])
    hidden_BTD = train_vlm.decode(
        model, train_vlm.image_features(model, batch), batch
    ).last_hidden_state
    assistant = processor.tokenizer.convert_tokens_to_ids(vlm_data.ASSISTANT)
    in_row = model.lm_head(hidden_BTD[0, batch.ids_BT[0] == assistant])
    assert len(in_row) == 3
    vision = VisionModel(model, processor)
    for item, logits_V in zip(items, in_row, strict=True):
        inputs = vision.inputs([Prompt(item.question, [drawings.draw(picture)], "")])
        torch.testing.assert_close(model(**inputs).logits[0, -1], logits_V, atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers(untrained: tuple[Any, Any]) -> None:
    processor, _ = untrained
    tokenizer = processor.tokenizer
    item = drawings.Item("sum", "What is the sum in the image?", "", said="7")
    row = vlm_data.make_row(tokenizer, TINY, [item])
    taught = [
        (token, weight)
        for token, weight in zip(row.labels, row.weights, strict=True)
        if weight == 1
    ]
    assert tokenizer.decode([token for token, _ in taught]) == "7<|end_of_text|>"
    assert len({len(part) for part in row[:5]}) == 1
    assert len(row.ids) == TINY.tokens_per_row


def test_recipe_makes_a_loadable_folder(tmp_path: Path) -> None:
    train_vlm.train_vlm(tmp_path, TINY)
    vision = VisionModel.load(str(tmp_path))
    assert vision.model.dtype == torch.bfloat16
    picture = next(drawings.stream("heldout"))
    prompt = Prompt("Describe the image.", [drawings.draw(picture)], "")
    assert len(vision.answers([prompt], max_new_tokens=3)) == 1


# --- the task -------------------------------------------------------------------------------------


def test_task_runs_in_lmms_eval_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only with our own index of tasks: lmms-eval's two thousand files take longer to read than
    all tests of this file to run.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llq_hf.common.resources import tasks_folder
    from llq_hf.hosts.lmms_eval_model import LLQ

    monkeypatch.chdir(tmp_path)
    manager = TaskManager(
        include_defaults=False, include_path=str(tasks_folder("lmms_eval") / "llq_demo_vqa")
    )
    model = LLQ(
        pretrained="demo-vlm",
        method="rtn",
        bits=4,
        device="cpu",
        batch_size=8,
        cache_dir=str(tmp_path),
    )
    found = simple_evaluate(
        model=model, tasks=["llq_demo_vqa"], task_manager=manager, limit=12, bootstrap_iters=0
    )
    for half in ("perception", "cognition"):
        result = found["results"][f"llq_demo_vqa_{half}"]
        assert 0 <= result["accuracy,none"] <= 1
        assert result["accuracy,none"] == pytest.approx(
            (2 * result["yes_no,none"] + result["choice,none"]) / 3
        )
    assert found["llq"]["method"] == "rtn"
    assert found["llq"]["fingerprint"] in os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("answer", "said", "hit"),
    [("yes", "red yes", 1), ("no", "red yes", 0), ("B", "B", 1), ("B", "", 0)],
)
def test_an_answer_counts_for_its_form(answer: str, said: str, hit: float) -> None:
    from llq_hf.hosts.lmms_eval_tasks import process_results

    form = "yes_no" if answer in ("yes", "no") else "choice"
    assert process_results({"answer": answer}, [said]) == {"accuracy": hit, form: hit}
