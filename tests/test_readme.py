"""Every block of every README runs; those that need the Hub or a user's files must parse.

A README stands alone: its blocks run in order, in a folder of their own.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("llq_hf", "tasks", "tests", "model_cards")
READMES = [ROOT / "README.md", *sorted(p for f in FOLDERS for p in (ROOT / f).rglob("README.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in READMES]
SCRATCH = "/tmp/llq-readme"  # the folder that READMEs write to
TESTS = "python3 -m uv run --extra dev pytest"  # this very run
# What comes before uv on a bare machine.
INSTALL = "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install uv && python3 -m "
LONGEST = 180  # lines of the page at the top


def blocks_of(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every bash and python block."""
    pattern = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in pattern.findall(path.read_text())]


def is_run(text: str) -> bool:
    return not text.startswith("# needs") and TESTS not in text


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_blocks(path: Path, tmp_path: Path) -> None:
    """One test per README, as its blocks build upon each other.

    They run in one process, as if each had one of its own: what takes the time is importing torch
    and the harnesses. A folder of the test stands in for SCRATCH, since two runs on one machine
    must not meet there.
    """
    scratch, elsewhere = tmp_path / "readme", tmp_path / "elsewhere"
    elsewhere.mkdir()
    todo: list[tuple[str, Any]] = []
    for language, text in blocks_of(path):
        todo += runnable(language, text.replace(SCRATCH, str(scratch)))
    if not todo:
        return
    (tmp_path / "todo.json").write_text(json.dumps(todo))
    environment = {**os.environ, "LLQ_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(tmp_path / "todo.json")]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def runnable(language: str, text: str) -> list[tuple[str, Any]]:
    """What is to be run of a block; the rest is parsed."""
    if language == "python":
        ast.parse(text)
        return [("python", text)] if is_run(text) else []
    commands: list[tuple[str, Any]] = []
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        words = shlex.split(line.removeprefix(INSTALL), comments=True)
        if is_run(text) and words:
            assert words[:2] == ["uv", "run"], "commands install what they need by themselves"
            commands.append(("bash", without_extras(words[2:])))
        elif words and "lm_eval" in words and "--model_args" in words:
            check_model_args(words[words.index("--model_args") + 1])
    return commands


def run(todo: list[tuple[str, Any]]) -> None:
    """Run blocks in this process, and say which one is at work."""
    for number, (kind, what) in enumerate(todo):
        print(f"--- {number}: {what}", flush=True)
        if kind == "python":
            exec(compile(what, f"block {number}", "exec"), {"__name__": "block"})
            continue
        sys.argv = list(what)
        try:
            entry(what[0])()
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise


def entry(program: str) -> Callable[[], Any]:
    """What the console script of this name calls."""
    (script,) = entry_points(group="console_scripts", name=program)
    called: Callable[[], Any] = script.load()
    return called


def without_extras(words: list[str]) -> list[str]:
    """The command behind `uv run --extra NAME`: the tests' own environment has all extras."""
    while words[0] == "--extra":
        words = words[2:]
    return [str(ROOT / word) if word.startswith("tests/") else word for word in words]


def check_model_args(text: str) -> None:
    """The model_args of a command that cannot run here are options we know."""
    from llq_hf.hosts.model_args import ModelArgs
    from llq_hf.methods import build

    pairs = (pair.split("=", 1) for pair in text.split(","))
    asked, _ = ModelArgs.split({key: typed(value) for key, value in pairs}, "model", set())
    if asked.method not in (None, "none"):
        build(asked.method, asked.preset, **asked.method_options)


def typed(value: str) -> object:
    """As lm-eval reads the values of model_args."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


# --- the page at the top ----------------------------------------------------------------------


def page() -> str:
    return (ROOT / "README.md").read_text()


def test_the_two_commands_come_first() -> None:
    commands = [text.strip() for language, text in blocks_of(ROOT / "README.md")]
    assert commands[0].startswith(
        INSTALL + "uv run lm_eval --model llq --model_args pretrained=demo"
    )
    assert commands[1] == TESTS


def test_ci_runs_the_test_command_of_readme() -> None:
    assert TESTS in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_page_is_short_and_has_a_picture() -> None:
    assert len(page().splitlines()) <= LONGEST
    first_screen = "\n".join(page().splitlines()[:40])
    picture = re.search(r"!\[[^\]]+\]\(([^)]+\.svg)\)", first_screen)
    assert picture
    assert (ROOT / picture[1]).is_file()


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path} links to {target}"


def test_folders_of_the_package_are_explained() -> None:
    explained = {path.parent.name for path in READMES}
    wanted = {"methods", "kernels", "engine", "checkpoints", "hosts", "study", "finetune", "export"}
    assert wanted | {"publish", "data", "tests", "bench", "tasks"} <= explained


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
