"""The study's tasks for lm-evaluation-harness: token perplexity in fixed windows, and multiple choice.

The YAML files in `tasks/lm_eval` name the two classes here (`class: !function llq_hf.hosts.lm_eval_perplexity.X`).

`WindowPerplexity`: the protocol of the GPTQ repository, which is neither lm-eval's `wikitext` (words, documents,
rolling windows) nor its rolling log-likelihood. The text is tokenised once and cut into disjoint windows of S
tokens; the first token of a window is context only; perplexity = exp(mean over the N * (S - 1) scored tokens).
lm-eval has no request type for that, so the task has its own, `llq_windows_nll`: the evaluator calls the method
of that name on the model, which `llq_hf._startup` adds to HFLM and which is `windows_nll` below. The windows are
dealt out to `SHARDS` documents, since data-parallel ranks divide the work by documents.

`MultipleChoice`: the prompts, answers and scores of lm-eval's built-in tasks, read from the Hub or from local
files. All formats end in one shape: `{query, choices, gold}`, for WinoGrande `{context_options, continuation,
gold}`, for MMLU `{question, choices, answer, subject}`.

What a user passes as `--metadata '{"text_file": "...", "seqlen": 256, "folder": "..."}'` reaches every task as
`config.metadata`, on top of the task's own and together with all model_args. Other keys are ignored.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from torch import Tensor

from ..common.errors import LLQError
from ..data.windows import EVALUATION_TEXTS, check_ids, hub_rows, load_evaluation, read_records

SHARDS = 16
AUTO_BATCH_WINDOWS = 8  # where batch_size=auto begins; halved when the device runs out of memory
REQUEST_TYPE = "llq_windows_nll"
METRIC = "token_perplexity"

_log = logging.getLogger("llq_hf")


# --- perplexity -------------------------------------------------------------------------------------------


class WindowPerplexity(ConfigurableTask):  # type: ignore[misc]  # lm_eval has no types
    """Token perplexity of one evaluation text; see the head of the file.

    From the YAML: `dataset_kwargs: {text: NAME}` (a name of `EVALUATION_TEXTS`), `metadata: {seqlen: S}`.
    From the user's metadata: `seqlen`, and `text_file`: a path for all texts, or an object of paths by name.
    The `demo` text is fixed: it heeds only a file given under its own name.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # an output type of lm-eval's own gets through its checks; requests carry ours
        super().__init__(config=_without_class(config) | {"output_type": "loglikelihood_rolling", "metric_list": []})
        self.OUTPUT_TYPE = REQUEST_TYPE

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Load the text; runs inside `ConfigurableTask.__init__`."""
        import datasets

        name = (dataset_kwargs or {})["text"]
        metadata = self.config.metadata
        self.seqlen = _seqlen(metadata.get("seqlen"))
        self.source = load_evaluation(name, _text_file(metadata.get("text_file"), name))
        metadata.update(seqlen=self.seqlen, text_source=self.source.source, text_sha256=self.source.sha256)
        shards = [{"text": name, "shard": shard, "shards": SHARDS} for shard in range(SHARDS)]
        self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(shards))

    def build_all_requests(self, **kwargs: Any) -> None:
        # the cache of --cache_requests knows the task's name only, neither its text nor seqlen
        super().build_all_requests(**kwargs | {"cache_requests": False})

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> str:
        return ""

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> str:
        return ""

    def fewshot_context(self, doc: Any, *args: Any, **kwargs: Any) -> str:
        return ""  # no shots, system prompt or chat template around a window

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """One request per shard. `arguments` are logged and hashed, hence the text itself travels in `doc`."""
        arguments = (str(self.source), self.seqlen, doc["shard"], doc["shards"])
        return Instance(
            request_type=REQUEST_TYPE,
            doc={**doc, "source": self.source},
            arguments=arguments,
            idx=0,
            metadata=kwargs["metadata"],
        )

    def process_results(self, doc: Any, results: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
        logprob, tokens, seqlen = results[0]
        self.config.metadata["seqlen"] = seqlen  # what was scored; a short model cuts what was asked for
        return {METRIC: (logprob, tokens)}

    def aggregation(self) -> dict[str, Callable[[Any], float]]:
        return {METRIC: token_perplexity}

    def higher_is_better(self) -> dict[str, bool]:
        return {METRIC: False}


def token_perplexity(shards: Sequence[tuple[float, int]]) -> float:
    """exp(mean negative log-likelihood) of `(sum of log-probabilities, tokens)`; shards without windows weigh 0."""
    tokens = sum(count for _, count in shards)
    if tokens == 0:
        raise LLQError("No window was scored; drop --samples, or name shards that have windows.")
    nats = -math.fsum(logprob for logprob, _ in shards) / tokens
    if math.isnan(nats):
        _log.warning("The model gives logits that are no numbers (NaN); its token perplexity is reported as NaN.")
    return math.inf if nats > 700 else math.exp(nats)


def windows_nll(lm: Any, requests: Sequence[Instance]) -> list[tuple[float, int, int]]:
    """The request type `llq_windows_nll` for an HFLM: per shard (sum of log-probabilities, tokens, window length).

    Shard i of n scores windows i, i + n, i + 2n, ... A window longer than the model allows is cut to the model's
    length, with a warning. Log-softmax is float32 whatever the model's dtype.
    """
    results: list[tuple[float, int, int]] = [(0.0, 0, 0)] * len(requests)
    for (_, seqlen), indices in _by_text(requests).items():
        source = requests[indices[0]].doc["source"]
        used = _usable_seqlen(lm, seqlen, source.name)
        windows_NS = source.windows(lm.tokenizer, used)
        check_ids(windows_NS, getattr(lm.config, "vocab_size", None), f"The text {source.name!r}")
        chosen = {index: _shard_windows(requests[index], len(windows_NS)) for index in indices}
        # each window once, though data-parallel padding repeats a request
        needed = sorted({window for windows in chosen.values() for window in windows})
        logprob = dict(zip(needed, _window_logprobs(lm, windows_NS[needed], source.name), strict=True))
        length = windows_NS.shape[1]
        for index, windows in chosen.items():
            total = math.fsum(logprob[window] for window in windows)
            results[index] = (total, len(windows) * (length - 1), length)
    return results


def _by_text(requests: Sequence[Instance]) -> dict[tuple[str, int], list[int]]:
    """Indices of the requests by text (its name and digest) and window length."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        text, seqlen, _, _ = request.args
        groups[text, seqlen].append(index)
    return groups


