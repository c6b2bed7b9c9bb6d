"""The model `llq` of lmms-eval: built-in tasks on real rows, offline; rows that cannot be asked;
what results carry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llq_hf import LLQError

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: uv run --extra dev pytest")


def picture(level: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    ramp = np.linspace(0, level, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(ramp.astype(np.uint8))


def request(row: int, text: str = "Is it a cat?", **generation: Any) -> Any:
    """The part of an evaluator's request that a model reads."""
    visual = lambda doc: [doc["image"].convert("RGB")]  # noqa: E731 (a task's doc_to_visual)
    return SimpleNamespace(
        args=(text, {"max_new_tokens": 4, **generation}, visual, row, "t", "test")
    )


@pytest.fixture(scope="module")
def llq(
    tiny_llava: Path, calibration_npy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """The harness's model on the tiny LLaVA-Next, with rows of a task `t`."""
    from llq_hf.hosts.lmms_eval_model import LLQ

    cache = str(tmp_path_factory.mktemp("cache"))

    def make(rows: list[dict[str, Any]], method: str = "gptq", **options: Any) -> Any:
        shared = {"pretrained": str(tiny_llava), "cache_dir": cache, "device": "cpu"}
        if method == "gptq":
            options = {
                "bits": 3,
                "calibration": str(calibration_npy),
                "calibration_samples": 8,
                **options,
            }
        model = LLQ(method=method, **shared, **options)
        model.task_dict = {"t": {"test": rows}}
        return model

    return make


ROWS = [
    {"image": picture(level, size)}
    for level, size in ((40, (48, 32)), (90, (30, 60)), (200, (28, 28)))
]


def test_batches_answer_as_single_questions_do(llq: Callable[..., Any]) -> None:
    """Left padding: images of different shapes and questions of different lengths, answers in the
    order asked.
    """
    requests = [request(row, "Is it? " * (1 + row)) for row in (2, 0, 1)]
    alone, together = (llq(ROWS, batch_size=size).generate_until(requests) for size in (1, 3))
    assert alone == together
    assert len(set(alone)) > 1


def test_answers_with_a_packed_cache(llq: Callable[..., Any]) -> None:
    """Which results name."""
    model = llq(ROWS, kv_cache_bits=2)
    seen: list[Any] = []

    def see(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(given["past_key_values"].layers)

    model.vision.model.register_forward_pre_hook(see, with_kwargs=True)
    model.generate_until([request(0)])
    assert {type(layer).__name__ for layers in seen for layer in layers} == {"PackedLayer"}
    assert model.llq()["kv_cache"]["nbits"] == 2


def test_answers_stop_where_the_task_says(llq: Callable[..., Any]) -> None:
    model = llq(ROWS)
    (whole,) = model.generate_until([request(0)])
    given = request(0, until=[whole[1:3]])
    assert model.generate_until([given]) == [whole[:1]]
    assert given.args[1]["until"] == [whole[1:3]]  # what requests share is not changed


def test_control_characters_do_not_reach_spreadsheets(
    llq: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llq(ROWS)
    tokenizer = type(model.vision.processor.tokenizer)
    monkeypatch.setattr(
        tokenizer, "batch_decode", lambda self, ids, **options: ["a\x00b\x0b\nc"] * len(ids)
    )
    assert model.generate_until([request(0)]) == ["ab\nc"]


def damaged() -> Any:
    """An image as `datasets` gives it: opened, but its pixels cannot be read."""
    import io

    whole = io.BytesIO()
    picture(90, (200, 200)).save(whole, "png")
    return Image.open(io.BytesIO(whole.getvalue()[:200]))


@pytest.mark.parametrize(
    ("row", "text", "message"),
    [
        ({"image": None}, "Is it?", "t/test row 1: its image is missing or damaged"),
        ({}, "Is it?", "t/test row 1: its image is missing or damaged"),
        ({"image": "damaged"}, "Is it?", "t/test row 1: its image is missing or damaged"),
        ({"image": picture(3)}, "why " * 2000, "t/test row 1: its prompt has"),
    ],
    ids=["no image", "no field", "truncated file", "over-long prompt"],
)
def test_a_row_that_cannot_be_asked_is_named(
    llq: Callable[..., Any], row: dict, text: str, message: str
) -> None:
    rows = [ROWS[0], {**row, "image": damaged()} if row.get("image") == "damaged" else row]
    with pytest.raises(LLQError, match=message):
        llq(rows).generate_until([request(0), request(1, text)])


def test_a_question_without_image(llq: Callable[..., Any]) -> None:
    """An error that names the row; or, where it is asked for, asked as text and counted."""
    bare = SimpleNamespace(args=("Who?", {"max_new_tokens": 4}, lambda doc: [], 0, "t", "test"))
    with pytest.raises(LLQError, match="t/test row 0: a question without an image; text_only=true"):
        llq(ROWS).generate_until([bare])
    model = llq(ROWS, text_only=True)
    assert len(model.generate_until([bare, request(0)])) == 2
    assert model.llq()["rows_without_image_asked_as_text"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq", "bitz": 3}, "did you mean 'bits'"),
        ({"method": "rtn", "batch_size": "auto"}, "batch_size='auto'"),
        ({"method": "none", "bits": 3}, "takes no options"),
    ],
)
def test_refused_options(llq: Callable[..., Any], options: dict, message: str) -> None:
    with pytest.raises(LLQError, match=message):
        llq(ROWS, **options)


def test_refused_models_and_requests(llq: Callable[..., Any], tiny_llama: Path) -> None:
    from llq_hf.hosts.lmms_eval_model import LLQ

    with pytest.raises(LLQError, match="takes no images"):
        LLQ(pretrained=str(tiny_llama), method="none", device="cpu")
    model = llq(ROWS, method="none")
    assert model.llq() == {"method": "none", "rows_without_image_asked_as_text": 0}
    with pytest.raises(LLQError, match="log-likelihood"):
        model.loglikelihood([])
    with pytest.raises(LLQError, match="length_penalty"):
        model.generate_until([request(0, length_penalty=2)])


def test_a_failed_evaluation_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """lmms-eval logs errors and exits with 0; the command of `--model llq` does not."""
    from llq_hf.hosts.lmms_eval_model import failing_loudly

    def fail(args: Any = None, cli_args: Any = None) -> None:
        raise LLQError("mme/test row 3: its image is missing")

    with pytest.raises(SystemExit) as stopped:
        failing_loudly(fail)(SimpleNamespace(model="llq"))
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "Error: mme/test row 3: its image is missing\n"
    with pytest.raises(SystemExit):
        failing_loudly(fail)(cli_args=SimpleNamespace(model="llq"))
    for arguments in ([SimpleNamespace(model="qwen2_vl")], []):  # not ours; not the command
        with pytest.raises(LLQError):
            failing_loudly(fail)(*arguments)


# --- built-in tasks, on the real rows of shared/ --------------------------------------------------


def write(folder: Path, file: str, rows: list[dict[str, Any]], config: str = "") -> None:
    """A dataset as lmms-eval's own lie on the Hub: parquet with the images in it, named configs in
    README.md.
    """
    import datasets

    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list([{**row, "image": str(row["image"])} for row in rows])
    table.cast_column("image", datasets.Image()).to_parquet(folder / file)
    if config:
        split = "dev" if config == "en" else "validation"
        files = f"  - split: {split}\n    path: {file}\n"
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        )


@pytest.fixture(scope="module")
def benchmarks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few real rows of each benchmark where lmms-eval looks for them when it runs
    there.
    """
    source, folder = shared / "data" / "images", tmp_path_factory.mktemp("benchmarks")
    if not source.is_dir():
        pytest.skip(f"no images in {shared}")
    root = folder / "lmms-lab-encoder"

    def rows(name: str) -> list[dict[str, Any]]:
        found = json.loads((source / name / "rows.json").read_text())
        return [{**row, "image": source / name / row["image"]} for row in found]

    pairs = [row for row in rows("mme") if row["category"] in ("count", "code_reasoning")]
    pairs = pairs[:2] + pairs[-2:]
    mme = [{**row, "question_id": f"{row['category']}/{row['image'].name}"} for row in pairs]
    write(root / "MME", "data/test-00000-of-00001.parquet", mme)
    kinds = {"human": "human_test", "augmented": "augmented_test"}
    charts = [{**row, "type": kinds[row["type"]]} for row in rows("chartqa")]
    write(root / "ChartQA", "data/test-00000-of-00001.parquet", charts[:1] + charts[-1:])
    pages = json.loads((source / "docvqa" / "val_v1.0.json").read_text())["data"][:2]
    pages = [
        {**row, "questionId": str(row["questionId"]), "image": source / "docvqa" / row["image"]}
        for row in pages
    ]
    write(root / "DocVQA", "DocVQA/validation-00000-of-00001.parquet", pages, "DocVQA")
    chosen = [row for row in rows("mmbench") if row["lang"] == "en"][:2]
    options = [
        {letter: str(row["options"].get(letter, "nan")) for letter in "ABCD"} for row in chosen
    ]
    known = {
        "category": "object",
        "source": "s",
        "l2-category": "x",
        "L2-category": "x",
        "split": "dev",
    }
    bench = [
        {**known, **letters, "index": i, "hint": str(row["hint"] or "nan"), "comment": "nan"}
        | {key: row[key] for key in ("image", "question", "answer")}
        for i, (row, letters) in enumerate(zip(chosen, options, strict=True))
    ]
    write(root / "MMBench", "en/dev-00000-of-00001.parquet", bench, "en")
    asked = {
        "question": "Which one?",
        "options": ["a fox", "a dog", "a cat", "a mat"],
        "answer": "2",
    }  # no AI2D there
    write(
        root / "ai2d",
        "data/test-00000-of-00001.parquet",
        [{"image": row["image"], **asked} for row in chosen],
    )
    return folder


@pytest.fixture(scope="module")
def manager() -> Any:
    """lmms-eval's index of tasks: it reads two thousand files."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(model_name="llq")


def test_built_in_tasks_end_to_end(
    llq: Callable[..., Any],
    manager: Any,
    benchmarks: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The tasks of `llq_mllm` as they are, offline, on real rows (not ai2d); and what the results
    carry.
    """
    from lmms_eval.evaluator import simple_evaluate

    (tmp_path / "lmms-lab-encoder").symlink_to(benchmarks / "lmms-lab-encoder")
    monkeypatch.chdir(tmp_path)
    tasks = ["mme", "chartqa", "docvqa_val", "mmbench_en_dev_static", "ai2d"]
    found = simple_evaluate(
        model=llq([], batch_size=2),
        tasks=tasks,
        task_manager=manager,
        gen_kwargs="max_new_tokens=3",
        bootstrap_iters=0,
        log_samples=True,
    )
    counts = {task: len(found["samples"][task]) for task in tasks}
    assert counts == {
        "mme": 4,
        "chartqa": 2,
        "docvqa_val": 2,
        "mmbench_en_dev_static": 2,
        "ai2d": 2,
    }
    metrics = (
        "mme_perception_score,none",
        "relaxed_overall,none",
        "anls,none",
        "gpt_eval_score,none",
    )
    for task, metric in zip(tasks, (*metrics, "exact_match,flexible-extract"), strict=True):
        assert found["results"][task][metric] >= 0
    assert found["llq"]["method"] == "gptq"
    assert found["llq"]["config"]["bits"] == 3
    assert found["llq"]["quantized_linears"] == 14
    assert 3 < found["llq"]["stored_bits"] < 5
    assert len(found["llq"]["fingerprint"]) == 16


def test_our_group_is_known(manager: Any) -> None:
    from lmms_eval.tasks import TaskManager

    assert "llq_mllm" in manager.all_groups
    group = manager._get_config("llq_mllm")
    assert group["task"] == ["ai2d", "chartqa", "docvqa_val", "mme", "mmbench_en_dev_static"]
    assert set(group["task"]) <= set(manager.all_subtasks)
    assert "llq_mllm" not in TaskManager(include_defaults=False).all_tasks


def test_the_command_finds_the_model_and_fails_with_a_status(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """`lmms-eval --model llq` as typed, from another folder, on a model that takes no images."""
    command = [str(Path(sys.executable).parent / "lmms-eval"), "--model", "llq", "--tasks", "mme"]
    command += ["--model_args", f"pretrained={tiny_llama},method=none"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "takes no images (llama)" in done.stderr


# --- the language part ----------------------------------------------------------------------------


def test_lm_eval_scores_the_language_part(
    tiny_llava: Path, calibration_npy: Path, tmp_path: Path
) -> None:
    """Perplexity of the same packed checkpoint through lm-eval: the study's table 11."""
    from llq_hf.hosts.lm_eval_model import LLQLM

    options = {"calibration": str(calibration_npy), "cache_dir": str(tmp_path), "device": "cpu"}
    model = LLQLM(
        pretrained=str(tiny_llava), method="gptq", bits=3, calibration_samples=8, **options
    )
    assert model.get_model_info()["llq"]["quantized_linears"] == 14
    assert model.max_length == 2048
    window = list(range(2, 34))
    ((score, _),) = model._loglikelihood_tokens([(None, window[:1], window[1:])], disable_tqdm=True)
    with torch.no_grad():
        logits = model.model(torch.tensor([window])).logits[0, :-1]
    expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
    assert score == pytest.approx(float(expected), rel=1e-4)
