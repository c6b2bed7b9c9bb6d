"""Token windows: what a method is calibrated on, and what perplexity is measured on.

Both follow the GPTQ repository (IST-DASLab/gptq, `datautils.py`), which every method of the study copies, to
the exact draw of Python's `random`. N = windows, S = tokens in a window, T = tokens of the whole text.

calibration    | text                                             | window
`wikitext2`    | WikiText-2 train rows joined by two newlines     | N draws of `randint(0, T - S - 1)`
`ptb`          | Penn Treebank train sentences joined by a space  | the same
`c4`           | first C4 train shard                             | a random document of T > S, a place in it
`demo`         | the bundled small world                          | as wikitext2
`demo-vlm`     | questions and answers about the bundled drawings | as wikitext2
a text file    | its documents joined by two newlines             | as wikitext2
a `.npy` file  | int token ids `[N, S]`                           | its rows, as they are

evaluation     | text                                                         | windows
`wikitext2`    | test rows joined by two newlines                             | all disjoint ones
`ptb`          | validation sentences joined by two newlines                  | the same
`ptb_new`      | test sentences joined by a space                             | the same
`c4_new`       | first 1100 documents of a validation shard joined by a space | the first 256 disjoint ones
`c4`           | documents of the same shard                                  | 256 random ones, seed 0
`demo`         | the held-out text of the bundled small world                 | all disjoint ones

A text is tokenised once as a whole, so it holds at most one BOS. The original draws a C4 document of `>= S`
tokens and then fails on one of exactly S; here it must be longer than S. Where the original does not fail,
the draws are the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import LLQError

CALIBRATION_SOURCES = ("wikitext2", "c4", "ptb", "demo", "demo-vlm")
EVALUATION_TEXTS = ("wikitext2", "c4", "c4_new", "ptb", "ptb_new", "demo")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")

C4_WINDOWS = 256  # both C4 variants score this many windows
C4_NEW_DOCUMENTS = 1100
MAX_REJECTED_DRAWS = 20_000  # of C4 documents, in a row; the first shard needs about 30 at S = 2048


# --- reading files ----------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[str]:
    """The documents of a local file, in order.

    `.txt`: the whole file is one document. `.json`: a list of strings or of objects with a `text` field.
    `.jsonl`: one such value a line. `.parquet`: the column `text`, else the only column of strings.
    Raises LLQError for a missing, empty or broken file, and for one without texts (naming the fields it has).
    """
    path = _existing_file(path, TEXT_SUFFIXES)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        texts = _parquet_texts(path)
    elif suffix == ".txt":
        texts = [_read_utf8(path)]
    elif suffix == ".json":
        texts = [_text_of(value, f"Entry {index} of {path}") for index, value in enumerate(read_json_list(path))]
    else:
        lines = json_lines(_read_utf8(path).split("\n"), path)  # splitlines() cuts at U+2028 too
        texts = [_text_of(value, f"Line {line} of {path}") for line, value in lines]
    if not any(text.strip() for text in texts):
        raise LLQError(f"{path} holds no text; give a file with at least one document that is not blank.")
    return texts


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file or the rows of a `.parquet` file, as dictionaries; at least one."""
    path = _existing_file(path, (".jsonl", ".parquet"))
    if path.suffix.lower() == ".parquet":
        records: list[Any] = open_parquet(path).read().to_pylist()
    else:
        records = []
        for line, value in json_lines(_read_utf8(path).split("\n"), path):
            if not isinstance(value, dict):
                raise LLQError(f"Line {line} of {path} is {type(value).__name__}, not a JSON object; write objects.")
            records.append(value)
    if not records:
        raise LLQError(f"{path} holds no records; give a file with at least one.")
    return records


