"""The plans of measured tables: each cell builds, is unique, and asks for tasks that exist."""

import re
from pathlib import Path

import pytest

from llq_hf.common.resources import tasks_folder
from llq_hf.methods import build
from llq_hf.study.cell import recipe_of
from llq_hf.study.divergence import DivergenceOptions
from llq_hf.study.plan import DENSE, Cell, expand, load_plan
from llq_hf.study.record import DONE, Record, write_record
from llq_hf.study.report import write_report

PLANS = sorted((Path(__file__).parent / "plans").glob("*.yaml"))


def cells_of(plan: Path) -> list[Cell]:
    return expand([load_plan(plan)])


def known_tasks() -> set[str]:
    """Tasks and groups that this repository declares."""
    files = [
        file
        for harness in ("lm_eval", "lmms_eval")
        for file in tasks_folder(harness).rglob("*.yaml")
    ]
    return {
        name
        for file in files
        for name in re.findall(r"^(?:task|group): *(\S+)$", file.read_text(), re.M)
    }


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_every_cell_makes_sense(plan: Path) -> None:
    cells = cells_of(plan)
    assert len({cell.title for cell in cells}) == len(cells)
    assert {task for cell in cells for task in cell.tasks} <= known_tasks()
    for cell in cells:
        if cell.method != DENSE:
            build(cell.method, cell.preset, **cell.options)
        if cell.finetune:
            recipe_of(cell)
        if cell.divergence:
            DivergenceOptions(**cell.divergence)


def test_there_is_a_plan_for_each_table() -> None:
    names = {path.stem for path in PLANS}
    assert names == {
        "demo",
        "demo_vlm",
        "finetune",
        "hybrid",
        "pareto",
        "smollm2",
        "vlm_calibration",
    }


def test_the_fine_tuning_of_the_plan_is_what_runs_on_the_demo_model() -> None:
    """The plan names the demo model's own data, so the stand-in's recipe does not go over it."""
    (plan,) = (path for path in PLANS if path.stem == "finetune")
    tuned = [cell for cell in cells_of(plan) if cell.finetune]
    assert len(tuned) == 8
    for cell in tuned:
        data, recipe = recipe_of(cell)
        assert data == "demo"
        assert (recipe.max_steps, recipe.alpha, recipe.heldout) == (120, 32, 400)
        assert recipe.connections == ("IR-QLoRA" in cell.title)


def test_the_table_of_a_plan(tmp_path: Path) -> None:
    """Markdown with the plan's labels, bits, figures and seconds."""
    (plan,) = (path for path in PLANS if path.stem == "demo")
    cell = next(cell for cell in cells_of(plan) if cell.title == "GPTQ, 2 bits (best)")
    record = Record.of(
        cell,
        DONE,
        quantized={"nominal_bits": 2, "stored_bits": 2.1408, "method": cell.method},
        results={"llq_demo_ppl": {"token_perplexity": 1.8449}, "llq_demo_mc": {"acc": 0.97}},
        cost={"quantize": {"seconds": 33.7}},
    )
    write_record(tmp_path, record)
    (path,) = write_report(tmp_path, tmp_path, ["md"])
    lines = path.read_text().splitlines()
    columns = ["cell", "nominal bits", "stored bits", "whole model", "demo ppl", "demo acc"]
    head = f"| {' | '.join([*columns, 'seconds', 'record'])} |"
    row = "| GPTQ, 2 bits (best) | 2 | 2.141 |  | 1.845 | 97.0 | 33.7 |"
    assert lines[lines.index(head) + 2].startswith(row)
