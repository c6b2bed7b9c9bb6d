"""Questions for lm-evaluation-harness, from the Hub or from local files.

Multiple-choice tasks have the prompts, answers and scores of lm-eval's built-in ones. Rows of all
formats are converted to one shape: `{query, choices, gold}`, for WinoGrande `{context_options,
continuation, gold}`, for MMLU `{question, choices, answer, subject}`, for GSM8K `{question,
answer}`.

`--metadata '{"folder": "..."}'` reaches every task as `config.metadata`, together with the task's
own metadata and with all model_args. Other keys are ignored.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from ..common.errors import LLQError
from ..data.readers import read_records
from ..data.sources import hub_rows
from .lm_eval_perplexity import without_class

Doc = dict[str, Any]


class Questions(ConfigurableTask):  # type: ignore[misc]
    """A benchmark of `BENCHMARKS`; see the head of the file.

    The YAML says `dataset_kwargs: {benchmark: NAME}`, and `dataset_path`, `dataset_name` for the
    Hub. The user's metadata may say `folder`, where the files of all benchmarks lie. The questions
    of `demo` are made, not read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=without_class(config))

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Load the questions; `ConfigurableTask.__init__` calls this."""
        import datasets

        name = (dataset_kwargs or {})["benchmark"]
        folder = self.config.metadata.get("folder")
        if name == "demo":
            splits = {"test": _demo_questions()}
        elif folder is not None:
            splits = {
                split: _local_docs(name, _folder(folder), split, self.DATASET_NAME)
                for split in self._splits()
            }
        else:
            splits = {split: self._hub_docs(name, split) for split in self._splits()}
        source = str(folder) if folder else "hub"
        self.config.metadata["data_source"] = name if name == "demo" else source
        self.dataset = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(docs) for split, docs in splits.items()}
        )

    def build_all_requests(self, **kwargs: Any) -> None:
        # the cache of --cache_requests goes by the task's name, and would mix up two folders
        if self.config.metadata["data_source"] != "hub":
            kwargs["cache_requests"] = False
        super().build_all_requests(**kwargs)

    def _splits(self) -> list[str]:
        config = self.config
        return [
            split
            for split in (config.validation_split, config.test_split, config.fewshot_split)
            if split
        ]

    def _hub_docs(self, name: str, split: str) -> list[Doc]:
        files = " or ".join(_local_names(name, split, self.DATASET_NAME))
        cure = f'pass --metadata \'{{"folder": "FOLDER"}}\' with a folder that holds {files}.'
        rows = hub_rows(self.DATASET_PATH, self.DATASET_NAME, split=split, offline_cure=cure)
        return _converted(rows, name, self.DATASET_NAME, f"{self.DATASET_PATH} on the Hub")


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies in a local folder, and what its rows may look like."""

    files: tuple[str, ...]  # the first one that is there; `{split}` and `{subject}` are filled in
    # (fields of a row, conversion to the common shape): the first whose fields the row has
    shapes: tuple[tuple[tuple[str, ...], Callable[[Doc], Doc]], ...]


def _piqa(row: Doc) -> Doc:
    return {
        "query": f"Question: {row['goal']}\nAnswer:",
        "choices": [row["sol1"], row["sol2"]],
        "gold": int(row["label"]),
    }


def _arc(row: Doc) -> Doc:
    choices = row["choices"]
    return {
        "query": f"Question: {row['question']}\nAnswer:",
        "choices": list(choices["text"]),
        "gold": list(choices["label"]).index(row["answerKey"]),
    }


def _asked(row: Doc) -> Doc:
    """A row whose query may hold `Question: ` and `Answer:` already."""
    query = row["query"] if row["query"].startswith("Question: ") else f"Question: {row['query']}"
    query = query if query.endswith("\nAnswer:") else f"{query}\nAnswer:"
    return {"query": query, "choices": list(row["choices"]), "gold": int(row["gold"])}


def _hellaswag(row: Doc) -> Doc:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _hellaswag_joined({**row, "ctx": f"{row['activity_label']}: {context}"})


