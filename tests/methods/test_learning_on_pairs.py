"""Methods that learn on the whole model do so on image-text pairs: from the answers' tokens, with
the image and the question as context.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener, Progress
from llq_hf.data.calibration import Calibration
from llq_hf.data.pairs import Pairs, PairSequences, read_pairs
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.whole_model import sequences
from llq_hf.kernels.bitpack import unpack
from llq_hf.method import State
from llq_hf.methods import build, training
from llq_hf.methods.efficient_qat import EfficientQAT
from llq_hf.methods.hybrid.costs import Measured, output_gradients
from llq_hf.models.decoder import quantizable
from llq_hf.models.load import load_processor

FAST: dict[str, Any] = {"epochs": 0, "relative": True, "tune_batch": 2, "tune_lr": 0.02}
QUESTIONS = ("what is it?", "is the fox small?", "where is the river?")
ANSWERS = ("the fox is red", "the king of the hill", "at the river, said the fox")


def write_pairs(folder: Path, seeds: Sequence[int]) -> Path:
    """Pictures of noise in several shapes, each with a question and an answer by its seed."""
    folder.mkdir(exist_ok=True)
    lines = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        noise = random.integers(0, 255, (20 + 10 * (seed % 4), 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
        said = {"question": QUESTIONS[seed % 3], "answer": ANSWERS[seed % 3]}
        lines.append({"image": f"{seed}.png", **(said if seed % 5 else {"text": ANSWERS[0]})})
    (folder / "about.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), range(6))


@pytest.fixture(scope="module")
def read(tiny_llava: Path) -> Callable[[Path], Pairs]:
    """All pairs of a folder, in an order that only depends on their number."""
    processor = load_processor(tiny_llava)

    def pairs_of(folder: Path) -> Pairs:
        count = len((folder / "about.jsonl").read_text().splitlines())
        return read_pairs(str(folder), processor, count, 0).measured(2048)

    return pairs_of


@pytest.fixture
def model(tiny_llava: Path) -> Any:
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(tiny_llava).eval()


def answers_of(pairs: Pairs, index: int) -> tuple[dict[str, Tensor], int]:
    """A pair's inputs, and where its answer starts: found by the text that the tokens spell."""
    inputs, tokenizer = pairs.inputs(index), pairs.processor.tokenizer
    ids_S = inputs["input_ids"][0]
    start = max(i for i in range(len(ids_S)) if "assistant:" in tokenizer.decode(ids_S[i:]))
    while tokenizer.decode(ids_S[start:]).strip() != pairs.rows[index].answer:
        start += 1
    return inputs, start


def answer_loss(model: nn.Module, pairs: Pairs, index: int) -> Tensor:
    """Nats per token of the answer, from the logits of the whole sequence."""
    inputs, start = answers_of(pairs, index)
    logits_SV = model(**inputs).logits[0]
    return F.cross_entropy(logits_SV[start - 1 : -1], inputs["input_ids"][0, start:])


# --- which predictions count ----------------------------------------------------------------------


def test_answers_are_learned_and_visual_tokens_do_not_count(
    model: Any, folder: Path, read: Callable[[Path], Pairs]
) -> None:
    pairs = read(folder)
    data = sequences(pairs, model.to(torch.bfloat16))
    assert len(data) == 6
    assert list(data.lengths) == list(pairs.lengths)
    for index, batch in enumerate(data.batches(range(6))):
        inputs, start = answers_of(pairs, index)
        ids_S = inputs["input_ids"][0]
        assert torch.equal(batch.ids_BS, inputs["input_ids"])
        assert batch.inputs["pixel_values"].dtype == torch.bfloat16
        assert batch.asked_P.tolist() == list(range(start - 1, len(ids_S) - 1))
        assert batch.text_P.tolist() == [
            place for place, token in enumerate(ids_S) if token != model.config.image_token_index
        ]
        assert len(batch.text_P) < len(ids_S) - 4
    assert [list(each.lengths) for each in (data.head(2), data.head(9))] == [
        list(pairs.lengths[:2]),
        list(pairs.lengths),
    ]


def test_logits_of_other_positions_are_not_computed(
    model: Any, folder: Path, read: Callable[[Path], Pairs]
) -> None:
    """The head sees the asked positions alone, and what it says is what the whole pass says."""
    batch = next(sequences(read(folder), model).batches([1]))
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with torch.no_grad():
        whole_1SV = model(**batch.inputs).logits
        for places_P, found in (
            (batch.asked_P, batch.to_learn(model)),
            (batch.text_P, batch.on_text(model)),
        ):
            assert torch.allclose(found, whole_1SV[:, places_P], atol=1e-5)
    assert rows == [len(batch.ids_BS[0]), len(batch.asked_P), len(batch.text_P)]


# --- training -------------------------------------------------------------------------------------


class Memory(State):
    """Keeps what was saved; after the `stop`-th save the run is killed."""

    def __init__(self, stop: int = 0) -> None:
        self.saved: dict[str, Tensor] | None = None
        self.stop = stop

    def load(self) -> dict[str, Tensor] | None:
        return self.saved

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.saved = copy.deepcopy(tensors)
        self.stop -= 1
        if self.stop == 0:
            raise KeyboardInterrupt


