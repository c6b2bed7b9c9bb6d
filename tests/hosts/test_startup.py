"""The hook at interpreter start: every process has it, it costs next to nothing, and its errors
break nobody's imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = sorted(path.stem for path in (ROOT / "tasks" / "lm_eval").rglob("llq_*.yaml"))

IS_HOOKED = """if True:
    import sys
    finders = [getattr(finder, "__module__", "") for finder in sys.meta_path]
    print("llq_hf._startup" in finders)
"""


def python(
    code: str,
    *flags: str,
    executable: Path | str = sys.executable,
    cwd: Path = ROOT,
    **variables: str,
) -> str:
    """What a fresh interpreter prints."""
    return fresh(
        "-c", code, flags=flags, executable=executable, cwd=cwd, **variables
    ).stdout.strip()


def fresh(
    *arguments: str,
    flags: tuple[str, ...] = (),
    executable: Path | str = sys.executable,
    cwd: Path = ROOT,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key != "LLQ_DISABLE"
    } | variables
    command = [str(executable), *flags, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


needs_install = pytest.mark.skipif(
    python(IS_HOOKED, cwd=Path(__file__).parent) != "True",
    reason="llq-hf is not installed in this interpreter",
)


# --- this interpreter -----------------------------------------------------------------------------


@needs_install
def test_switching_it_off(tmp_path):
    assert python(IS_HOOKED, cwd=tmp_path) == "True"
    assert python(IS_HOOKED, cwd=tmp_path, LLQ_DISABLE="1") == "False"
    assert python(IS_HOOKED, cwd=tmp_path, LLQ_DISABLE="0") == "True"
    assert python(IS_HOOKED, cwd=tmp_path, LLQ_DISABLE="") == "True"


def test_nothing_is_imported_for_it():
    """Beyond what every interpreter has: our own two modules. Without site (-S) also `os` and what
    it needs.
    """
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        before = set(sys.modules)
        import llq_hf._startup
        print(*sorted(set(sys.modules) - before))
    """
    # []: the .pth did it
    assert python(code, LLQ_DISABLE="").split() in (
        [],
        ["llq_hf", "llq_hf._startup"],
    )
    assert python(code, "-I").split() in ([], ["llq_hf", "llq_hf._startup"])
    of_os = {
        "os",
        "os.path",
        "posixpath",
        "ntpath",
        "genericpath",
        "stat",
        "_stat",
        "abc",
        "_abc",
        "_collections_abc",
    }
    assert set(python(code, "-S").split()) - of_os == {"llq_hf", "llq_hf._startup"}


