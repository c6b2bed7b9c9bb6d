"""`.eval_results/*.yaml`: what the Hub's own parser reads there is what lm-eval measured."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from llq_hf.publish.benchmarks import BENCHMARKS, eval_results

MADE = "gptq, 4.156 stored bits a weight"


def results(task: str, figures: dict[str, Any], scored: int = 1319, **more: Any) -> dict[str, Any]:
    return {
        "results": {task: {"alias": task, **figures}},
        "n-shot": {task: 5},
        "n-samples": {task: {"original": 1319, "effective": scored}},
        "date": datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp(),
        **more,
    }


GSM8K = {"exact_match,strict-match": 0.71234, "exact_match,flexible-extract": 0.75}


def test_the_hub_reads_what_was_measured() -> None:
    content = results("gsm8k", GSM8K, chat_template="{{ messages }}")
    files = eval_results([("results/results_1.json", content)], "me/model", MADE)
    assert list(files) == [".eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 71.23)
    assert entry.date == "2026-11-27"
    assert entry.source_url == ("https://huggingface.co/me/model/blob/main/results/results_1.json")
    assert entry.notes == (
        f"{MADE}; lm-evaluation-harness gsm8k, exact_match,strict-match; 5-shot; chat template"
    )


def test_the_file_holds_only_keys_that_the_hub_documents() -> None:
    content = results("gsm8k", GSM8K)
    ((_, text),) = eval_results([("results/a.json", content)], "me/model", MADE).items()
    (entry,) = yaml.safe_load(text)
    assert set(entry) == {"dataset", "value", "date", "source", "notes"}
    assert set(entry["dataset"]) == {"id", "task_id"}
    assert set(entry["source"]) == {"url", "name"}


@pytest.mark.parametrize(
    "content",
    [
        results("gsm8k", GSM8K, scored=20),  # --limit 20
        results("gsm8k", {"exact_match,of-another-kind": 0.5}),
        results("gsm8k", {"exact_match,strict-match": "N/A"}),
        results("llq_wikitext2", {"token_perplexity,none": 8.5}),  # no benchmark of the Hub
        {**results("gsm8k", GSM8K), "n-samples": {}},
    ],
    ids=["a part", "another figure", "no figure", "another task", "no count"],
)
def test_what_is_not_written(content: dict[str, Any]) -> None:
    assert eval_results([("results/a.json", content)], "me/model", MADE) == {}


def test_a_group_counts_where_all_of_its_tasks_are_whole() -> None:
    parts = {"mmlu_pro_law": 1101, "mmlu_pro_math": 1351}
    content = results("mmlu_pro", {"exact_match,custom-extract": 0.345})
    content["group_subtasks"] = {"mmlu_pro": list(parts)}
    content["n-samples"] = {k: {"original": n, "effective": n} for k, n in parts.items()}
    files = eval_results([("results/a.json", content)], "me/model", MADE)
    assert yaml.safe_load(files[".eval_results/mmlu_pro.yaml"])[0]["value"] == 34.5
    content["n-samples"]["mmlu_pro_law"]["effective"] = 10
    assert not eval_results([("results/a.json", content)], "me/model", MADE)


def test_of_two_files_the_newer_counts() -> None:
    old = results("gsm8k", {"exact_match,strict-match": 0.1}, date=1.0)
    new = results("gsm8k", {"exact_match,strict-match": 0.2}, date=2e9)
    for order in ([old, new], [new, old]):
        named = [(f"results/{i}.json", content) for i, content in enumerate(order)]
        ((_, text),) = eval_results(named, "me/model", MADE).items()
        assert yaml.safe_load(text)[0]["value"] == 20


def test_lm_eval_has_every_task_of_the_table() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=str(Path(__file__).parents[2] / "tasks")).all_tasks)
    assert set(BENCHMARKS) <= known