def tuned(
    model: nn.Module, data: Pairs, method: EfficientQAT, state: State | None = None
) -> dict[str, Tensor]:
    """The scales that end-to-end training gives, starting from round-to-nearest."""
    student = packed(model, method)
    given = sequences(data, model)
    return method.tune(student, copy.deepcopy(model), given, Progress(), state or State())


def packed(model: nn.Module, method: EfficientQAT) -> nn.Module:
    """The model packed by the method without any training."""
    student = copy.deepcopy(model)
    untrained = EfficientQAT(**{**method.to_dict(), "tune_epochs": 0})
    quantize_model(student, untrained, torch.arange(2, 34)[None])
    for module in student.modules():
        if hasattr(module, "method"):
            module.method = method
    return student


def restored_scales(
    model: nn.Module, pairs: Pairs, method: EfficientQAT, rows: list[list[int]]
) -> dict[str, Tensor]:
    """The scales of a loop as one writes it without llq: dense weights from codes and scales in
    every pass, logits of the whole sequence, AdamW.
    """
    names = list(quantizable(model))
    student = packed(model, method)
    codes, starts, factors = {}, {}, {}
    for name in names:
        linear = student.get_submodule(name)
        scale_OG, width = linear.scale.float(), linear.in_features
        zero_OG = unpack(linear.zero, method.bits, scale_OG.numel()).view_as(scale_OG)
        codes_OI = unpack(linear.weight, method.bits, width)
        size = method.grid.size(width)
        spread = torch.arange(width) // size
        codes[name] = codes_OI.float() - zero_OG[:, spread].float()
        starts[name] = scale_OG[:, spread]
        factors[name] = torch.ones_like(scale_OG, requires_grad=True)
    optimizer = torch.optim.AdamW(factors.values(), lr=method.tune_lr, weight_decay=0.0)
    for step, chosen in enumerate(rows):
        done = step / len(rows)
        rate = done / 0.03 if done < 0.03 else np.cos(np.pi * (done - 0.03) / 0.97) / 2 + 0.5
        optimizer.param_groups[0]["lr"] = method.tune_lr * rate
        optimizer.zero_grad()
        for index in chosen:
            weights = {}
            for name in names:
                spread = torch.arange(codes[name].shape[1]) // method.grid.size(
                    codes[name].shape[1]
                )
                scale_OI = starts[name] * factors[name][:, spread]
                weights[f"{name}.weight"] = scale_OI * codes[name]
            inputs, start = answers_of(pairs, index)
            run = torch.func.functional_call(model, weights, (), inputs)
            loss = F.cross_entropy(run.logits[0, start - 1 : -1], inputs["input_ids"][0, start:])
            (loss / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 0.3)
        optimizer.step()
    return {
        f"{name}.scale": student.get_submodule(name).scale.float() * factors[name].detach()
        for name in names
    }


def test_end_to_end_training_is_a_loop_over_answers(
    model: Any, folder: Path, read: Callable[[Path], Pairs]
) -> None:
    """Scales after two epochs of three steps equal those of the loop."""
    method, pairs = build("efficient_qat", bits=2, **FAST, tune_epochs=2), read(folder)
    found = tuned(model, pairs, method)
    random = torch.Generator().manual_seed(0)
    order = [torch.randperm(6, generator=random).tolist() for _ in range(2)]
    rows = [each[start : start + 2] for each in order for start in (0, 2, 4)]
    expected = restored_scales(model, pairs, method, rows)
    start = packed(model, method)
    for name, scale_OG in expected.items():
        before_OG = start.get_submodule(name.removesuffix(".scale")).scale.float()
        moved = (scale_OG - before_OG).norm()
        assert moved > 0.01 * before_OG.norm(), name
        assert (found[name].float() - scale_OG).norm() < 0.02 * moved, name


@pytest.mark.parametrize("distill", [False, True])
def test_training_on_pairs_helps_on_held_out_pairs(
    model: Any, folder: Path, read: Callable[[Path], Pairs], tmp_path: Path, distill: bool
) -> None:
    """Of answers to other pictures: less loss, or less divergence from full precision."""
    heldout = read(write_pairs(tmp_path / "heldout", range(10, 16)))

    @torch.no_grad()
    def score(student: nn.Module) -> float:
        if not distill:
            losses = [float(answer_loss(student, heldout, index)) for index in range(6)]
            return sum(losses) / 6
        nats = []
        for batch in sequences(heldout, model).batches(range(6)):
            own, full = (batch.to_learn(each)[0].log_softmax(-1) for each in (student, model))
            nats.append(float((full.exp() * (full - own)).sum(-1).mean()))
        return sum(nats) / 6

    options = {**FAST, "bits": 2, "distill": distill}
    students = []
    for epochs in (0, 12):
        students.append(copy.deepcopy(model))
        method = build("efficient_qat", **options, batch=1, tune_epochs=epochs)
        quantize_model(students[-1], method, read(folder))
    before, after = map(score, students)
    assert after < (0.95 if distill else 0.8) * before


