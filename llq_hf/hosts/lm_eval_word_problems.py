"""How `llq_gsm8k` scores an answer.

The model is asked to reason and to end with "The answer is N"; no example is shown, because a chat
model knows how to answer. N is the last number that follows such words, or else the last number of
all. `empty` is the share of answers without a visible character: a model that falls silent scores
as one that is wrong, and the two have different causes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
NAMED = re.compile(rf"answer is[^\d\n-]*({NUMBER})", re.IGNORECASE)


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
