"""`llq study` and `llq report` as typed: flags become cells, and what makes no sense is said before
anything runs.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from study import fakes
from typer.testing import CliRunner

from llq_hf import LLQError, cli
from llq_hf.study.paper import tables
from llq_hf.study.plan import Cell
from llq_hf.study.record import write_record


@pytest.fixture
def llq(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs `llq ... --out FOLDER`: the lines it printed."""

    def llq(*arguments: object) -> list[str]:
        words = [str(argument) for argument in arguments]
        result = CliRunner().invoke(
            cli.app, [*words, "--out", str(tmp_path / "runs")], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "runs").exists()
        return result.stdout.splitlines()

    return llq


def titles(lines: list[str]) -> list[str]:
    return [line.partition(" ")[2] for line in lines]


def test_flags_make_cells(llq: Callable[..., list[str]]) -> None:
    flags = ["--models", "demo", "--methods", "rtn,gptq", "--bits", "4,2", "--tasks", "llq_demo"]
    found = titles(
        llq("study", *flags, "--option", "group_size=64,128", "--presets", "best", "--dry-run")
    )
    assert found[0] == "full precision"
    assert len(found) == 1 + 2 * 2 * 2
    assert found[1] == "rtn bits=4 group_size=64 (best)"


def test_only_some_cells(llq: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = ["--models", "demo", "--methods", "rtn,gptq", "--bits", "4,2", "--tasks", "llq_demo"]
    found = titles(llq("study", *flags, "--only", "bits=2", "--dry-run"))
    assert found == ["rtn bits=2", "gptq bits=2"]
    with pytest.raises(LLQError, match="no cell has a title that contains 'bits=3'"):
        llq("study", *flags, "--only", "bits=3", "--dry-run")


def test_a_plan_file_with_a_flag_over_it(llq: Callable[..., list[str]], tmp_path: Path) -> None:
    plan = {"models": ["a/b"], "tasks": ["t"], "methods": [{"method": "billm"}], "baseline": False}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    (line,) = llq("study", tmp_path / "plan.yaml", "--models", "c/d", "--dry-run")
    assert line.startswith("d-billm-")


def test_presets_run_on_the_demo_model_each_cell_once(llq: Callable[..., list[str]]) -> None:
    one = llq("study", "--preset", "paper-table1", "--models", "demo", "--dry-run")
    assert len(one) == sum(row.cell is not None for row in tables()[1].rows)
    both = llq("study", "--preset", "paper-table1,paper-table3", "--models", "demo", "--dry-run")
    assert both == one  # on the demo model both tables ask the same questions
    real = llq("study", "--preset", "paper-table1,paper-table3", "--dry-run")
    assert len(real) > len(one)
    assert len(llq("study", "--preset", "paper", "--dry-run")) > len(real)


FLAGS = ["--models", "demo", "--tasks", "llq_demo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a list of models"),
        (["plan.yaml", "--preset", "paper-table1"], "not both"),
        (["--preset", "paper-table13"], "'paper-table1"),
        ([*FLAGS, "--bits", "4"], "belong to --methods"),
        ([*FLAGS, "--methods", "rtn", "--metadata", "{"], "not valid JSON"),
        (
            ["--models", "some/model", "--methods", "rtn", "--tasks", "llq_wikitext2,llq_wikitxt2"],
            "no.* task 'llq_wikitxt2' .did you mean 'llq_wikitext2', ",
        ),
        ([*FLAGS, "--methods", "rtn", "--engine", "slurm"], "engines are local, and ray"),
        ([*FLAGS, "--methods", "rtn", "--resources", "gpus=1"], "engines are local, and ray"),
        ([*FLAGS, "--methods", "rtn", "--engine", "ray", "--resources", "gpu=1"], "no 'gpu'"),
    ],
)
def test_refused_before_anything_runs(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(LLQError, match=message):
        CliRunner().invoke(
            cli.app, ["study", *arguments, "--out", str(tmp_path / "runs")], catch_exceptions=False
        )
    assert not list(tmp_path.glob("runs/records"))


def test_a_text_of_the_divergence_is_known_before_anything_runs(tmp_path: Path) -> None:
    plan = {
        "models": ["demo"],
        "tasks": ["llq_demo"],
        "methods": [{"method": "rtn"}],
        "divergence": {"text": "wikitext"},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(LLQError, match=r"no text 'wikitext' .did you mean 'wikitext2'"):
        CliRunner().invoke(
            cli.app,
            ["study", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "runs")],
            catch_exceptions=False,
        )


def test_report_prints_what_it_wrote(tmp_path: Path) -> None:
    cell = Cell(model="demo", method="rtn", tasks=("llq_demo",))
    write_record(tmp_path / "runs", fakes.invented(cell))
    arguments = [
        "report",
        str(tmp_path / "runs"),
        "--format",
        "md,csv",
        "--into",
        str(tmp_path / "here"),
    ]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.stdout.split() == [
        str(tmp_path / "here" / f"report.{name}") for name in ("md", "csv")
    ]
    assert cell.name in (tmp_path / "here" / "report.md").read_text()


def test_calibration_flags_go_over_the_plan(llq: Callable[..., list[str]], tmp_path: Path) -> None:
    plan = {
        "models": ["a/b"],
        "tasks": ["t"],
        "methods": [{"method": "gptq"}],
        "baseline": False,
        "calibration": {"samples": 24, "seqlen": 1024},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    flags = ["--calibration", "/texts/mine.json", "--calibration-samples", 8]
    (title,) = titles(llq("study", tmp_path / "plan.yaml", *flags, "--dry-run"))
    assert title == "gptq (calibration samples=8 seqlen=1024 mine.json)"
    with pytest.raises(LLQError, match="give that in place of --calibration-seed"):
        llq("study", tmp_path / "plan.yaml", "--calibration-seed", 1, "--dry-run")
