"""Token windows: the draws of the GPTQ repository, local files, and what the errors say."""

import json
import random
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration, calibration_ids
from llq_hf.data.evaluation import evaluation_text, evaluation_windows, load_evaluation
from llq_hf.data.readers import read_texts
from llq_hf.data.windows import ids_sha256

VOCAB = 64


class Words:
    """A tokenizer: a BOS, then one id a word (its length)."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text, verbose=True):
        self.calls += 1
        return {"input_ids": [1, *(min(len(word), VOCAB - 1) for word in text.split())]}


def words(count, seed=0):
    rng = random.Random(seed)
    return " ".join("x" * rng.randint(2, 40) for _ in range(count))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def gptq_windows(ids, samples, seqlen, seed):
    """The sampler of the GPTQ repository, on the module's own generator as there."""
    random.seed(seed)
    starts = [random.randint(0, len(ids) - seqlen - 1) for _ in range(samples)]
    return torch.tensor([ids[start : start + seqlen] for start in starts])


def gptq_document_windows(documents, samples, seqlen, seed):
    random.seed(seed)
    windows = []
    for _ in range(samples):
        while True:
            ids = Words()(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) >= seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return torch.tensor(windows)


# --- reading files --------------------------------------------------------------------------------


def test_read_texts_of_every_format(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    texts = ["one\u2028two\n", "", "three"]
    whole = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert read_texts(whole) == ["one\n\ntwo\n"]
    assert read_texts(write(tmp_path / "b.json", texts)) == texts
    assert read_texts(write(tmp_path / "c.json", [{"text": t, "id": 1} for t in texts])) == texts
    lines = "\n".join(
        [json.dumps({"text": texts[0]}, ensure_ascii=False), json.dumps(texts[1]), "", '"three"']
    )
    assert read_texts(write(tmp_path / "d.jsonl", lines)) == texts
    pa.parquet.write_table(pa.table({"text": texts, "title": texts[::-1]}), tmp_path / "e.parquet")
    assert read_texts(tmp_path / "e.parquet") == texts
    pa.parquet.write_table(pa.table({"n": [1, 2, 3], "body": texts}), tmp_path / "f.parquet")
    assert read_texts(tmp_path / "f.parquet") == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "holds no text"),
        ("a.json", "", "is empty"),
        ("a.json", '["a",\n"b"\n"c"]', "line 3"),
        ("a.json", '{"text": "a"}', "dict, not a list"),
        ("a.json", '[{"content": "a", "id": 1}]', r"Entry 0 .*\(fields: content, id\)"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "Line 2"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}', r"Line 3 .*\(fields: body\)"),
        ("a.jsonl", "12", "Line 1 .* is int"),
        ("a.csv", "a,b", r"ends in \.txt, \.json, \.jsonl or \.parquet"),
        ("a.parquet", "not parquet", "readable parquet"),
    ],
)
def test_read_texts_names_the_fault(tmp_path, name, content, message):
    with pytest.raises(LLQError, match=message):
        read_texts(write(tmp_path / name, content))


def test_read_texts_of_paths_that_are_no_text_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    with pytest.raises(LLQError, match=r"no file .*missing\.txt"):
        read_texts(tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(LLQError, match="is a folder"):
        read_texts(tmp_path / "folder.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(LLQError, match="not UTF-8"):
        read_texts(tmp_path / "latin.txt")
    pa.parquet.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "two.parquet")
    with pytest.raises(LLQError, match="columns: a, b"):
        read_texts(tmp_path / "two.parquet")


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2404])
def test_text_windows_are_those_of_gptq(tmp_path, seed):
    documents = [words(100, 1), words(80, 2)]
    path = write(tmp_path / "c.json", documents)
    tokenizer = Words()
    got = calibration_ids(str(path), tokenizer, samples=9, seqlen=12, seed=seed, vocab_size=VOCAB)
    assert tokenizer.calls == 1  # the whole text at once: one BOS
    assert got.dtype == torch.int64
    assert torch.equal(got, gptq_windows(Words()("\n\n".join(documents))["input_ids"], 9, 12, seed))


@pytest.mark.parametrize("seed", [0, 3])
def test_c4_windows_are_those_of_gptq(monkeypatch, seed):
    documents = [words(count, count) for count in (5, 60, 12, 33, 8, 50)]
    monkeypatch.setattr("llq_hf.data.calibration.c4", lambda split, cure: documents)
    got = calibration_ids("c4", Words(), samples=20, seqlen=12, seed=seed)
    assert torch.equal(got, gptq_document_windows(documents, 20, 12, seed))


