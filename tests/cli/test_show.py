"""`llq show`, and which harness `llq eval` takes."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from llq_hf import LLQError, build, cli
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.harnesses import check_tasks, harness_of


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((40, 30)).save(file)
    return file


def show(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["show", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_answers_side_by_side(
    tiny_llava: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense and a packed model, in the terminal and on a page that needs no other file."""
    monkeypatch.setenv("COLUMNS", "200")
    packed, page = tmp_path / "packed", tmp_path / "page.html"
    quantize_checkpoint(str(tiny_llava), packed, build("rtn", bits=2), Calibration())
    questions = ["How many <circles> are there?", "Which colour?"]
    arguments = [f"--question={text}" for text in questions]
    said = show(
        tiny_llava,
        packed,
        "--image",
        picture,
        *arguments,
        "--html",
        page,
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
    )
    assert "full precision (float32)" in said
    assert "rtn, 2 bits (2." in said
    assert all(said.count(text) == 1 for text in questions)
    html = page.read_text()
    assert html.count('class="answer"') == 4
    assert "How many &lt;circles&gt; are there?" in html
    assert re.findall(r"(?:src|href|url)\W{1,2}(\w+)", html) == ["data"]
    (encoded,) = re.findall(r"base64,([^\"]+)", html)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (40, 30)


def test_what_cannot_be_shown(
    tiny_llama: Path, tiny_llava: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes()[:60])
    asked = ["--question", "What?", "--device", "cpu"]
    with pytest.raises(LLQError, match="takes no images"):
        show(tiny_llama, "--image", picture, *asked)
    for file in ("damaged.png", "absent.png"):
        with pytest.raises(LLQError, match=f"{file} is no picture"):
            show(tiny_llava, "--image", tmp_path / file, *asked)
    with pytest.raises(LLQError, match="question 1: its prompt has"):
        show(tiny_llava, "--image", picture, *asked, "--max-new-tokens", 4000)


def test_eval_takes_the_harness_that_has_the_tasks() -> None:
    pytest.importorskip("lmms_eval")
    assert harness_of("llq_demo") == "lm_eval"
    assert harness_of("llq_demo,hellaswag") == "lm_eval"
    assert harness_of("no_such_task") == "lm_eval"  # which says so
    assert harness_of("llq_mllm") == "lmms_eval"
    assert harness_of("mme,chartqa") == "lmms_eval"
    with pytest.raises(LLQError, match="mme belong to lmms-eval, llq_demo do not"):
        harness_of("mme,llq_demo")


def test_tasks_are_known_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in YAML files, and those that lm-eval alone knows: here from a list of tags."""
    pytest.importorskip("lmms_eval")
    check_tasks(["llq_demo", "hellaswag", "mme", "AraDiCE_ArabicMMLU_stem_egy"])
    with pytest.raises(LLQError, match=r"neither.* 'helaswag' .did you mean 'hellaswag'"):
        check_tasks(["llq_demo", "helaswag"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else find(name)
    )
    with pytest.raises(LLQError, match="llq_mllm needs lmms-eval, which is not installed"):
        check_tasks(["llq_mllm"])
