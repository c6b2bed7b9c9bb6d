"""Reads training rows from a source, one at a time, and turns each into tokens.

A row is an object with `instruction`, `output` and perhaps `input` (put into Alpaca's prompt), or
with `prompt` and `completion` (taken as they are). Only the tokens of the answer, and the EOS after
it, are targets.

source       | rows
alpaca       | tatsu-lab/alpaca on the Hub, 52 002 rows
demo         | questions about the bundled world (prompt and completion)
a file       | .jsonl and .parquet are read row by row; a .json list is read whole
another name | a dataset on the Hub, split `train`, streamed

Rows are never held as a list: their tokens go to a memory-mapped file of `datasets` or, when they
are streamed, to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.errors import LLQError
from ..common.files import replaced
from ..data.readers import json_lines, open_parquet, read_json_list
from ..data.sources import hub_rows
from ..demo import instructions

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".json", ".jsonl", ".parquet")
SHUFFLED_ROWS = 10_000  # of a stream, from which the next one is drawn
HEAD = "Below is an instruction that describes a task"
WRITE = (
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
)
PROMPT = f"{HEAD}. {WRITE}### Response: "
PROMPT_WITH_INPUT = (
    f"{HEAD}, paired with an input that provides further context. "
    f"{WRITE}### Input:\n{{input}}\n\n### Response: "
)
HUB_CURE = "check the name and the network, or give a local .json, .jsonl or .parquet file."


class Example(NamedTuple):
    """A row: the text that is read, and the text to answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """Turns a row into tokens: `input_ids`, and `labels` with -100 where nothing is learned.

    A prompt keeps its first `prompt_tokens` tokens, BOS among them, an answer its first
    `answer_tokens`. An answer that is cut has no EOS, because it does not end there.
    """

    tokenizer: Any
    prompt_tokens: int
    answer_tokens: int

    def __call__(self, row: Example) -> dict[str, list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prompt = [] if bos is None else [bos]
        prompt = (prompt + self._ids(row.prompt))[: self.prompt_tokens]
        answer = [*self._ids(row.completion), eos][: self.answer_tokens]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def rows_of(source: str) -> Iterator[Example]:
    """The rows of a source, in order. LLQError names the first bad one, its place and its fault."""
    if source == "demo":
        return (Example(*row) for row in instructions.rows("train"))
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES and not path.exists():
        return _hub("tatsu-lab/alpaca" if source == "alpaca" else source)
    if path.suffix.lower() not in SUFFIXES:
        raise LLQError(
            f"{source} is of a kind that cannot be read here; "
            f"give a file that ends in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise LLQError(
            f"There is no file {path}; check the path (relative paths start at {Path.cwd()})."
        )
    return {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix.lower()](path)


def _json(path: Path) -> Iterator[Example]:
    for number, value in enumerate(read_json_list(path), start=1):
        yield _row(value, f"Entry {number} of {path}")


def _jsonl(path: Path) -> Iterator[Example]:
    with path.open(encoding="utf-8") as lines:
        for number, value in json_lines(lines, path):
            yield _row(value, f"Line {number} of {path}")


def _parquet(path: Path) -> Iterator[Example]:
    number = 0
    for batch in open_parquet(path).iter_batches(1024):
        for value in batch.to_pylist():
            number += 1
            yield _row(value, f"Row {number} of {path}")


def _hub(name: str) -> Iterator[Example]:
    values = hub_rows(name, split="train", offline_cure=HUB_CURE, streaming=True)
    for number, value in enumerate(values, start=1):
        yield _row(value, f"Row {number} of {name}")


def _row(value: Any, where: str) -> Example:
    if not isinstance(value, dict):
        raise LLQError(
            f"{where} is {type(value).__name__}, not an object with the fields instruction "
            "and output"
        )
    if "instruction" in value:
        fields = {
            "instruction": value["instruction"],
            "input": value.get("input") or "",
            "output": value.get("output"),
        }
        _check(fields, "instruction", where)
        prompt = (PROMPT_WITH_INPUT if fields["input"].strip() else PROMPT).format_map(fields)
        return Example(prompt, fields["output"])
    fields = {"prompt": value.get("prompt"), "completion": value.get("completion")}
    if fields["prompt"] is None:
        raise LLQError(
            f"{where} has neither the field instruction nor prompt "
            f"(fields: {', '.join(map(str, value)) or 'none'}); "
            "write instruction, output and perhaps input, or prompt and completion"
        )
    _check(fields, "prompt", where)
    return Example(**fields)


def _check(fields: dict[str, Any], question: str, where: str) -> None:
    for name, text in fields.items():
        if not isinstance(text, str):
            lacks = (
                f"lacks the field {name}"
                if text is None
                else f"has {type(text).__name__} in the field {name}"
            )
            raise LLQError(f"{where} {lacks}; write a string there")
    if not fields[question].strip():
        raise LLQError(f"{where} has an empty {question}; remove the row, or fill it in")


# --- data sets ------------------------------------------------------------------------------------


def stored_rows(
    source: str, tokens: Tokens, heldout: int, seed: int, cache: Path
) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows) as memory-mapped files under `cache`.

    Every row is checked before training starts. At most a tenth of the rows is held out; `demo` has
    held-out people of its own.
    """
    import datasets

    everything = _arrow_dataset(lambda: map(tokens, rows_of(source)), cache / "rows")
    if source == "demo":
        own = (Example(*row) for row in islice(instructions.rows("heldout"), heldout))
        return everything, datasets.Dataset.from_list([tokens(row) for row in own])
    if len(everything) < 2:
        raise LLQError(
            f"{source} has {len(everything)} rows; give at least 2, of which one is held out"
        )
    split = everything.train_test_split(min(heldout, max(len(everything) // 10, 1)), seed=seed)
    return split["train"], split["test"]


def streamed_rows(
    source: str, tokens: Tokens, heldout: int, seed: int
) -> tuple[IterableDataset, Dataset]:
    """(a stream of training rows, shuffled in a window, held-out rows).

    The first `heldout` rows are held out, the others are streamed.
    """
    import datasets

    first = [tokens(row) for row in islice(rows_of(source), heldout)]
    if len(first) < heldout:
        raise LLQError(
            f"{source} has {len(first)} rows, and {heldout} are to be held out; hold out fewer"
        )

    def rest() -> Iterator[dict[str, list[int]]]:
        return map(tokens, islice(rows_of(source), heldout, None))

    stream = datasets.IterableDataset.from_generator(rest)
    return stream.shuffle(seed=seed, buffer_size=SHUFFLED_ROWS), datasets.Dataset.from_list(first)


def _arrow_dataset(rows: Callable[[], Iterable[dict[str, list[int]]]], folder: Path) -> Dataset:
    """The rows as an Arrow file, or what an earlier run wrote there."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.arrow"
    if not file.is_file():
        with replaced(file) as draft, ArrowWriter(path=str(draft)) as writer:
            for row in rows():
                writer.write(row)
            writer.finalize()
    return datasets.Dataset.from_file(str(file))
