"""Lint, types, and the rules of the design that a script can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # imports go one way: a module may import modules of its own row and of rows above it
    {"errors", "bits", "cache", "demo", "harness", "_startup"},
    {"kernels"},
    {"grids", "stats", "rotations", "feedback", "refine", "activations", "arch"},
    {"residual"},
    {"method"},
    {"training", "allocation"},
    {"methods"},
    {"graph", "linear", "attention", "checkpoint", "data", "journal", "distributed", "loading", "pairs"},
    {"walk", "packed"},
    {"quantize"},
    {"preflight"},
    {"run"},
    {"hf", "progress", "inspection", "lm_tasks", "lmms_tasks"},
    {"adapters"},
    {"card"},
    {"hub", "export"},
    {"scoring", "seeing"},
    {"modeling", "lm_eval", "lmms_eval", "bench"},
    {"study"},
    {"cli"},
]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=["ruff-check", "ruff-format", "mypy-strict"],
)
def test_linters_are_content(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def imports_of(path: Path) -> set[str]:
    """First components, inside llq_hf, of what a file imports at its top level."""
    found: set[str] = set()
    package = path.parent.relative_to(ROOT / "llq_hf").parts
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        name = node.module or ""
        if node.level:
            full = [*package[: len(package) - node.level + 1], *filter(None, name.split("."))]
        elif name.split(".")[0] == "llq_hf":
            full = name.split(".")[1:]
        else:
            continue
        found |= {full[0]} if full else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    rank = {module: i for i, row in enumerate(LAYERS) for module in row}
    for path in sorted((ROOT / "llq_hf").rglob("*.py")):
        own = path.relative_to(ROOT / "llq_hf").parts[0].removesuffix(".py")
        if own.startswith("_"):
            continue
        assert own in rank, f"{own} is not in LAYERS"
        for other in imports_of(path):
            assert rank[other] <= rank[own], f"{path.name} imports {other}, a higher layer"


def test_methods_do_not_know_each_other_or_transformers() -> None:
    files = {path.stem: path for path in (ROOT / "llq_hf" / "methods").glob("*.py") if path.stem != "__init__"}
    for name, path in files.items():
        imported = {
            part
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for part in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
        forbidden = {"transformers", *files} - {name}
        assert not forbidden & imported, f"{name} imports {forbidden & imported}"


def test_nothing_outside_methods_names_a_method() -> None:
    names = {path.stem for path in (ROOT / "llq_hf" / "methods").glob("*.py")} - {"__init__"}
    for path in (ROOT / "llq_hf").rglob("*.py"):
        if path.parent.name == "methods":
            continue
        # File formats are called after the method that they were made for.
        formats = {file.stem for file in path.parent.glob("*.py")} if path.parent.name == "export" else set()
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & names - formats, f"{path} names {strings & names}"