def test_a_document_of_exactly_seqlen_is_passed_over(monkeypatch):
    exact, longer = words(11), words(12)
    monkeypatch.setattr("llq_hf.data.calibration.c4", lambda split, cure: [exact, longer])
    got = calibration_ids("c4", Words(), samples=4, seqlen=12)
    assert torch.equal(got, torch.tensor([Words()(longer)["input_ids"][:12]] * 4))
    monkeypatch.setattr("llq_hf.data.calibration.c4", lambda split, cure: [exact])
    with pytest.raises(LLQError, match=r"more than 12 tokens .* among 1 drawn .*longest has 12"):
        calibration_ids("c4", Words(), samples=4, seqlen=12)


def test_named_sources_join_as_gptq_does(monkeypatch):
    sentences = [words(30, seed) for seed in range(4)]
    for name, joint in (("wikitext2", "\n\n"), ("ptb", " ")):
        monkeypatch.setattr(
            f"llq_hf.data.calibration.{name}",
            lambda split, cure: sentences if split == "train" else [],
        )
        seen = []

        def tokenizer(text, verbose=True, seen=seen):
            seen.append(text)
            return Words()(text)

        got = calibration_ids(name, tokenizer, samples=3, seqlen=10, seed=5)
        assert seen == [joint.join(sentences)]
        assert torch.equal(got, gptq_windows(Words()(seen[0])["input_ids"], 3, 10, 5))


def test_demo_source(monkeypatch):
    world = types.ModuleType("llq_hf.demo.world")
    world.calibration_text = lambda: words(50)
    monkeypatch.setitem(sys.modules, "llq_hf.demo.world", world)
    monkeypatch.setattr("llq_hf.demo.world", world, raising=False)
    assert torch.equal(
        calibration_ids("demo", Words(), samples=2, seqlen=8),
        gptq_windows(Words()(words(50))["input_ids"], 2, 8, 0),
    )


