"""GSM8K for chat models in lm-evaluation-harness, from the Hub or from a local file.

The model is asked to reason and to end with "The answer is N"; no example is shown, because a chat
model knows how to answer. N is the last number that follows such words, or else the last number of
all. `empty` is the share of answers without a visible character: a model that falls silent scores
as one that is wrong, and the two have different causes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from ..common.errors import LLQError
from ..data.readers import read_records
from ..data.sources import hub_rows
from .lm_eval_perplexity import without_class

FILES = ("gsm8k_test.jsonl", "gsm8k/test.jsonl")  # in the folder of --metadata
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
NAMED = re.compile(rf"answer is[^\d\n-]*({NUMBER})", re.IGNORECASE)


class WordProblems(ConfigurableTask):  # type: ignore[misc]
    """The test split of GSM8K. The user's metadata may say `folder`, where one of `FILES` lies."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=without_class(config))

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Load the problems; `ConfigurableTask.__init__` calls this."""
        import datasets

        folder = self.config.metadata.get("folder")
        if folder is None:
            cure = (
                f'pass --metadata \'{{"folder": "FOLDER"}}\' with a folder that holds {FILES[0]}.'
            )
            rows = hub_rows(self.DATASET_PATH, self.DATASET_NAME, split="test", offline_cure=cure)
        else:
            rows = read_records(_file_in(Path(folder)))
        self.config.metadata["data_source"] = str(folder or "hub")
        docs = [{"question": str(row["question"]), "answer": str(row["answer"])} for row in rows]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(docs)})

    def build_all_requests(self, **kwargs: Any) -> None:
        # the cache of --cache_requests goes by the task's name, and would mix up two folders
        if self.config.metadata["data_source"] != "hub":
            kwargs["cache_requests"] = False
        super().build_all_requests(**kwargs)


def _file_in(folder: Path) -> Path:
    """LLQError where the folder has no file of problems."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise LLQError(f"{folder} holds no {' or '.join(FILES)}, with the fields question, answer")
    return found


def score(doc: Mapping[str, str], results: list[str]) -> dict[str, float]:
    """`process_results` of the task."""
    answer = results[0]
    right = number_of(doc["answer"].rpartition("####")[2])
    return {
        "exact_match": float(right is not None and number_of(answer) == right),
        "empty": float(not answer.strip()),
    }


def number_of(text: str) -> float | None:
    """The number that a text gives as its answer; None where it gives none."""
    found = NAMED.findall(text) or re.findall(NUMBER, text)
    return float(re.sub(r"[$,]", "", found[-1])) if found else None