def _shard_windows(request: Instance, windows: int) -> range:
    _, _, shard, shards = request.args
    return range(shard, windows, shards)


def _usable_seqlen(lm: Any, seqlen: int, name: str) -> int:
    if seqlen <= lm.max_length:
        return seqlen
    _log.warning(
        "%s: the model takes at most %d tokens, so its windows are %d tokens long and not %d; the perplexity is not"
        " comparable with that of longer windows.",
        name,
        lm.max_length,
        lm.max_length,
        seqlen,
    )
    return int(lm.max_length)


def _window_logprobs(lm: Any, windows_NS: Tensor, name: str) -> list[float]:
    """The sum of log-probabilities of tokens 1..S-1 of each window."""
    from accelerate.utils import find_executable_batch_size
    from tqdm import tqdm  # type: ignore[import-untyped]

    def score(batch_size: int) -> list[float]:
        sums: list[float] = []
        with tqdm(total=len(windows_NS), desc=f"{name} windows", disable=lm.rank != 0) as bar:
            for batch_BS in torch.split(windows_NS, batch_size):
                sums += _batch_logprobs(lm, batch_BS)
                bar.update(len(batch_BS))
        return sums

    if len(windows_NS) == 0:  # all shards of this rank are empty
        return []
    if lm.batch_size != "auto":
        return score(int(lm.batch_size))
    return list(find_executable_batch_size(score, starting_batch_size=AUTO_BATCH_WINDOWS)())


def _batch_logprobs(lm: Any, batch_BS: Tensor) -> list[float]:
    with torch.no_grad():
        batch_BS = batch_BS.to(lm.device)
        logits_BSV = lm._model_call(batch_BS)
        # one window at a time: float32 logits of a window of 2048 in a vocabulary of 128k take 1 GiB
        losses = [
            torch.nn.functional.cross_entropy(
                logits_SV[:-1].float(), ids_S[1:].to(logits_SV.device), reduction="none"
            ).double()
            for logits_SV, ids_S in zip(logits_BSV, batch_BS, strict=True)
        ]
        return [-float(loss.sum()) for loss in losses]


def _seqlen(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise LLQError(f"seqlen={value!r} in the metadata is no window length; give an integer of 2 or more.")
    return value


def _text_file(value: Any, name: str) -> str | None:
    """The file for the text `name`, None for the Hub (or, for `demo`, the bundled text)."""
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in EVALUATION_TEXTS]
        if unknown:
            known = ", ".join(EVALUATION_TEXTS)
            raise LLQError(f"text_file names the text {unknown[0]!r} in the metadata; the texts are {known}.")
        value = value.get(name)
    elif name == "demo":
        return None
    if value is not None and not isinstance(value, str):
        raise LLQError(f"text_file={value!r} in the metadata is no path; give a string or an object of strings.")
    return value


# --- multiple choice --------------------------------------------------------------------------------------

Doc = dict[str, Any]


