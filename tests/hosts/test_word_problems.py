"""`llq_gsm8k`: what counts as an answer, from a local file to the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from llq_hf.common.errors import LLQError
from llq_hf.hosts.lm_eval_word_problems import number_of, score

YAMLS = Path(__file__).resolve().parents[2] / "tasks" / "lm_eval"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("First 3 + 4 = 7.\nThe answer is 7\n\nAnd 9 more words", 7),
        ("the answer is: **$1,234.50**", 1234.5),
        ("The answer is 5. No: the answer is -6.", -6),
        ("So there are 8 apples and 10 pears.", 10),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_gives(text: str, number: float | None) -> None:
    assert number_of(text) == number


def test_a_silent_model_is_wrong_and_counted() -> None:
    doc = {"question": "?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    assert score(doc, ["The answer is 5.0"]) == {"exact_match": 1, "empty": 0}
    assert score(doc, ["The answer is 4"]) == {"exact_match": 0, "empty": 0}
    assert score(doc, [" \n"]) == {"exact_match": 0, "empty": 1}


class Parrot(LM):
    """Says what it is told to."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers = answers
        self.asked: list[Any] = []

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        self.asked = [request.args for request in requests]
        return self.answers

    def loglikelihood(self, requests: Any, **_: Any) -> Any: ...

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any: ...


def evaluate(lm: LM, folder: Path) -> dict[str, Any]:
    tasks = TaskManager(
        include_path=str(YAMLS), include_defaults=False, metadata={"folder": str(folder)}
    )
    given = {"model": lm, "tasks": ["llq_gsm8k"], "task_manager": tasks, "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(**given)


def test_from_a_file_to_the_results(tmp_path: Path) -> None:
    problems = [
        {"question": f"What is {n} + {n}?", "answer": f"It is double.\n#### {2 * n}"}
        for n in range(4)
    ]
    lines = "\n".join(map(json.dumps, problems))
    (tmp_path / "gsm8k_test.jsonl").write_text(lines)
    parrot = Parrot(["The answer is 0", "The answer is 2", "It is 5", ""])
    results = evaluate(parrot, tmp_path)["results"]["llq_gsm8k"]
    assert results["exact_match,none"] == 0.5
    assert results["empty,none"] == 0.25
    prompt, generation = parrot.asked[1]
    assert prompt.startswith("What is 1 + 1?\n\n")
    assert prompt.endswith("The answer is N, where N is a number.")
    assert generation["do_sample"] is False
    assert generation["until"] == []


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LLQError, match=r"no file .*gsm8k_test\.jsonl for the benchmark .gsm8k."):
        evaluate(Parrot([]), tmp_path)