def test_another_image_is_another_training(
    model: Any, folder: Path, read: Callable[[Path], Pairs], tmp_path: Path
) -> None:
    """With the same questions and answers."""
    other = write_pairs(tmp_path / "other", range(6))
    for file in other.glob("*.png"):
        Image.new("RGB", Image.open(file).size, (250, 20, 20)).save(file)
    method = build("efficient_qat", bits=2, **FAST)
    one, another = (tuned(model, read(each), method) for each in (folder, other))
    assert any(not torch.equal(scale, another[name]) for name, scale in one.items())


def test_a_training_on_pairs_that_was_killed_goes_on(
    model: Any, folder: Path, read: Callable[[Path], Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVED_EVERY", 2)
    method, pairs = build("efficient_qat", bits=2, **FAST, tune_epochs=2), read(folder)
    whole, state = tuned(model, pairs, method), Memory(stop=2)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, pairs, method, state)
    assert int(state.saved["step"]) == 4
    resumed = tuned(model, pairs, method, state)
    assert all(torch.equal(scale, resumed[name]) for name, scale in whole.items())


# --- allocation -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_measured_cost_is_the_divergence_on_text(
    model: Any, folder: Path, read: Callable[[Path], Pairs], tmp_path: Path
) -> None:
    """Over all positions of text of all pairs; another image gives another cost."""
    pairs, name = read(folder), "model.language_model.layers.0.mlp.down_proj"
    weight_OI = model.get_submodule(name).weight
    random = torch.Generator().manual_seed(0)
    changed_OI = weight_OI + 0.05 * torch.randn(weight_OI.shape, generator=random)
    found = Measured(model, sequences(pairs, model), PassListener())({name: changed_OI}, [])

    other = copy.deepcopy(model)
    other.get_submodule(name).weight.copy_(changed_OI)
    nats, tokens = 0.0, 0
    for index in range(len(pairs)):
        inputs = pairs.inputs(index)
        before, after = (m(**inputs).logits[0].log_softmax(-1) for m in (model, other))
        for place, token in enumerate(inputs["input_ids"][0]):
            if token != model.config.image_token_index:
                nats += float((before[place].exp() * (before[place] - after[place])).sum())
                tokens += 1
    assert found == pytest.approx(nats / tokens, rel=1e-3)

    grey = write_pairs(tmp_path / "grey", range(6))
    for file in grey.glob("*.png"):
        Image.new("RGB", Image.open(file).size, (128, 128, 128)).save(file)
    elsewhere = Measured(model, sequences(read(grey), model), PassListener())
    assert elsewhere({name: changed_OI}, []) != pytest.approx(found, rel=1e-3)


def test_gradients_are_of_predictions_on_text(
    model: Any, folder: Path, read: Callable[[Path], Pairs]
) -> None:
    """Of the model's own draws there, per position of text; against autograd on one linear."""
    pairs, name = read(folder), "model.language_model.layers.0.mlp.up_proj"
    data = PairSequences(pairs, torch.device("cpu"), torch.float32).head(2)
    found = output_gradients(model, quantizable(model), data, 3, PassListener())[name]
    model.requires_grad_(True)
    linear, random = model.get_submodule(name), torch.Generator().manual_seed(3)
    total_O, tokens = torch.zeros(linear.out_features), 0
    for index in range(2):
        outputs: list[Tensor] = []
        with linear.register_forward_hook(lambda m, a, out, kept=outputs: kept.append(out)):
            inputs = pairs.inputs(index)
            logits_SV = model(**inputs).logits[0]
        text_S = inputs["input_ids"][0] != model.config.image_token_index
        logits_PV = logits_SV[text_S]
        drawn_P1 = torch.multinomial(logits_PV.detach().softmax(-1), 1, generator=random)
        loss = -logits_PV.log_softmax(-1).gather(1, drawn_P1).sum()
        (slope_1SO,) = torch.autograd.grad(loss, outputs[0])
        total_O += slope_1SO[0].square().sum(0)
        tokens += int(text_S.sum())
    assert torch.allclose(found, total_O / tokens, rtol=1e-3)


# --- what stays refused ---------------------------------------------------------------------------


def test_a_pair_without_an_answer_is_refused_before_any_block(
    tiny_llava: Path, tmp_path: Path
) -> None:
    """Where the template drops what the assistant says. Calibration alone may still take it."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_llava.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    template = "{% for message in messages if message['role'] == 'user' %}<image>asked{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    data = Calibration(str(write_pairs(tmp_path / "pairs", range(2))), samples=2)
    with pytest.raises(LLQError, match=r"Pair \d of .* has no answer that the chat template"):
        quantize_checkpoint(
            str(base), tmp_path / "out", build("efficient_qat", bits=2, batch=1), data
        )
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(str(base), tmp_path / "gptq", build("gptq", bits=4), data)
