"""Read texts and records from local files: .txt, .json, .jsonl, .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import LLQError
from ..common.words import either, listed

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")


def read_texts(path: Path) -> list[str]:
    """The documents of a local file, in order.

    .txt      | the whole file is one document
    .json     | a list of strings, or of objects with a field `text`
    .jsonl    | one such value a line
    .parquet  | the column `text`, or else the only column of strings

    Raises LLQError for a missing, empty or broken file. Where a file holds no texts, the error
    names the fields that it has.
    """
    path = existing_file(path, TEXT_SUFFIXES)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        texts = _parquet_texts(path)
    elif suffix == ".txt":
        texts = [_read_utf8(path)]
    elif suffix == ".json":
        texts = [
            _text_of(value, f"Entry {index} of {path}")
            for index, value in enumerate(read_json_list(path))
        ]
    else:
        # splitlines() would cut at U+2028 too
        lines = json_lines(_read_utf8(path).split("\n"), path)
        texts = [_text_of(value, f"Line {line} of {path}") for line, value in lines]
    if not any(text.strip() for text in texts):
        raise LLQError(
            f"{path} holds no text; give a file with at least one document that is not blank."
        )
    return texts


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file or the rows of a `.parquet` file, as dictionaries; at least
    one.
    """
    path = existing_file(path, (".jsonl", ".parquet"))
    if path.suffix.lower() == ".parquet":
        records: list[Any] = open_parquet(path).read().to_pylist()
    else:
        records = []
        for line, value in json_lines(_read_utf8(path).split("\n"), path):
            if not isinstance(value, dict):
                raise LLQError(
                    f"Line {line} of {path} is {type(value).__name__}, not a JSON object; write"
                    " objects."
                )
            records.append(value)
    if not records:
        raise LLQError(f"{path} holds no records; give a file with at least one.")
    return records


def existing_file(path: Path, suffixes: Sequence[str]) -> Path:
    """The path of a file of one of these kinds; LLQError where it is of another, or not there."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in suffixes:
        raise LLQError(
            f"{path} is of a kind that cannot be read here; give a file that ends in"
            f" {either(suffixes)}."
        )
    if path.is_dir():
        raise LLQError(f"{path} is a folder; give a file in it that ends in {either(suffixes)}.")
    if not path.exists():
        raise LLQError(
            f"There is no file {path}; check the path (relative paths start at {Path.cwd()})."
        )
    return path


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LLQError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise LLQError(
            f"{path} cannot be read ({error.strerror}); check its permissions."
        ) from error


def read_json_list(path: Path) -> list[Any]:
    """The list that a `.json` file holds; LLQError names the line that is not JSON."""
    content = _read_utf8(path)
    if not content.strip():
        raise LLQError(f"{path} is empty; give a file with at least one document.")
    try:
        values = json.loads(content)
    except json.JSONDecodeError as error:
        raise LLQError(
            f"{path} is not valid JSON at line {error.lineno} ({error.msg}); mend that line, or"
            " name the file .jsonl if every line is a value of its own."
        ) from error
    if not isinstance(values, list):
        raise LLQError(
            f"{path} holds a JSON {type(values).__name__}, not a list; write a list of documents."
        )
    return values


def json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank, one at a time."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise LLQError(
            f"Line {number} of {path} is not valid JSON ({error.msg}); mend that line."
        ) from error
    except UnicodeDecodeError as error:
        raise LLQError(
            f"{path} is not UTF-8 text (after line {number}); save it as UTF-8."
        ) from error


def _text_of(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise LLQError(
            f"{where} is {type(value).__name__}; write a string or an object with a `text` field."
        )
    text = value.get("text")
    if not isinstance(text, str):
        raise LLQError(
            f"{where} has no string in a field `text` (fields: {listed(value)}); name the field"
            " `text`."
        )
    return text


def open_parquet(path: Path) -> Any:
    """The file as a `pyarrow.parquet.ParquetFile`, from which rows are read batch by batch."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise LLQError(
            f"{path} is not a readable parquet file ({error}); write it anew."
        ) from error


def _parquet_texts(path: Path) -> list[str]:
    table = open_parquet(path).read()
    strings = [
        field.name
        for field in table.schema
        if str(field.type) in ("string", "large_string", "string_view")
    ]
    name = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if name is None:
        raise LLQError(
            f"{path} has no column `text` and not exactly one column of strings (columns:"
            f" {listed(table.column_names)}); name the column `text`."
        )
    return [text or "" for text in table.column(name).to_pylist()]
