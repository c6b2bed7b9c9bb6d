"""Lint, types, and the rules of the house that a script can check."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llq_hf"
TOP = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "README.md",
    "llq_hf",
    "model_cards",
    "pyproject.toml",
    "tasks",
    "tests",
}

# Bottom to top. A file imports its own folder and folders of lower rows; folders of one row do not
# import each other.
ROWS = [
    {"common"},
    {"demo", "kernels"},
    {"numerics"},
    {"models"},
    {"method"},
    {"methods", "layers", "data"},
    {"checkpoints"},
    {"engine", "export", "publish"},
    {"hosts"},
    {"finetune"},
    {"study"},
    {"cli"},
    {"install"},
]
DOORS = {
    "__init__",
    "__main__",
    "_startup",
}  # the ways in: their paths are public, and they may import anything
SCRIPTS = {
    "demo/train_vlm.py"
}  # nobody imports it; it tries the model that it made by means of higher rows
HELPERS = {"__init__", "options", "training", "uniform"}  # files in methods/ that are no method
IMPORT_NAMES = {"pyyaml": "yaml"}  # where a distribution is not imported by its own name


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
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- imports go one way ---------------------------------------------------------------------------


def imports_of(source: str, package: tuple[str, ...]) -> set[str]:
    """First components, inside llq_hf, of what a file in the folder `package` imports, functions
    included.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in dotted if parts[0] == "llq_hf" and len(parts) > 1}
        elif isinstance(node, ast.ImportFrom):
            name = [part for part in (node.module or "").split(".") if part]
            if node.level:
                full = [*package[: len(package) - node.level + 1], *name]
            elif name[0] == "llq_hf":
                full = name[1:]
            else:
                continue
            found |= {full[0]} if full else {alias.name for alias in node.names}
    return found


def wrong_imports(path: str, source: str) -> list[str]:
    """What the file at `path` (inside llq_hf) must not import."""
    parts = Path(path).with_suffix("").parts
    if parts[0] in DOORS or path in SCRIPTS:
        return []
    rank = {folder: row for row, folders in enumerate(ROWS) for folder in folders}
    own = parts[0]
    assert own in rank, f"{own} is in no row"
    found = imports_of(source, parts[:-1]) - {own}
    return [
        f"{path} imports {other}"
        for other in sorted(found)
        if rank.get(other, len(ROWS)) >= rank[own]
    ]


def files() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text()


def test_imports_go_one_way() -> None:
    assert [sentence for path, source in files() for sentence in wrong_imports(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/native.py", "from ..numerics.grids import Uniform"),
        ("kernels/native.py", "def f():\n    from ..demo import MODELS"),  # of its own row
        ("engine/walk.py", "def f():\n    import llq_hf.hosts.hf_quantizer"),
        ("methods/slim_llm/plus.py", "from ...checkpoints.packed import PackedFolder"),
        ("method.py", "from .methods import build"),
        ("common/files.py", "from llq_hf import method"),
        ("common/files.py", "from llq_hf._startup import install"),
    ],
)
def test_an_import_that_runs_up_is_found(path: str, source: str) -> None:
    assert wrong_imports(path, source)


# --- names and places -----------------------------------------------------------------------------


def dependencies() -> set[str]:
    """Import names of everything that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    names = {re.split(r"[<>=\[; ]", text)[0].lower() for text in asked} - {"llq-hf"}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def borrowed(path: str) -> set[str]:
    """Components of a module's path that are names of a dependency or of the standard library."""
    return set(Path(path).with_suffix("").parts) & (
        dependencies() | sys.stdlib_module_names - {"__main__"}
    )


def test_no_module_borrows_a_name() -> None:
    assert {path: borrowed(path) for path, _ in files() if borrowed(path)} == {}


@pytest.mark.parametrize(
    "path", ["hosts/lm_eval.py", "cli/inspect.py", "export/compressed_tensors.py", "yaml/x.py"]
)
def test_a_borrowed_name_is_found(path: str) -> None:
    assert borrowed(path)


def strangers(names: list[str]) -> set[str]:
    """First components of tracked files that the top level should not hold."""
    return {name.split("/")[0] for name in names} - TOP


def test_the_top_level_is_as_agreed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: there is no list of tracked files")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert strangers(listed.splitlines()) == set()
    assert {name.split("/")[0] for name in listed.splitlines()} == TOP
    assert strangers(["bench/speed.py", "llq_hf/method.py"]) == {"bench"}


def test_few_modules_lie_flat() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 5


# --- methods --------------------------------------------------------------------------------------


def method_names() -> set[str]:
    return {
        path.stem
        for path in (PACKAGE / "methods").iterdir()
        if path.suffix == ".py" or path.is_dir()
    } - {
        *HELPERS,
        "__pycache__",
    }


def test_methods_do_not_know_each_other_or_transformers() -> None:
    for path, source in files():
        if not path.startswith("methods/") or path == "methods/__init__.py":
            continue
        own = Path(path).parts[1].removesuffix(".py")
        imported = {
            part
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            for part in name.split(".")
        }
        forbidden = ({"transformers"} | method_names()) - {own}
        assert not forbidden & imported, f"{path} imports {forbidden & imported}"


def test_nothing_outside_methods_names_a_method() -> None:
    for path, source in files():
        if path.startswith("methods/"):
            continue
        # File formats are called after the method that they were made for.
        formats = (
            {file.stem for file in (PACKAGE / "export").glob("*.py")}
            if path.startswith("export/")
            else set()
        )
        strings = {
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & method_names() - formats, f"{path} names {strings & method_names()}"
