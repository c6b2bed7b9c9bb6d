"""Calibration on image-text pairs: visual tokens are in the statistics, files and memory agree, bad
pairs are named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llq_hf.checkpoints.dense import Checkpoint
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener
from llq_hf.data.calibration import Calibration
from llq_hf.data.pairs import Pairs, read_pairs
from llq_hf.engine.blocks import LiveBlocks, StreamedBlocks
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.stream import Ragged, Stream
from llq_hf.hosts.hf_quantizer import CONFIGS
from llq_hf.layers.linear import QuantLinear
from llq_hf.methods import build
from llq_hf.models.decoder import block_linears, block_prefixes
from llq_hf.models.load import build_skeleton, load_processor, module_names
from llq_hf.numerics.stats import Hessian

SHAPES = [(48, 32), (30, 60), (28, 28), (64, 64), (90, 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of different shapes, with texts of different lengths; one is a caption."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for index, (width, height) in enumerate(SHAPES):
        noise = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        said = {"question": "Is it red? " * (1 + index), "answer": "yes, it is"}
        lines.append(
            {"image": f"{index}.png", **(said if index else {"text": "a red fox on the hill"})}
        )
    (folder / "about.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path, tiny_llava: Path) -> Pairs:
    return read_pairs(str(folder), load_processor(tiny_llava), 5, 0).measured(2048)


def model_of(base: Path, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(base, **options).eval()


def test_visual_tokens_are_in_the_statistics(tiny_llava: Path, pairs: Pairs) -> None:
    """Of every linear's input in the first block: those of the model itself, run on the pairs one
    by one.
    """
    model, seen = model_of(tiny_llava), {}
    prefix = block_prefixes(model)[0]
    names = list(block_linears(model.get_submodule(prefix)))
    for name in names:
        seen[name] = Hessian(
            model.get_submodule(f"{prefix}.{name}").in_features, torch.device("cpu")
        )
        hook = lambda module, args, name=name: seen[name].update(args[0].flatten(0, -2), 1)  # noqa: E731
        model.get_submodule(f"{prefix}.{name}").register_forward_pre_hook(hook)
    images = 0
    with torch.no_grad():
        for index in range(len(pairs)):
            inputs = pairs.inputs(index)
            images += int((inputs["input_ids"] == model.config.image_token_index).sum())
            model(**inputs)
    assert images > 50

    checkpoint = Checkpoint.open(str(tiny_llava))
    skeleton = build_skeleton(checkpoint.path)
    named = checkpoint.named(module_names(skeleton, checkpoint.files))
    blocks = StreamedBlocks(named, skeleton, torch.float32, torch.device("cpu"))
    stream = Stream(blocks, pairs, None, PassListener())
    assert stream.activations.tensor_NSD.shape == (1, sum(pairs.lengths), 96)
    found = stream.observe(
        blocks.load(0), [[name] for name in names], dict.fromkeys(names, Hessian), None
    )
    for name in names:
        assert torch.allclose(found[name].H_II, seen[name].H_II, rtol=1e-4, atol=1e-4), name
    live = Stream(LiveBlocks(model), pairs, None, PassListener())
    assert torch.equal(live.activations.tensor_NSD, stream.activations.tensor_NSD)


def packed_of(model: torch.nn.Module) -> dict[str, Tensor]:
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.packed().items()
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", {"bits": 3}),
        ("awq", {"bits": 3, "search_tokens": 64}),
        ("omniquant", {"bits": 3, "epochs": 1}),
        ("spinquant", {"bits": 3}),
        ("spinquant", {"bits": 3, "rotations": "learned", "learn_steps": 2}),
        ("efficient_qat", {"bits": 2, "batch": 1, "tune_batch": 2}),
        ("efficient_qat", {"bits": 2, "preset": "best", "epochs": 1, "tune_epochs": 1}),
        ("db_llm", {"bits": 2, "steps": 2}),
        ("hybrid", {"bits": 3.5, "candidates": "rtn:2+rtn:3+rtn:4"}),
        ("hybrid", {"bits": 3.5, "candidates": "rtn:2+rtn:4", "measured": False}),
    ],
    ids=str,
)
def test_from_files_as_in_memory(
    tiny_llava: Path, folder: Path, tmp_path: Path, name: str, options: dict
) -> None:
    """Quantized, dense and paired streams, and methods that learn on the whole model."""
    method = build(name, **options)
    report = quantize_checkpoint(
        str(tiny_llava), tmp_path / "out", method, Calibration(str(folder), samples=5)
    )
    assert set(report["identity"]["calibration"]) == {"pairs_sha256", "samples", "tokens"}
    streamed = packed_of(model_of(tmp_path / "out"))
    config = CONFIGS[name](**options, calibration=str(folder), calibration_samples=5)
    direct = packed_of(model_of(tiny_llava, quantization_config=config))
    assert all(torch.equal(tensor, direct[key]) for key, tensor in streamed.items())


def test_the_fingerprint_covers_images_and_texts(
    tiny_llava: Path, folder: Path, pairs: Pairs, tmp_path: Path
) -> None:
    def digest(change: Callable[[Path], Any]) -> str:
        shutil.copytree(folder, tmp_path / "changed")
        change(tmp_path / "changed")
        found = (
            read_pairs(str(tmp_path / "changed"), load_processor(tiny_llava), 5, 0)
            .measured(2048)
            .sha256
        )
        shutil.rmtree(tmp_path / "changed")
        return found

    def other_pixel(path: Path) -> None:
        image = Image.open(path / "3.png")
        image.putpixel((30, 30), (0, 255, 0))
        image.save(path / "3.png")

    def other_answer(path: Path) -> None:
        (path / "about.jsonl").write_text(
            (path / "about.jsonl").read_text().replace("yes, it is", "no, it is", 1)
        )

    assert digest(lambda path: None) == pairs.sha256
    assert len({pairs.sha256, digest(other_pixel), digest(other_answer)}) == 3


def test_pairs_are_drawn_by_seed(tiny_llava: Path, folder: Path) -> None:
    processor = load_processor(tiny_llava)
    drawn = [
        [pair.where for pair in read_pairs(str(folder), processor, 3, seed).rows]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(rows)) == 3 for rows in drawn)
    with pytest.warns(UserWarning, match="holds 5 pairs, fewer than samples=128"):
        read_pairs(str(folder), processor, 128, 0)


def test_a_killed_run_on_pairs_goes_on(
    tiny_llava: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llq_hf.engine.execute

    class KilledError(Exception):
        pass

    def quantize(out: Path) -> Path:
        quantize_checkpoint(
            str(tiny_llava), out, build("gptq", bits=3), Calibration(str(folder), samples=5)
        )
        return out

    step, whole = llq_hf.engine.execute.quantize_step, quantize(tmp_path / "whole")

    def second_block_kills(given: Any, *arguments: Any) -> Any:
        if ".layers.1" in given.prefix:
            raise KilledError
        return step(given, *arguments)

    monkeypatch.setattr(llq_hf.engine.execute, "quantize_step", second_block_kills)
    with pytest.raises(KilledError):
        quantize(tmp_path / "out")
    monkeypatch.undo()
    quantize(tmp_path / "out")
    for file in whole.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"image": "absent.png", "text": "x"}',
            r"Pair 1 of .*about.jsonl: its image is missing or damaged",
        ),
        (
            '{"image": "damaged.png", "text": "x"}',
            r"Pair 1 of .*about.jsonl: its image is missing or damaged",
        ),
        ('{"text": "x"}', r"Pair 1 of .* has no path in a field `image` \(fields: text\)"),
        (
            '{"image": "0.png", "question": "x"}',
            r"Pair 1 of .* has neither `question` and `answer` nor `text`",
        ),
        (
            json.dumps({"image": "0.png", "text": "why " * 3000}),
            r"Pair 1 of .* has \d+ tokens, and the model takes",
        ),
        ("{", r"Line 1 of .* is not valid JSON"),
    ],
    ids=["no file", "truncated file", "no image", "no answer", "too long", "no JSON"],
)
def test_a_pair_that_cannot_be_read_is_named(
    tiny_llava: Path, folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "about.jsonl").write_text(line)
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    (tmp_path / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:80])
    with pytest.raises(LLQError, match=message):
        quantize_checkpoint(
            str(tiny_llava), tmp_path / "out", build("gptq"), Calibration(str(tmp_path), samples=1)
        )
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(
    tiny_llava: Path,
    tiny_llama: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = Calibration(str(folder), samples=5)
    with pytest.raises(LLQError, match="takes none; calibrate on text"):
        quantize_checkpoint(str(tiny_llama), tmp_path / "out", build("gptq"), data)
    written = build("db_llm", bits=2, generated=4)
    with pytest.raises(LLQError, match="db_llm with these options needs token ids; calibrate it"):
        quantize_checkpoint(str(tiny_llava), tmp_path / "out", written, data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LLQError, match=r"holds 0 \.jsonl files"):
        quantize_checkpoint(
            str(tiny_llava), tmp_path / "out", build("gptq"), Calibration(str(tmp_path / "empty"))
        )


def test_sequences_of_different_lengths_come_one_at_a_time() -> None:
    """Several at once are refused, not cut to the first."""
    activations = Ragged([2, 3, 1], 4, torch.float32, None)
    for row in range(3):
        activations[slice(row, row + 1)] = torch.full((1, [2, 3, 1][row], 4), float(row))
    assert activations.tensor_NSD[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2]
    assert activations[slice(1, 3, 2)].shape == (1, 3, 4)  # every second one from the second on
    with pytest.raises(LLQError, match="2 sequences of different lengths do not make a batch"):
        activations[slice(0, 2)]


def test_pairs_of_a_hub_dataset(
    tiny_llava: Path, folder: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pairs as columns of a dataset are the same calibration."""
    import datasets

    lines = [json.loads(line) for line in (folder / "about.jsonl").read_text().splitlines()]
    rows = [
        {"image": str(folder / line["image"]), "question": line.get("question", "")}
        for line in lines
    ]
    rows = [
        {**row, "answer": line.get("answer", line.get("text"))}
        for row, line in zip(rows, lines, strict=True)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr("llq_hf.data.pairs.hub_rows", lambda name, split, offline_cure: table)
    found = read_pairs("hub:user/pictures", load_processor(tiny_llava), 5, 0).measured(2048)
    assert found.sha256 == pairs.sha256
    monkeypatch.setattr(
        "llq_hf.data.pairs.hub_rows",
        lambda name, split, offline_cure: table.remove_columns("image"),
    )
    with pytest.raises(LLQError, match="has no column `image`"):
        read_pairs("hub:user/pictures", load_processor(tiny_llava), 5, 0)
