"""Results for the Hub's leaderboards: `.eval_results/TASK.yaml`, one file a task.

The Hub shows them on the model's page, and gathers them on the page of the benchmark. It takes only
datasets that are registered as benchmarks, by a task of theirs (hub-docs, "Evaluation Results"). So
only figures of `BENCHMARKS` are written, in per cent as others report them, and none of a part of a
benchmark (`--limit`). The card's model-index has every figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

FOLDER = ".eval_results"


class Benchmark(NamedTuple):
    """A benchmark of the Hub, and the figure of an lm-eval task that belongs there.

    dataset: Hub id. task: as the dataset's eval.yaml calls it. metrics: of lm-eval, the first that
    the results hold is taken.
    """

    dataset: str
    task: str
    metrics: tuple[str, ...]


_GSM8K = Benchmark(
    "openai/gsm8k",
    "gsm8k",
    ("exact_match,strict-match", "exact_match,flexible-extract", "exact_match,none"),
)
_GPQA = Benchmark(
    "Idavidrein/gpqa",
    "gpqa_diamond",
    ("exact_match,flexible-extract", "exact_match,strict-match", "acc_norm,none", "acc,none"),
)
BENCHMARKS = {
    "gsm8k": _GSM8K,
    "gsm8k_cot": _GSM8K,
    "gsm8k_cot_llama": _GSM8K,
    "gsm8k_cot_zeroshot": _GSM8K,
    "llq_gsm8k": _GSM8K,
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", ("exact_match,custom-extract",)),
    "gpqa_diamond_cot_n_shot": _GPQA,
    "gpqa_diamond_cot_zeroshot": _GPQA,
    "gpqa_diamond_n_shot": _GPQA,
    "gpqa_diamond_zeroshot": _GPQA,
}


def eval_results(
    contents: Iterable[tuple[str, dict[str, Any]]], repo: str, made: str
) -> dict[str, bytes]:
    """Name in the repository -> YAML, of all benchmarks in results files; the newest of each task.

    contents: (name in the repository, content) of results files of this checkpoint. made: what the
    model is, in words.
    """
    newest: dict[str, EvalResultEntry] = {}
    for name, content in contents:
        for task, benchmark in BENCHMARKS.items():
            entry = _entry(
                task, benchmark, content, f"https://huggingface.co/{repo}/blob/main/{name}", made
            )
            if entry is not None and (
                task not in newest or (newest[task].date or "") <= (entry.date or "")
            ):
                newest[task] = entry
    return {
        f"{FOLDER}/{task}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True
        ).encode()
        for task, entry in sorted(newest.items())
    }


def _entry(
    task: str, benchmark: Benchmark, content: dict[str, Any], url: str, made: str
) -> EvalResultEntry | None:
    """None where the file holds no whole figure of the task."""
    figures = content["results"].get(task, {})
    metric = next((each for each in benchmark.metrics if _is_number(figures.get(each))), None)
    if metric is None or not _is_whole(task, content):
        return None
    shots = content.get("n-shot", {}).get(task)
    notes = [made, f"lm-evaluation-harness {task}, {metric}"]
    notes += [f"{shots}-shot"] if shots is not None else []
    notes += ["chat template"] if content.get("chat_template") else []
    seconds: Any = content.get("date")
    return EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task,
        value=round(100 * figures[metric], 2),
        date=f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}" if _is_number(seconds) else None,
        source_url=url,
        source_name="results file of lm-evaluation-harness",
        notes="; ".join(notes),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(task: str, content: dict[str, Any]) -> bool:
    """Whether every document of the task, and of the tasks of a group, was scored."""
    counts = content.get("n-samples", {})
    parts = content.get("group_subtasks", {}).get(task) or [task]
    return all(
        part in counts and counts[part].get("effective") == counts[part].get("original")
        for part in parts
    )