def _hellaswag_joined(row: Doc) -> Doc:
    return {
        "query": _without_wikihow_marks(row["ctx"]),
        "choices": [_without_wikihow_marks(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_wikihow_marks(text: str) -> str:
    """Drop marks such as `[title]`, left from the WikiHow pages, as lm-eval's task does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(row: Doc) -> Doc:
    before, after = row["sentence"].split("_", 1)
    return {
        "context_options": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": int(row["answer"]) - 1,
    }


def _winogrande_cut(row: Doc) -> Doc:
    return {
        "context_options": list(row["context_options"]),
        "continuation": row["continuation"],
        "gold": int(row["gold"]),
    }


def _mmlu(row: Doc) -> Doc:
    answer = row["answer"]
    index = "ABCD".index(answer.strip()) if isinstance(answer, str) else int(answer)
    return {"question": row["question"], "choices": list(row["choices"]), "answer": index}


def _worked(row: Doc) -> Doc:
    return {"question": str(row["question"]), "answer": str(row["answer"])}


def _scored(row: Doc) -> Doc:
    return {"query": row["query"], "choices": list(row["choices"]), "gold": int(row["gold"])}


_ARC_SHAPES = ((("question", "choices", "answerKey"), _arc), (("query", "choices", "gold"), _asked))
BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark(
        ("piqa/valid.jsonl", "piqa.jsonl", "piqa.parquet"),
        ((("goal", "sol1", "sol2", "label"), _piqa), (("query", "choices", "gold"), _scored)),
    ),
    "arc_easy": Benchmark(
        ("arc/arc_easy.jsonl", "arc_easy.jsonl", "arc_easy.parquet"), _ARC_SHAPES
    ),
    "arc_challenge": Benchmark(
        ("arc/arc_challenge.jsonl", "arc_challenge.jsonl", "arc_challenge.parquet"), _ARC_SHAPES
    ),
    "hellaswag": Benchmark(
        ("hellaswag_val_full.jsonl", "hellaswag.jsonl", "hellaswag.parquet"),
        (
            (("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
            (("ctx", "endings", "label"), _hellaswag_joined),
        ),
    ),
    "winogrande": Benchmark(
        ("winogrande/partial_context.jsonl", "winogrande.jsonl", "winogrande.parquet"),
        (
            (("sentence", "option1", "option2", "answer"), _winogrande),
            (("context_options", "continuation", "gold"), _winogrande_cut),
        ),
    ),
    "gsm8k": Benchmark(
        ("gsm8k_{split}.jsonl", "gsm8k/{split}.jsonl", "gsm8k_{split}.parquet"),
        ((("question", "answer"), _worked),),
    ),
    "mmlu": Benchmark(
        (
            "mmlu/{split}/{subject}_{split}.csv",
            "mmlu/{split}/{subject}_{split}.jsonl",
            "mmlu/{split}/{subject}_{split}.parquet",
        ),
        ((("question", "choices", "answer"), _mmlu),),
    ),
}


def _local_names(name: str, split: str, subject: str | None) -> list[str]:
    return [file.format(split=split, subject=subject) for file in BENCHMARKS[name].files]


def _local_docs(name: str, folder: Path, split: str, subject: str | None) -> list[Doc]:
    """The benchmark's questions from the first of its files that is there."""
    paths = [folder / file for file in _local_names(name, split, subject)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise LLQError(
            f"There is no file {paths[0]} for the benchmark {name!r}"
            f" ({' and '.join(str(p) for p in paths[1:])} were looked for too); put the data there"
            " or name another folder."
        )
    if path.suffix == ".csv":
        rows = list(_hendrycks_rows(path))
    else:
        rows = read_records(path)
        if name == "piqa" and "label" not in rows[0]:
            rows = _labelled(rows, path)
    return _converted(rows, name, subject, str(path))


def _converted(rows: Any, name: str, subject: str | None, where: str) -> list[Doc]:
    shapes = BENCHMARKS[name].shapes
    """The rows in the common shape; LLQError names the row that has no known shape."""
    docs = []
    for number, row in enumerate(rows, start=1):
        convert = next(
            (convert for fields, convert in shapes if all(field in row for field in fields)), None
        )
        if convert is None:
            wanted = " or ".join(f"({', '.join(fields)})" for fields, _ in shapes)
            raise LLQError(
                f"Row {number} of {where} has the fields {', '.join(row)}; it needs {wanted}."
            )
        try:
            doc = convert(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LLQError(
                f"Row {number} of {where} cannot be read ({error!r}); mend that row."
            ) from error
        docs.append({**doc, "subject": subject} if name == "mmlu" else doc)
    if not docs:
        raise LLQError(f"{where} holds no questions; give a file with at least one.")
    return docs


def _labelled(rows: list[Doc], path: Path) -> list[Doc]:
    """The rows of PIQA with their answers, which lie in a file of their own, a digit a line."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        raise LLQError(f"There is no file {labels_path} with the labels of {path}; put it there.")
    labels = labels_path.read_text(encoding="utf-8").split()
    if len(labels) != len(rows):
        raise LLQError(
            f"{labels_path} has {len(labels)} labels for {len(rows)} questions; give one a"
            " question."
        )
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def _hendrycks_rows(path: Path) -> Iterator[Doc]:
    """The rows of MMLU as first published: question, four answers, letter; without a header."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6:
                raise LLQError(
                    f"Row {number} of {path} has {len(row)} columns; it needs question, A, B, C,"
                    " D, answer."
                )
            yield {"question": row[0], "choices": row[1:5], "answer": row[5]}


def _demo_questions() -> list[Doc]:
    from ..demo import world

    # lm-eval puts the space between query and choice itself
    return [
        {"query": query, "choices": [choice.strip() for choice in choices], "gold": gold}
        for query, choices, gold in world.questions(400, seed=0)
    ]


def _folder(value: Any) -> Path:
    if not isinstance(value, str):
        raise LLQError(f"folder={value!r} in the metadata is no path; give a string.")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise LLQError(
            f"There is no folder {folder}; check the path (relative paths start at {Path.cwd()})."
        )
    return folder
