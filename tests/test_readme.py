"""Every block of README runs, in order; those that need the Hub or a user's files are checked for
parsing.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
SCRATCH = "/tmp/llq-readme"  # the folder README writes to
SKIPPED = "uv run --extra dev pytest"  # this very run


def runnable(text: str) -> bool:
    return not text.startswith("# needs") and SKIPPED not in text


def test_blocks(subtests: pytest.Subtests, tmp_path: Path) -> None:
    """One test, whatever runs tests side by side: blocks build upon each other, in one folder.

    That folder stands in for SCRATCH: two runs of the tests on one machine must not meet there.
    """
    scratch, elsewhere = tmp_path / "readme", tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "LLQ_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    for number, (language, text) in enumerate(BLOCKS):
        with subtests.test(block=number):
            run_block(language, text.replace(SCRATCH, str(scratch)), environment, elsewhere)


def run_block(language: str, text: str, environment: dict[str, str], folder: Path) -> None:
    if language == "python":
        ast.parse(text)
        if runnable(text):
            command = [sys.executable, "-c", text]
            subprocess.run(command, cwd=folder, env=environment, check=True, timeout=600)
        return
    for line in filter(None, text.splitlines()):
        words = shlex.split(line, comments=True)
        if runnable(text) and words:
            assert words[:2] == ["uv", "run"], (
                "README's commands install what they need by themselves"
            )
            subprocess.run(words[2:], cwd=folder, env=environment, check=True, timeout=900)
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