def _existing_file(path: Path, suffixes: Sequence[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix.lower() not in suffixes:
        raise LLQError(f"{path} is of a kind that cannot be read here; give a file that ends in {_either(suffixes)}.")
    if path.is_dir():
        raise LLQError(f"{path} is a folder; give a file in it that ends in {_either(suffixes)}.")
    if not path.exists():
        raise LLQError(f"There is no file {path}; check the path (relative paths start at {Path.cwd()}).")
    return path


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LLQError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise LLQError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def read_json_list(path: Path) -> list[Any]:
    """The list that a `.json` file holds; LLQError names the line that is not JSON."""
    content = _read_utf8(path)
    if not content.strip():
        raise LLQError(f"{path} is empty; give a file with at least one document.")
    try:
        values = json.loads(content)
    except json.JSONDecodeError as error:
        raise LLQError(
            f"{path} is not valid JSON at line {error.lineno} ({error.msg}); mend that line, or name the"
            " file .jsonl if every line is a value of its own."
        ) from error
    if not isinstance(values, list):
        raise LLQError(f"{path} holds a JSON {type(values).__name__}, not a list; write a list of documents.")
    return values


def json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank, one at a time."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise LLQError(f"Line {number} of {path} is not valid JSON ({error.msg}); mend that line.") from error
    except UnicodeDecodeError as error:
        raise LLQError(f"{path} is not UTF-8 text (after line {number}); save it as UTF-8.") from error


def _text_of(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise LLQError(f"{where} is {type(value).__name__}; write a string or an object with a `text` field.")
    text = value.get("text")
    if not isinstance(text, str):
        raise LLQError(f"{where} has no string in a field `text` (fields: {_listed(value)}); name the field `text`.")
    return text


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, from which rows can be read batch by batch."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise LLQError(f"{path} is not a readable parquet file ({error}); write it anew.") from error


def _parquet_texts(path: Path) -> list[str]:
    table = open_parquet(path).read()
    strings = [field.name for field in table.schema if str(field.type) in ("string", "large_string", "string_view")]
    name = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if name is None:
        raise LLQError(
            f"{path} has no column `text` and not exactly one column of strings (columns:"
            f" {_listed(table.column_names)}); name the column `text`."
        )
    return [text or "" for text in table.column(name).to_pylist()]


# --- reading the Hub --------------------------------------------------------------------------------------


def hub_rows(repository: str, config: str | None = None, *, split: str, offline_cure: str, **options: Any) -> Any:
    """One split of a Hub dataset (`datasets.Dataset`); LLQError that ends in `offline_cure` when that fails.

    Only data files are read: `datasets` 4 and later runs no loading script. `options` go to `load_dataset`.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, **options)
    except Exception as error:  # offline: OSError, ValueError, RuntimeError and types of huggingface_hub
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise LLQError(
            f"The dataset {repository} could not be read from the Hugging Face Hub ({cause}); {offline_cure}"
        ) from error


def _wikitext2(split: str, cure: str) -> list[str]:
    return list(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, offline_cure=cure)["text"])


def _c4(split: str, cure: str) -> list[str]:
    shard = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
    # `data_files` under a split of our naming: else datasets expects the full shard count of the named config
    files = {split: shard[split]}
    return list(hub_rows("allenai/c4", split=split, offline_cure=cure, data_files=files)["text"])


def _ptb(split: str, cure: str) -> list[str]:
    # the repository's own files are a loading script; the Hub keeps their parquet form under this revision
    rows = hub_rows("ptb-text-only/ptb_text_only", split=split, offline_cure=cure, revision="refs/convert/parquet")
    return list(rows["sentence"])


# --- calibration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Where the calibration windows come from; the defaults are those of the GPTQ repository."""

    source: str = "wikitext2"  # a name of CALIBRATION_SOURCES or a path
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("samples", self.samples)
        _positive("seqlen", self.seqlen)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise LLQError(f"seed={self.seed!r} cannot seed the calibration draws; give an integer that is 0 or more.")
        if not isinstance(self.source, str) or not self.source:
            raise LLQError(f"source={self.source!r} names no calibration data; give {_sources()}.")

    @property
    def has_images(self) -> bool:
        """Whether it is image-text pairs (`pairs.py`) and not a text."""
        path = Path(self.source).expanduser()
        folder = path.is_dir() and path.suffix.lower() not in (*TEXT_SUFFIXES, ".npy")  # else a file by mistake
        return folder or self.source.startswith("hub:")

    @property
    def needs_tokenizer(self) -> bool:
        return Path(self.source).suffix.lower() != ".npy"

    @property
    def described(self) -> dict[str, Any]:
        """The draw, as a card tells of it: a file by its name only."""
        name = self.source if self.source in CALIBRATION_SOURCES else Path(self.source).name
        return {"source": name, "samples": self.samples, "seqlen": self.seqlen, "seed": self.seed}

    def ids(self, tokenizer: Any, vocab_size: int | None = None) -> Tensor:
        """int64 `[N, S]`; see `calibration_ids`."""
        return calibration_ids(
            self.source,
            tokenizer,
            samples=self.samples,
            seqlen=self.seqlen,
            seed=self.seed,
            vocab_size=vocab_size,
        )


def calibration_ids(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """Calibration windows, int64 `[samples, seqlen]`, drawn as in the GPTQ repository (see the file's head).

    A `.npy` file is used as it is: its first `samples` rows and first `seqlen` columns, fewer where it has
    fewer (a lack of rows is warned about). `tokenizer` is not touched then.
    Raises LLQError for an unknown source, unusable data, too few tokens, and ids outside `vocab_size`.
    """
    _positive("samples", samples)
    _positive("seqlen", seqlen)
    if source in CALIBRATION_SOURCES:
        windows_NS = _sampled_source(source, tokenizer, samples, seqlen, seed)
    elif _looks_like_path(source):
        path = Path(source).expanduser()
        if path.suffix.lower() == ".npy":
            windows_NS = _stored_windows(path, samples, seqlen)
        else:
            text = "\n\n".join(read_texts(path))
            windows_NS = _random_windows(_tokens(text, tokenizer), samples, seqlen, random.Random(seed), str(path))
    else:
        raise LLQError(
            f"Unknown calibration source {source!r}{_nearest(source, CALIBRATION_SOURCES)}; give {_sources()}."
        )
    return check_ids(windows_NS, vocab_size, source)


def ids_sha256(ids: Tensor) -> str:
    """Hex digest of token ids: their shape and their values as little-endian int64."""
    digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.detach().cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _sampled_source(source: str, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    cure = "pass calibration=FILE with a local .txt, .json, .jsonl, .parquet or .npy file, or calibration=demo."
    draw = random.Random(seed)
    if source == "c4":
        return _document_windows(_c4("train", cure), tokenizer, samples, seqlen, draw, source)
    if source == "wikitext2":
        text = "\n\n".join(_wikitext2("train", cure))
    elif source == "ptb":
        text = " ".join(_ptb("train", cure))
    elif source == "demo-vlm":
        from ..demo import drawings

        text = drawings.calibration_text()
    else:
        from ..demo import world

        text = world.calibration_text()
    return _random_windows(_tokens(text, tokenizer), samples, seqlen, draw, source)


def _random_windows(ids_T: Tensor, samples: int, seqlen: int, draw: random.Random, what: str) -> Tensor:
    tokens = ids_T.numel()
    if tokens <= seqlen:
        raise LLQError(
            f"{what} has {tokens} tokens, and a random window of {seqlen} needs at least {seqlen + 1}; give a"
            " longer text or a smaller seqlen."
        )
    starts = [draw.randint(0, tokens - seqlen - 1) for _ in range(samples)]
    return torch.stack([ids_T[start : start + seqlen] for start in starts])


def _document_windows(
    documents: Sequence[str], tokenizer: Any, samples: int, seqlen: int, draw: random.Random, what: str
) -> Tensor:
    """`[samples, seqlen]`: each time a random document of more than seqlen tokens, a random place in it."""
    too_short: set[int] = set()
    windows: list[Tensor] = []
    rejected = longest = 0
    while len(windows) < samples:
        index = draw.randint(0, len(documents) - 1)
        ids_T = None if index in too_short else _tokens(documents[index], tokenizer)
        if ids_T is not None and ids_T.numel() > seqlen:
            start = draw.randint(0, ids_T.numel() - seqlen - 1)
            windows.append(ids_T[start : start + seqlen])
            rejected = 0
            continue
        if ids_T is not None:
            longest = max(longest, ids_T.numel())
        too_short.add(index)
        rejected += 1
        if len(too_short) == len(documents) or rejected >= MAX_REJECTED_DRAWS:
            raise LLQError(
                f"No document of {what} with more than {seqlen} tokens was found among {len(too_short)}"
                f" drawn (the longest has {longest}); give longer documents or a smaller seqlen."
            )
    return torch.stack(windows)


def _stored_windows(path: Path, samples: int, seqlen: int) -> Tensor:
    ids = _load_ids(path)
    if ids.shape[0] < samples:
        warnings.warn(f"{path} holds {ids.shape[0]} windows, fewer than samples={samples}: all are used.", stacklevel=3)
    return torch.from_numpy(ids[:samples, :seqlen].astype(np.int64))


def _load_ids(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    path = _existing_file(path, (".npy",))
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LLQError(f"{path} is not a readable .npy file of numbers ({error}); write it with numpy.save.") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise LLQError(f"{path} holds {ids.dtype}, not integers; save the token ids as int32 or int64.")
    if ids.ndim != 2 or 0 in ids.shape:
        raise LLQError(
            f"{path} has shape {list(ids.shape)}; give token ids of shape [windows, tokens], none of them 0."
        )
    return np.asarray(ids)


def check_ids(ids: Tensor, vocab_size: int | None, what: str) -> Tensor:
    """The ids themselves; LLQError for a negative one or one outside the vocabulary."""
    if (smallest := int(ids.min())) < 0:
        raise LLQError(f"{what} holds the token id {smallest}; token ids are 0 or more.")
    if vocab_size is not None and (largest := int(ids.max())) >= vocab_size:
        raise LLQError(
            f"{what} gives the token id {largest}, outside the model's vocabulary of {vocab_size}; use the"
            " tokenizer that belongs to the model."
        )
    return ids


# --- evaluation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationText:
    """A text of the perplexity protocol: its documents or ready windows, and how windows are cut from it."""

    name: str
    source: str  # "hub", "demo" or the file's path
    documents: tuple[str, ...] = ()
    stored_NS: Tensor | None = None

    def text(self) -> str:
        """The joined text. `c4` has none: it scores windows of single documents."""
        if self.name == "c4" or self.stored_NS is not None:
            raise LLQError(f"The evaluation text {self.name!r} is a set of token windows; call windows() instead.")
        return (" " if self.name in ("ptb_new", "c4_new") else "\n\n").join(self.documents)

    def windows(self, tokenizer: Any, seqlen: int) -> Tensor:
        """Disjoint windows in order, int64 `[N, S]`; a shorter last piece is dropped. N is 1 or more."""
        if self.stored_NS is not None:
            return self.stored_NS[:, :seqlen]
        if self.name == "c4":
            return _document_windows(self.documents, tokenizer, C4_WINDOWS, seqlen, random.Random(0), self._what())
        ids_T = _tokens(self.text(), tokenizer)
        count = ids_T.numel() // seqlen
        if count == 0:
            raise LLQError(
                f"{self._what()} has {ids_T.numel()} tokens, fewer than one window of {seqlen}; give a longer"
                " text or a smaller seqlen."
            )
        windows_NS = ids_T[: count * seqlen].view(count, seqlen)
        return windows_NS[:C4_WINDOWS] if self.name == "c4_new" else windows_NS

    @cached_property
    def sha256(self) -> str:
        """Digest of the data and of the rule that cuts it (the name)."""
        if self.stored_NS is not None:
            return ids_sha256(self.stored_NS)
        digest = hashlib.sha256(self.name.encode())
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def __str__(self) -> str:  # what lm-eval writes into sample logs in place of the text
        return f"{self.name} ({self.source}, sha256 {self.sha256})"

    def _what(self) -> str:
        return f"The evaluation text {self.name!r} ({self.source})"


def load_evaluation(name: str, file: str | Path | None = None) -> EvaluationText:
    """The evaluation text `name`, from the Hub or, with the rules of that name, from a local file.

    Files are those of `read_texts`; for `ptb` and `ptb_new` every line of a `.txt` file is a sentence (the
    layout in which the treebank is handed round). A `.npy` file of ids `[N, S]` is scored row by row.
    """
    if name not in EVALUATION_TEXTS:
        known = ", ".join(EVALUATION_TEXTS)
        raise LLQError(f"Unknown evaluation text {name!r}{_nearest(name, EVALUATION_TEXTS)}; give one of {known}.")
    if file is None:
        if name == "demo":
            from ..demo import world

            return EvaluationText(name, "demo", (world.heldout_text(),))
        return _evaluation(name, "hub", _HUB_EVALUATION[name]())
    path = Path(file).expanduser()
    if path.suffix.lower() == ".npy":
        return EvaluationText(name, str(path), stored_NS=torch.from_numpy(_load_ids(path).astype(np.int64)))
    documents = read_texts(path)
    if name in ("ptb", "ptb_new") and path.suffix.lower() == ".txt":
        documents = [line.strip() for line in documents[0].split("\n") if line.strip()]
    return _evaluation(name, str(path), documents)


def _evaluation(name: str, source: str, documents: list[str]) -> EvaluationText:
    return EvaluationText(name, source, tuple(documents[:C4_NEW_DOCUMENTS] if name == "c4_new" else documents))


def evaluation_text(name: str, file: str | Path | None = None) -> str:
    """The joined text of a name of EVALUATION_TEXTS, but not `c4`: that one has `evaluation_windows` only."""
    return load_evaluation(name, file).text()


def evaluation_windows(name: str, tokenizer: Any, seqlen: int = 2048, file: str | Path | None = None) -> Tensor:
    """The windows that the protocol scores for any name of EVALUATION_TEXTS, int64 `[N, S]`."""
    return load_evaluation(name, file).windows(tokenizer, seqlen)


_EVALUATION_CURE = 'pass --metadata \'{"text_file": "FILE"}\' with a local .txt, .json, .jsonl or .parquet file.'
_HUB_EVALUATION: dict[str, Callable[[], list[str]]] = {
    "wikitext2": lambda: _wikitext2("test", _EVALUATION_CURE),
    "ptb": lambda: _ptb("validation", _EVALUATION_CURE),
    "ptb_new": lambda: _ptb("test", _EVALUATION_CURE),
    "c4": lambda: _c4("validation", _EVALUATION_CURE),
    "c4_new": lambda: _c4("validation", _EVALUATION_CURE),
}


# --- small helpers ----------------------------------------------------------------------------------------


def _tokens(text: str, tokenizer: Any) -> Tensor:
    """int64 `[T]`, with the special tokens that the tokenizer adds by itself (a BOS for LLaMA)."""
    if tokenizer is None:
        raise LLQError("Texts need a tokenizer and none was given; pass the model's, or use a .npy file of token ids.")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LLQError(f"{name}={value!r} is not a positive integer; give 1 or more.")


def _looks_like_path(source: str) -> bool:
    return "/" in source or "\\" in source or Path(source).suffix != "" or Path(source).exists()


def _sources() -> str:
    suffixes = _either((*TEXT_SUFFIXES, ".npy"))
    return f"one of {', '.join(CALIBRATION_SOURCES)}, or the path of a file that ends in {suffixes}"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"
