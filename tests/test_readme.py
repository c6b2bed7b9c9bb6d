"""Every block of README runs, in order; those that need the Hub or a user's files are checked for parsing."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
SCRATCH = "/tmp/llq-readme"  # the folder README writes to
SKIPPED = "uv run --extra dev pytest"  # this very run


def runnable(text: str) -> bool:
    return not text.startswith("# needs") and SKIPPED not in text


pytestmark = pytest.mark.xdist_group("readme")  # blocks build upon each other, in one folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stands in for SCRATCH: two runs of the tests on one machine must not meet there."""
    return str(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "LLQ_CACHE": cache, "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_block(language: str, text: str, environment: dict[str, str], scratch: str, tmp_path: Path) -> None:
    text = text.replace(SCRATCH, scratch)
    if language == "python":
        ast.parse(text)
        if runnable(text):
            command = [sys.executable, "-c", text]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
        return
    for line in filter(None, text.splitlines()):
        words = shlex.split(line, comments=True)
        if runnable(text) and words:
            assert words[:2] == ["uv", "run"], "README's commands install what they need by themselves"
            subprocess.run(words[2:], cwd=tmp_path, env=environment, check=True, timeout=900)
        elif words and words[0] == "lm_eval":
            check_lm_eval(words[1:])


def check_lm_eval(words: list[str]) -> None:
    """The model_args of a command that cannot run here are options we know."""
    from llq_hf.methods import build

    args = words[words.index("--model_args") + 1]
    options = dict(pair.split("=", 1) for pair in args.split(","))
    options.pop("pretrained", None)
    if name := options.pop("method", None):
        build(name, **{key: int(value) for key, value in options.items()})


def test_the_two_commands_come_first() -> None:
    commands = [text.strip() for language, text in BLOCKS if language == "bash"]
    assert commands[0].startswith("uv run lm_eval --model llq --model_args pretrained=demo")
    assert commands[1] == SKIPPED


def test_ci_runs_the_test_command_of_readme() -> None:
    assert SKIPPED in (ROOT / ".ci" / "run").read_text().splitlines()