class MultipleChoice(ConfigurableTask):  # type: ignore[misc]
    """A benchmark of `BENCHMARKS`; see the head of the file.

    From the YAML: `dataset_kwargs: {benchmark: NAME}`, and `dataset_path`, `dataset_name` for the Hub. From the
    user's metadata: `folder`, where the files of all benchmarks lie; the `demo` questions are made, not read.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=_without_class(config))

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Load the questions; runs inside `ConfigurableTask.__init__`."""
        import datasets

        name = (dataset_kwargs or {})["benchmark"]
        folder = self.config.metadata.get("folder")
        if name == "demo":
            splits = {"test": _demo_questions()}
        elif folder is not None:
            splits = {split: _local_docs(name, _folder(folder), split, self.DATASET_NAME) for split in self._splits()}
        else:
            splits = {split: self._hub_docs(name, split) for split in self._splits()}
        self.config.metadata["data_source"] = name if name == "demo" else str(folder) if folder else "hub"
        self.dataset = datasets.DatasetDict({split: datasets.Dataset.from_list(docs) for split, docs in splits.items()})

    def build_all_requests(self, **kwargs: Any) -> None:
        # the cache of --cache_requests knows the task's name only, not the folder
        if self.config.metadata["data_source"] != "hub":
            kwargs["cache_requests"] = False
        super().build_all_requests(**kwargs)

    def _splits(self) -> list[str]:
        config = self.config
        return [split for split in (config.validation_split, config.test_split, config.fewshot_split) if split]

    def _hub_docs(self, name: str, split: str) -> list[Doc]:
        cure = (
            'pass --metadata \'{"folder": "FOLDER"}\' with a folder that holds '
            + " or ".join(_local_names(name, split, self.DATASET_NAME))
            + "."
        )
        rows = hub_rows(self.DATASET_PATH, self.DATASET_NAME, split=split, offline_cure=cure)
        return _converted(rows, name, self.DATASET_NAME, f"{self.DATASET_PATH} on the Hub")


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies in a local folder and what its rows may look like.

    `shapes`: (fields of a row, conversion to the common shape), tried in order. `{split}` and `{subject}` in
    `files` are filled in.
    """

    files: tuple[str, ...]
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
    """A row that begins with `Question: ` already, and may lack the `Answer:`."""
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
    """Marks such as `[title]` are left from the WikiHow pages; lm-eval's task drops them like this."""
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


def _scored(row: Doc) -> Doc:
    return {"query": row["query"], "choices": list(row["choices"]), "gold": int(row["gold"])}


_ARC_SHAPES = ((("question", "choices", "answerKey"), _arc), (("query", "choices", "gold"), _asked))

BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark(
        ("piqa/valid.jsonl", "piqa.jsonl", "piqa.parquet"),
        ((("goal", "sol1", "sol2", "label"), _piqa), (("query", "choices", "gold"), _scored)),
    ),
    "arc_easy": Benchmark(("arc/arc_easy.jsonl", "arc_easy.jsonl", "arc_easy.parquet"), _ARC_SHAPES),
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
            f"There is no file {paths[0]} for the benchmark {name!r} ({' and '.join(str(p) for p in paths[1:])} were"
            " looked for too); put the data there or name another folder."
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
    docs = []
    for number, row in enumerate(rows, start=1):
        convert = next((convert for fields, convert in shapes if all(field in row for field in fields)), None)
        if convert is None:
            wanted = " or ".join(f"({', '.join(fields)})" for fields, _ in shapes)
            raise LLQError(f"Row {number} of {where} has the fields {', '.join(row)}; it needs {wanted}.")
        try:
            doc = convert(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LLQError(f"Row {number} of {where} cannot be read ({error!r}); mend that row.") from error
        docs.append({**doc, "subject": subject} if name == "mmlu" else doc)
    if not docs:
        raise LLQError(f"{where} holds no questions; give a file with at least one.")
    return docs


def _labelled(rows: list[Doc], path: Path) -> list[Doc]:
    """PIQA keeps its answers in a file of their own, a digit a line."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        raise LLQError(f"There is no file {labels_path} with the labels of {path}; put it there.")
    labels = labels_path.read_text(encoding="utf-8").split()
    if len(labels) != len(rows):
        raise LLQError(f"{labels_path} has {len(labels)} labels for {len(rows)} questions; give one a question.")
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def _hendrycks_rows(path: Path) -> Iterator[Doc]:
    """MMLU as first published: question, four answers, letter; no header."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6:
                raise LLQError(f"Row {number} of {path} has {len(row)} columns; it needs question, A, B, C, D, answer.")
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
        raise LLQError(f"There is no folder {folder}; check the path (relative paths start at {Path.cwd()}).")
    return folder


def _without_class(config: dict[str, Any]) -> dict[str, Any]:
    """The config for ConfigurableTask, which does not know the key that chose this class."""
    return {key: value for key, value in config.items() if key != "class"}
