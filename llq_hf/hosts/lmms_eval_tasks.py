"""`llq_demo_vqa` for lmms-eval: questions about the bundled drawings, made in memory, so that
nothing is downloaded.

The YAML files in `tasks/lmms_eval/llq_demo_vqa` name the class here. There are two tasks, as MME
has two halves: perception and cognition. Three questions are asked about each fact: two in MME's
form, of which one is to be answered yes and one no, and one in MMBench's form, whose answer is a
letter from A to D. `accuracy` is over all questions, `yes_no` and `choice` over one form each, in
which chance gets 50 % and 25 %. The demo VLM names what it found before it decides ("blue no",
"blue C"), so the last yes or no, or the last letter, of an answer counts.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.task import ConfigurableTask

from ..demo import drawings

COLUMNS = ("category", "question", "answer")


class DrawingQuestions(ConfigurableTask):  # type: ignore[misc]  # lmms_eval has no types
    """A task of questions about drawings.

    The YAML says `dataset_kwargs: {categories: [...], facts_each: N}`: N facts of every category.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # ConfigurableTask does not know the key that chose this class
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Make the questions; `ConfigurableTask.__init__` calls this."""
        import datasets

        assert dataset_kwargs is not None
        rows = [
            {
                "question_id": index,
                "image": image,
                **{name: getattr(item, name) for name in COLUMNS},
            }
            for index, (picture, items) in enumerate(drawings.benchmark(**dataset_kwargs))
            for image in [drawings.draw(picture)]
            for item in items
        ]
        columns = {name: datasets.Value("string") for name in COLUMNS}
        features = {"question_id": datasets.Value("int64"), "image": datasets.Image(), **columns}
        docs = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        self.dataset = datasets.DatasetDict(test=docs)
        self.dataset_no_image = datasets.DatasetDict(test=docs.remove_columns("image"))


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer, else 0, in the metrics that count this question."""
    hit = float(drawings.is_right(doc["answer"], results[0]))
    return {"accuracy": hit, "yes_no" if doc["answer"] in ("yes", "no") else "choice": hit}