def test_the_package_itself_imports_nothing():
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import llq_hf, llq_hf.common.errors, llq_hf.demo
        heavy = ("torch", "transformers", "numpy", "lm_eval")
        print([name for name in heavy if name in sys.modules])
    """
    assert python(code) == "[]"


def test_a_hook_that_raises_only_warns():
    code = f"""if True:
        import sys, warnings
        sys.path.insert(0, {str(ROOT)!r})
        from llq_hf import _startup
        def broken(module):
            raise RuntimeError("a bug")
        _startup.HOOKS.update(colorsys=broken)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import colorsys
        print(colorsys.rgb_to_hsv(0, 0, 0), len(caught), caught[0].message)
    """
    said = python(code)
    assert said.startswith(
        "(0.0, 0.0, 0) 1 llq-hf could not hook into colorsys (RuntimeError: a bug)"
    )
    assert "LLQ_DISABLE=1" in said


def test_hooked_modules_are_what_they_were():
    """Loader, spec, reload and a second import are those of an interpreter without us; modules
    there already count.
    """
    code = f"""if True:
        import sys, importlib, colorsys
        sys.path.insert(0, {str(ROOT)!r})
        calls = []
        from llq_hf import _startup
        _startup.HOOKS.clear()
        _startup.HOOKS.update(colorsys=calls.append, wave=calls.append, nothing_here=calls.append)
        sys.meta_path.remove(_startup._Finder) if _startup._Finder in sys.meta_path else None
        _startup.install()
        _startup.install()
        assert sys.meta_path.count(_startup._Finder) == 1
        assert calls == [colorsys], calls
        import wave
        import wave
        assert calls == [colorsys, wave], calls
        assert type(wave.__loader__).__name__ == "SourceFileLoader"
        assert wave.__spec__.loader is wave.__loader__ and wave.__file__.endswith("wave.py")
        assert wave.__loader__.get_source("wave")
        importlib.reload(wave)
        assert calls == [colorsys, wave, wave], calls
        try:
            import nothing_here
        except ModuleNotFoundError as error:
            assert error.name == "nothing_here"
        print("fine")
    """
    assert python(code) == "fine"


def test_broken_plugin_does_not_break_transformers(tmp_path):
    code = f"""if True:
        import sys, warnings
        sys.path.insert(0, {str(ROOT)!r})
        import llq_hf._startup
        sys.modules["llq_hf.hosts.hf_quantizer"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table
        ours = [str(w.message) for w in caught if "llq-hf could not hook" in str(w.message)]
        print(len(ours), "gptq" in table, "llq_rtn" in table)
    """
    assert python(code, cwd=tmp_path) == "1 True False"


def test_module_on_the_command_line():
    said = fresh("-m", "llq_hf", "--help").stdout
    assert all(command in said for command in ("quantize", "info", "methods", "eval"))


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    elif shutil.which("uv"):
        command = ["uv", "build", "--wheel", "--out-dir", str(folder), str(ROOT)]
    else:
        pytest.skip("needs uv or hatchling")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0 and re.search(
        "network|connect|dns|offline|fetch", done.stderr, re.IGNORECASE
    ):
        pytest.skip("uv cannot fetch hatchling here")
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with the wheel in it; all else comes from this one's
    site-packages.

    A path in a .pth file is searched for modules, but its own .pth files are not run: no second
    copy of us.
    """
    if not shutil.which("uv"):
        pytest.skip("needs uv")
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--compile-bytecode",
        "--python",
        str(interpreter),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    own = Path(
        python(
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            executable=interpreter,
            cwd=folder,
        )
    )
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_contents_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"llq_hf_startup.pth", "llq_hf_startup.start"} <= names
    assert {
        f"llq_hf/demo/llama/{file}"
        for file in ("config.json", "model.safetensors", "tokenizer.json")
    } <= names
    assert "llq_hf/_model_cards/template.md" in names
    for file in (ROOT / "tasks").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert f"llq_hf/_tasks/{file.relative_to(ROOT / 'tasks').as_posix()}" in names
    assert not [
        name
        for name in names
        if "__pycache__" in name or name.startswith(("tests/", "bench/", "shared/"))
    ]
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "llq_hf",
        "llq_hf_startup.pth",
        "llq_hf_startup.start",
        "optimum",
    }
    assert [name for name in names if name.startswith("optimum/")] == [
        "optimum/commands/register/register_llq.py"
    ]


def test_both_start_up_files_say_the_same(wheel):
    with zipfile.ZipFile(wheel) as archive:
        pth, start = (archive.read(f"llq_hf_startup.{end}").decode() for end in ("pth", "start"))
    # One line: what site runs has to begin with "import"
    assert pth.strip() == "import llq_hf._startup"
    module, _, function = start.strip().partition(":")
    assert (module, function) == ("llq_hf._startup", "install")
    assert "\ndef install(" in (ROOT / "llq_hf" / "_startup.py").read_text()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing of ours, and no PYTHONPATH: only what is installed is found."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_the_wheel_hooks(installed, elsewhere):
    where = "import llq_hf; print(llq_hf.__file__)"
    assert Path(python(where, executable=installed, cwd=elsewhere)).is_relative_to(
        installed.parents[1]
    )
    assert python(IS_HOOKED, executable=installed, cwd=elsewhere) == "True"
    assert python(IS_HOOKED, executable=installed, cwd=elsewhere, LLQ_DISABLE="1") == "False"
    assert python(IS_HOOKED, "-S", executable=installed, cwd=elsewhere) == "False"


def test_hosts_know_us_with_no_flag(installed, elsewhere):
    """lm-eval's registry and task index, and transformers' table, in a folder where nothing of ours
    lies.
    """
    code = """if True:
        import json
        from lm_eval.api.registry import get_model
        from lm_eval.tasks import TaskManager
        model, other = get_model("llq"), get_model("hf")
        index = TaskManager()
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table
        print(json.dumps({
            "model": model.__module__ + "." + model.__name__, "other": other.__name__,
            "windows": hasattr(other, "llq_windows_nll"),
            "tasks": sorted(name for name in index.all_tasks if name.startswith("llq_")),
            "builtin": "hellaswag" in index.all_tasks,
            "configs": sorted(name for name in table if name.startswith("llq_")),
        }))
    """
    text = python(code, executable=installed, cwd=elsewhere, HF_HUB_OFFLINE="1").splitlines()[-1]
    found = json.loads(text)
    assert found["model"] == "llq_hf.hosts.lm_eval_model.LLQLM"
    assert found["other"] == "HFLM"
    assert found["windows"]
    assert found["builtin"]
    assert set(TASKS) <= set(found["tasks"])
    assert {"llq_rtn", "llq_gptq", "llq_quip"} <= set(found["configs"])
