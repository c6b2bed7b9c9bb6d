"""Rows to fine-tune on: every format gives the same rows, the first bad one is named, nothing is
held.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from llq_hf.common.errors import LLQError
from llq_hf.demo import instructions, world
from llq_hf.finetune import rows

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Translate.", "input": "rouge", "output": "red"},
    {"instruction": "Say nothing.", "output": ""},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def write(path: Path, values: list) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str):
    found = list(rows.rows_of(str(write(tmp_path / f"data{suffix}", ALPACA))))
    assert [row.completion for row in found] == ["Red.", "red", ""]
    assert found[0].prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response: "
    )
    assert found[1].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nrouge\n\n### Response: "
    )


def test_prompts_and_completions_are_taken_as_they_are(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "one {x}", "completion": " two"}])
    assert list(rows.rows_of(str(path))) == [("one {x}", " two")]


def test_braces_in_an_instruction_are_text(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", [{"instruction": "{output} {0}", "output": "}"}])
    assert "\n{output} {0}\n" in next(rows.rows_of(str(path))).prompt


BAD = {
    "no fields": (
        {"question": "?"},
        r"has neither the field instruction nor prompt \(fields: question\)",
    ),
    "no answer": ({"instruction": "Go."}, "lacks the field output"),
    "no completion": ({"prompt": "Go."}, "lacks the field completion"),
    "a number": ({"instruction": "Go.", "output": 3}, "has int in the field output"),
    "an input that is a list": (
        {"instruction": "Go.", "input": ["x"], "output": ""},
        "has list in the field input",
    ),
    "nothing asked": ({"instruction": "  ", "output": "x"}, "has an empty instruction"),
    "a string": ("Go.", "is str, not an object"),
}


@pytest.mark.parametrize(("value", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_first_bad_row_is_named(tmp_path: Path, value: object, words: str, suffix: str):
    path = write(tmp_path / f"data{suffix}", [*ALPACA, value, {"also": "bad"}])
    place = "Entry" if suffix == ".json" else "Line"
    with pytest.raises(LLQError, match=rf"{place} 4 of {path} {words}"):
        list(rows.rows_of(str(path)))


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path):
    path = write(tmp_path / "data.parquet", [*ALPACA, {"instruction": "Go.", "output": None}])
    with pytest.raises(LLQError, match=f"Row 4 of {path} lacks the field output"):
        list(rows.rows_of(str(path)))


def test_broken_files_are_named(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", ALPACA)
    path.write_text(path.read_text() + '{"instruction": \n')
    with pytest.raises(LLQError, match=f"Line 4 of {path} is not valid JSON"):
        list(rows.rows_of(str(path)))
    path.write_bytes(path.read_bytes()[:40] + b"\xff\n")
    with pytest.raises(LLQError, match="not UTF-8"):
        list(rows.rows_of(str(path)))
    with pytest.raises(LLQError, match="There is no file"):
        rows.rows_of(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(LLQError, match="give a file that ends in"):
        rows.rows_of(str(tmp_path / "data.csv"))
    with pytest.raises(LLQError, match="could not be read from the Hugging Face Hub"):
        list(rows.rows_of("nobody/nothing"))


def test_a_bad_row_stops_a_run_before_it_trains(tmp_path: Path, tokenizer):
    path = write(tmp_path / "data.jsonl", [*ALPACA, {"prompt": 1}])
    with pytest.raises(LLQError, match="Line 4 of"):
        rows.stored_rows(str(path), rows.Tokens(tokenizer, 50, 50), 1, 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("rows.arrow"))


def test_only_answers_are_targets(tokenizer):
    tokens = rows.Tokens(tokenizer, 8, 4)
    short = tokens(rows.Example("the fox", " ran"))
    answer = [*tokenizer(" ran", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert short["input_ids"][0] == tokenizer.bos_token_id
    assert short["labels"][-len(answer) :] == short["input_ids"][-len(answer) :] == answer
    assert set(short["labels"][: -len(answer)]) == {-100}
    long = tokens(
        rows.Example(
            "the fox ran over the hill to see the river", " every day and every night the king"
        )
    )
    assert len(long["input_ids"]) == 12
    assert long["labels"][:8] == [-100] * 8
    assert long["input_ids"][-1] != tokenizer.eos_token_id  # it was cut: it did not end


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_read_one_at_a_time(tmp_path: Path, suffix: str):
    """The second half of a file may be broken, and memory does not grow with its length."""
    many = [{"prompt": f"{i} " + "x" * 200, "completion": "y" * 200} for i in range(20_000)]
    path = write(tmp_path / f"data{suffix}", many)
    stream = rows.rows_of(str(path))
    next(stream)
    tracemalloc.start()
    count = sum(1 for _ in stream)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 19_999
    assert peak_bytes < 3e6  # of 8 MB of text


def test_streams_and_files_hold_out_other_rows_than_they_train_on(tmp_path: Path, tokenizer):
    path = write(
        tmp_path / "data.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(60)]
    )
    tokens: Callable = rows.Tokens(tokenizer, 50, 50)
    everything = sorted(str(tokens(row)["input_ids"]) for row in rows.rows_of(str(path)))
    stored = rows.stored_rows(str(path), tokens, 5, 0, tmp_path / "cache")
    streamed = rows.streamed_rows(str(path), tokens, 5, 0)
    for train, heldout in (stored, streamed):
        assert len(heldout) == 5
        assert (
            sorted(str(row["input_ids"]) for part in (train, heldout) for row in part) == everything
        )
    with pytest.raises(LLQError, match="60 rows, and 61"):
        rows.streamed_rows(str(path), tokens, 61, 0)


def test_the_demo_asks_about_other_people_when_it_tests():
    train, heldout = list(instructions.rows("train")), list(instructions.rows("heldout"))
    assert list(instructions.rows("train")) == train != list(instructions.rows("train", seed=1))
    assert len(set(train) | set(heldout)) == len(train) + len(heldout) == world.PEOPLE * 9 * 2
    names = [
        {person.name for person in instructions.people(split)} for split in ("train", "heldout")
    ]
    assert not names[0] & names[1]
    assert all(any(name in row.prompt for name in names[1]) for row in islice(heldout, 100))
    with pytest.raises(ValueError, match="unknown split"):
        instructions.people("test")