def test_stored_ids_are_used_as_they_are(tmp_path):
    ids = np.arange(40, dtype=np.uint16).reshape(4, 10)
    np.save(tmp_path / "ids.npy", ids)
    source = str(tmp_path / "ids.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = calibration_ids(source, None, samples=3, seqlen=6)
        assert torch.equal(got, torch.arange(40).view(4, 10)[:3, :6])
        assert calibration_ids(source, None, samples=4, seqlen=2048).shape == (4, 10)
    with pytest.warns(UserWarning, match=r"4 windows, fewer than samples=128"):
        assert calibration_ids(source, None, seqlen=10).shape == (4, 10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3)), "float64, not integers"),
        (np.zeros(3, dtype=np.int64), r"shape \[3\]"),
        (np.zeros((0, 3), dtype=np.int64), r"shape \[0, 3\]"),
        (np.array([[1, -2]]), "token id -2"),
        (np.array([[1, 64]]), "token id 64, outside the model's vocabulary of 64"),
    ],
)
def test_unusable_stored_ids(tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(LLQError, match=message):
        calibration_ids(str(tmp_path / "ids.npy"), None, samples=1, vocab_size=VOCAB)


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(LLQError, match=r"readable \.npy"):
        calibration_ids(str(tmp_path / "ids.npy"), None)


def test_too_few_tokens_says_how_many(tmp_path):
    path = write(tmp_path / "a.txt", words(19))
    with pytest.raises(
        LLQError, match=r"has 20 tokens, and a random window of 20 needs at least 21"
    ):
        calibration_ids(str(path), Words(), samples=1, seqlen=20)
    assert calibration_ids(str(path), Words(), samples=2, seqlen=19).shape == (2, 19)


def test_unknown_sources(tmp_path):
    with pytest.raises(LLQError, match=r"did you mean 'wikitext2'.*wikitext2, c4, ptb, demo"):
        calibration_ids("wikitext-2", Words())
    with pytest.raises(LLQError, match=r"no file .*lost\.jsonl"):
        calibration_ids(str(tmp_path / "lost.jsonl"), Words())
    with pytest.raises(LLQError, match="tokenizer"):
        calibration_ids(str(write(tmp_path / "a.txt", "a b")), None)


def test_hub_failure_says_how_to_go_on(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for source in ("wikitext2", "c4", "ptb"):
        with pytest.raises(LLQError, match=r"ConnectionError: no route\); pass calibration=FILE"):
            calibration_ids(source, Words())
    for name in ("wikitext2", "c4", "c4_new", "ptb", "ptb_new"):
        with pytest.raises(LLQError, match=re.escape('--metadata \'{"text_file"')):
            load_evaluation(name)


def test_hub_addresses(monkeypatch):
    import datasets

    asked = []

    def load(repository, config=None, *, split, **options):
        asked.append((repository, config, split, options))
        return {"text": [words(30)], "sentence": [words(30)]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("wikitext2", "c4", "ptb"):
        calibration_ids(source, Words(), samples=1, seqlen=8)
    for name in ("wikitext2", "c4", "c4_new", "ptb", "ptb_new"):
        load_evaluation(name)
    shard = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
    wikitext, c4, ptb = "Salesforce/wikitext", "allenai/c4", "ptb-text-only/ptb_text_only"
    parquet = {"revision": "refs/convert/parquet"}
    assert asked == [
        (wikitext, "wikitext-2-raw-v1", "train", {}),
        (c4, None, "train", {"data_files": {"train": shard["train"]}}),
        (ptb, None, "train", parquet),
        (wikitext, "wikitext-2-raw-v1", "test", {}),
        (c4, None, "validation", {"data_files": {"validation": shard["validation"]}}),
        (c4, None, "validation", {"data_files": {"validation": shard["validation"]}}),
        (ptb, None, "validation", parquet),
        (ptb, None, "test", parquet),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("seqlen", -3),
        ("samples", 1.5),
        ("seed", -1),
        ("seed", True),
        ("source", ""),
    ],
)
def test_calibration_is_validated_where_it_is_built(field, value):
    named = "calibration" if field == "source" else f"calibration_{field}"
    with pytest.raises(LLQError, match=re.escape(f"{named}={value!r}")):
        Calibration(**{field: value})


def test_calibration_draws_with_its_own_fields(tmp_path):
    path = str(write(tmp_path / "a.txt", words(90)))
    calibration = Calibration(path, samples=5, seqlen=7, seed=2)
    expected = calibration_ids(path, Words(), samples=5, seqlen=7, seed=2)
    assert torch.equal(calibration.ids(Words(), VOCAB), expected)
    assert Calibration() == Calibration("wikitext2", 128, 2048, 0)


def test_sha256_knows_values_and_shape():
    ids = torch.arange(12).view(3, 4)
    assert ids_sha256(ids) == ids_sha256(ids.int()) == ids_sha256(ids.t().contiguous().t())
    assert len({ids_sha256(ids), ids_sha256(ids.view(4, 3)), ids_sha256(ids + 1)}) == 3


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_joins_by_name(tmp_path):
    path = write(tmp_path / "a.json", ["a b", "", "c"])
    assert evaluation_text("wikitext2", path) == evaluation_text("ptb", path) == "a b\n\n\n\nc"
    assert evaluation_text("ptb_new", path) == evaluation_text("c4_new", path) == "a b  c"
    with pytest.raises(LLQError, match="call windows"):
        evaluation_text("c4", path)
    with pytest.raises(LLQError, match="did you mean 'c4_new'"):
        evaluation_text("c4new", path)


def test_lines_of_a_treebank_file_are_sentences(tmp_path):
    path = write(tmp_path / "ptb.txt", " no it was \n but while \n\n")
    assert evaluation_text("ptb", path) == "no it was\n\nbut while"
    assert evaluation_text("ptb_new", path) == "no it was but while"


def test_windows_are_disjoint_and_the_rest_is_dropped(tmp_path):
    text = words(99)
    path = write(tmp_path / "a.txt", text)
    expected = torch.tensor(Words()(text)["input_ids"][:96]).view(8, 12)
    assert torch.equal(evaluation_windows("wikitext2", Words(), 12, path), expected)
    with pytest.raises(LLQError, match=r"has 100 tokens, fewer than one window of 101"):
        evaluation_windows("wikitext2", Words(), 101, path)


def test_c4_variants(tmp_path):
    documents = [words(5 + index % 40, index) for index in range(1200)]
    documents = [
        text for text in documents if len(text.split()) + 1 != 8
    ]  # GPTQ's own sampler fails on these
    path = write(tmp_path / "c4.jsonl", "\n".join(json.dumps({"text": text}) for text in documents))
    assert torch.equal(
        evaluation_windows("c4", Words(), 8, path), gptq_document_windows(documents, 256, 8, 0)
    )
    ids = Words()(" ".join(documents[:1100]))["input_ids"][: 256 * 8]
    assert torch.equal(
        evaluation_windows("c4_new", Words(), 8, path), torch.tensor(ids).view(256, 8)
    )


def test_stored_windows_for_evaluation(tmp_path):
    np.save(tmp_path / "e.npy", np.arange(20, dtype=np.int32).reshape(2, 10))
    assert torch.equal(
        evaluation_windows("wikitext2", None, 8, tmp_path / "e.npy"),
        torch.arange(20).view(2, 10)[:, :8],
    )


def test_texts_are_told_apart(tmp_path):
    one, two = write(tmp_path / "a.txt", "a b"), write(tmp_path / "b.txt", "a c")
    digests = {
        load_evaluation("ptb", one).sha256,
        load_evaluation("ptb", two).sha256,
        load_evaluation("c4", one).sha256,
    }
    assert len(digests) == 3
    assert str(Path(one)) in str(load_evaluation("ptb", one))
