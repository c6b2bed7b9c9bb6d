"""The lm-eval tasks: perplexity against a direct loop, prompts against lm-eval's own tasks, and
local data.
"""

import csv
import json
import logging
import math
import os
import random
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from llq_hf.common.errors import LLQError  # noqa: E402
from llq_hf.data.evaluation import EVALUATION_TEXTS, evaluation_windows, load_evaluation  # noqa: E402
from llq_hf.hosts import lm_eval_choice, lm_eval_perplexity  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
YAMLS = ROOT / "tasks" / "lm_eval"
BUILT_IN = Path(lm_eval.__file__).parent / "tasks"
SHARED = Path(os.environ.get("LLQ_SHARED", ROOT.parent / "shared"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs the shared data at {SHARED} (set LLQ_SHARED)"
)

LETTERS = "abcdefghijklmnopqrstuvwxyzABCD0123456789 .,:?'_\n"


@pytest.fixture(scope="module")
def lm():
    """A random LLaMA of two layers that takes 64 tokens; its tokenizer has one id a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        letter: 3 + index for index, letter in enumerate(LETTERS)
    }
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    # The start-up hook adds it where the project is installed.
    if not hasattr(HFLM, "llq_windows_nll"):
        HFLM.llq_windows_nll = lm_eval_perplexity.windows_nll
    return HFLM(
        pretrained=LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu", batch_size=3
    )


def manager(**metadata):
    return TaskManager(include_path=str(YAMLS), include_defaults=False, metadata=metadata)


def evaluate(lm, name, log_samples=False, limit=None, **metadata):
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=manager(**metadata),
        bootstrap_iters=0,
        log_samples=log_samples,
        limit=limit,
    )


def task(name, **metadata):
    return manager(**metadata).load([name])["tasks"][name]


def gptq_perplexity(lm, ids, seqlen):
    """The evaluation loop of the GPTQ repository."""
    ids = torch.tensor([ids])
    samples = ids.numel() // seqlen
    nlls = []
    for index in range(samples):
        window = ids[:, index * seqlen : (index + 1) * seqlen]
        with torch.no_grad():
            logits = lm.model(window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
        nlls.append(loss * seqlen)
    return torch.exp(torch.stack(nlls).sum() / (samples * seqlen)).item()


def letters(count, seed=0):
    return "".join(random.Random(seed).choices(LETTERS, k=count))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value, encoding="utf-8")
    return str(path)


def write_lines(path, rows):
    return write(path, "\n".join(json.dumps(row) for row in rows) + "\n")


# --- perplexity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "seqlen"), [(700, 32), (100, 32), (32, 33)]
)  # more, fewer windows than shards, one
def test_perplexity_is_that_of_the_gptq_loop(lm, tmp_path, length, seqlen):
    text = letters(length)
    file = write(tmp_path / "a.txt", text)
    results = evaluate(
        lm, "llq_wikitext2", text_file=file, seqlen=seqlen, method="rtn", unknown=[1]
    )
    expected = gptq_perplexity(lm, lm.tokenizer(text)["input_ids"], seqlen)
    assert results["results"]["llq_wikitext2"]["token_perplexity,none"] == pytest.approx(
        expected, rel=1e-5
    )
    metadata = results["configs"]["llq_wikitext2"]["metadata"]
    assert (metadata["seqlen"], metadata["text_source"], metadata["unknown"]) == (seqlen, file, [1])
    assert metadata["text_sha256"] == load_evaluation("wikitext2", file).sha256
    assert results["higher_is_better"]["llq_wikitext2"] == {"token_perplexity": False}


def requests_of(name, **metadata):
    ours = task(name, **metadata)
    ours.build_all_requests()
    return ours.instances


@pytest.mark.parametrize("batch_size", [1, 64, "auto"])
def test_batches_and_ranks_do_not_change_the_sums(lm, tmp_path, monkeypatch, batch_size):
    requests = requests_of(
        "llq_wikitext2", text_file=write(tmp_path / "a.txt", letters(900)), seqlen=24
    )
    whole = lm.llq_windows_nll(requests)
    monkeypatch.setattr(lm, "batch_size_per_gpu", batch_size)
    ranks = [
        lm.llq_windows_nll([*requests[rank::3], requests[rank]]) for rank in range(3)
    ]  # padded as lm-eval does
    halves = [pair for rank in ranks for pair in rank[:-1]]
    assert (
        sum(tokens for _, tokens, _ in halves) == sum(tokens for _, tokens, _ in whole) == 37 * 23
    )
    assert math.fsum(p for p, _, _ in halves) == pytest.approx(
        math.fsum(p for p, _, _ in whole), rel=1e-5
    )
    assert all(rank[-1] == rank[0] for rank in ranks)


@pytest.mark.parametrize(
    ("windows", "count"), [(1, 1), (5, 5), (99, 37), ({"wikitext2": 3}, 3), ({"ptb": 3}, 37)]
)
def test_only_the_first_windows(lm, tmp_path, windows, count):
    text = letters(900)
    file = write(tmp_path / "a.txt", text)
    results = evaluate(lm, "llq_wikitext2", text_file=file, seqlen=24, windows=windows)
    ids = lm.tokenizer(text)["input_ids"][: count * 24]
    assert results["results"]["llq_wikitext2"]["token_perplexity,none"] == pytest.approx(
        gptq_perplexity(lm, ids, 24), rel=1e-5
    )


def test_several_texts_in_one_call(lm, tmp_path):
    files = {
        "ptb": write(tmp_path / "a.txt", letters(300)),
        "ptb_new": write(tmp_path / "b.txt", letters(400, 1)),
    }
    first = requests_of("llq_ptb", text_file=files, seqlen=24)
    second = requests_of("llq_ptb_new", text_file=files, seqlen=32)
    assert lm.llq_windows_nll(first + second) == lm.llq_windows_nll(first) + lm.llq_windows_nll(
        second
    )


def test_c4_scores_random_windows(lm, tmp_path):
    documents = [letters(20 + 5 * index, index) for index in range(12)]
    file = write_lines(tmp_path / "c4.jsonl", [{"text": text} for text in documents])
    results = evaluate(lm, "llq_c4", text_file=file, seqlen=24)["results"]["llq_c4"]
    windows = evaluation_windows("c4", lm.tokenizer, 24, file)
    assert windows.shape == (256, 24)
    expected = gptq_perplexity(lm, windows.flatten().tolist(), 24)
    assert results["token_perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_a_short_model_shortens_the_windows_and_says_so(lm, tmp_path, caplog):
    text = letters(300)
    with caplog.at_level(logging.WARNING, logger="llq_hf"):
        results = evaluate(lm, "llq_wikitext2", text_file=write(tmp_path / "a.txt", text))
    assert "at most 64 tokens" in caplog.text
    assert "not 2048" in caplog.text
    expected = gptq_perplexity(lm, lm.tokenizer(text)["input_ids"], 64)
    assert results["results"]["llq_wikitext2"]["token_perplexity,none"] == pytest.approx(
        expected, rel=1e-5
    )
    assert results["configs"]["llq_wikitext2"]["metadata"]["seqlen"] == 64


def test_a_text_shorter_than_a_window_is_refused(lm, tmp_path):
    file = write(tmp_path / "a.txt", letters(30))
    with pytest.raises(LLQError, match="31 tokens, fewer than one window of 32"):
        evaluate(lm, "llq_wikitext2", text_file=file, seqlen=32)


def test_foreign_ids_are_refused(lm, tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", letters(100))
    monkeypatch.setattr(lm.config, "vocab_size", 20)
    with pytest.raises(LLQError, match="outside the model's vocabulary of 20"):
        evaluate(lm, "llq_wikitext2", text_file=file, seqlen=32)


def test_nothing_scored_is_no_perplexity():
    with pytest.raises(LLQError, match="No window was scored"):
        lm_eval_perplexity.token_perplexity([(0.0, 0)])
    assert lm_eval_perplexity.token_perplexity([(-3.0, 2), (0.0, 0), (-1.0, 2)]) == pytest.approx(
        math.e
    )
    assert lm_eval_perplexity.token_perplexity([(-1e6, 1)]) == math.inf
    assert math.isnan(lm_eval_perplexity.token_perplexity([(math.nan, 1)]))


def test_a_rank_without_windows(lm, tmp_path):
    requests = requests_of(
        "llq_wikitext2", text_file=write(tmp_path / "a.txt", letters(100)), seqlen=32
    )
    assert lm.llq_windows_nll(requests[5:7]) == [(0.0, 0, 32), (0.0, 0, 32)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"seqlen": "long"}, "seqlen='long'"),
        ({"seqlen": 1}, "seqlen=1 "),
        ({"windows": 0}, "windows=0 "),
        ({"windows": True}, "windows=True "),
        ({"windows": {"wiki": 3}}, "names the text 'wiki'"),
        ({"windows": {"wikitext2": 0.5}}, "windows=0.5 "),
        ({"text_file": 3}, "text_file=3 "),
        ({"text_file": {"wiki": "a.txt"}}, "names the text 'wiki'"),
        ({"text_file": "lost.txt"}, "no file lost"),
    ],
)
def test_unusable_metadata(metadata, message):
    with pytest.raises(LLQError, match=message):
        task("llq_wikitext2", **metadata)


def test_sample_logs_hold_no_text(lm, tmp_path):
    text = letters(500)
    results = evaluate(
        lm, "llq_ptb_new", log_samples=True, text_file=write(tmp_path / "a.txt", text), seqlen=32
    )
    samples = results["samples"]["llq_ptb_new"]
    assert len(samples) == lm_eval_perplexity.SHARDS
    logged = json.dumps(samples, default=str)
    assert text[:20] not in logged
    assert len(logged) < 30_000


def test_the_request_cache_never_brings_back_another_text(lm, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    for seed in range(2):
        file = write(tmp_path / f"{seed}.txt", letters(200, seed))
        ours = task("llq_ptb", text_file=file, seqlen=32)
        ours.build_all_requests(cache_requests=True)
        assert ours.instances[0].doc["source"].source == file
    for rows in (HUB_ROWS["piqa"], HUB_ROWS["piqa"][1:]):
        write_lines(tmp_path / "piqa.jsonl", rows)
        ours = task("llq_piqa", folder=str(tmp_path))
        ours.build_all_requests(cache_requests=True)
        assert len(ours.instances) == 2 * len(rows)


# --- multiple choice ------------------------------------------------------------------------------

HUB_ROWS = {
    "piqa": [
        {"goal": "open a jar", "sol1": "twist it", "sol2": "burn it {{x}}", "label": 0},
        {"goal": "cut  bread", "sol1": "with soup ", "sol2": "with a knife", "label": 1},
    ],
    "arc_easy": [
        {
            "question": "What is hot?",
            "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        {
            "question": "Who barks",
            "choices": {"text": ["dog", "it's"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ],
    "hellaswag": [
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he THEN",
            "endings": ["falls [x]  off", "b [title] c"],
            "label": "1",
        },
        {
            "activity_label": "Tea",
            "ctx_a": "[header] How to brew [title] Boil.",
            "ctx_b": "",
            "endings": [" stir", "pour"],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "Ann met Bo so _ was glad.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {
            "sentence": "The cup hit the jug, and the _ broke .",
            "option1": "cup",
            "option2": "jug",
            "answer": "1",
        },
    ],
}
HUB_ROWS["arc_challenge"] = HUB_ROWS["arc_easy"]
BUILT_IN_YAML = {
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}


def mmlu_rows(count, seed):
    rng = random.Random(seed)
    return [
        {
            "question": f" Is {index}, or {rng.randint(0, 9)}?\nSay. ",
            "subject": "high_school_physics",
            "choices": [f"{letter}, {rng.randint(0, 99)}" for letter in "wxyz"],
            "answer": rng.randint(0, 3),
        }
        for index in range(count)
    ]


def built_in(yaml, splits, tmp_path, **more):
    """lm-eval's own task, its data replaced by the rows given for each split."""
    config = {
        key: value
        for key, value in load_yaml(BUILT_IN / yaml).items()
        if key not in ("tag", "dataset_name")
    }
    files = {
        split: write_lines(tmp_path / "built_in" / f"{split}.jsonl", rows)
        for split, rows in splits.items()
    }
    kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    return ConfigurableTask(
        config={**config, "dataset_path": "json", "dataset_kwargs": kwargs, **more}
    )


def prompts(ours):
    ours.set_fewshot_seed(1234)
    ours.build_all_requests()
    return [(instance.doc_id, instance.idx, instance.arguments) for instance in ours.instances]


def scores(ours):
    """Metrics of every document for invented log-likelihoods."""
    rng = random.Random(0)
    by_doc = {}
    for instance in ours.instances:
        by_doc.setdefault(instance.doc_id, []).append((-10 * rng.random(), False))
    return [ours.process_results(doc, by_doc[index]) for index, doc in ours.doc_iterator()]


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_prompts_and_scores_are_those_of_lm_eval(name, tmp_path):
    rows = HUB_ROWS[name]
    write_lines(tmp_path / f"{name}.jsonl", rows)
    ours = task(f"llq_{name}", folder=str(tmp_path), pretrained="x")
    theirs = built_in(
        BUILT_IN_YAML[name], dict.fromkeys(("train", "validation", "test"), rows), tmp_path
    )
    assert prompts(ours) == prompts(theirs)
    assert scores(ours) == scores(theirs)
    assert ours.aggregation() == theirs.aggregation()
    assert ours.config.num_fewshot == 0


def test_mmlu_prompts_are_those_of_lm_eval(tmp_path):
    splits = {"dev": mmlu_rows(5, 0), "test": mmlu_rows(3, 1)}
    for split, rows in splits.items():
        path = tmp_path / "mmlu" / split / f"high_school_physics_{split}.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in rows
            )
    ours = task("llq_mmlu_high_school_physics", folder=str(tmp_path))
    theirs = built_in("mmlu/default/mmlu_high_school_physics.yaml", splits, tmp_path, num_fewshot=5)
    got = prompts(ours)
    assert got == prompts(theirs)
    assert got[0][2][0].startswith(
        "The following are multiple choice questions (with answers) about high school"
        " physics.\n\nIs"
    )
    assert got[0][2][0].count("Answer:") == 6
    assert scores(ours) == scores(theirs)


def test_every_local_layout_gives_the_hub_prompts(tmp_path):
    hub, cut = tmp_path / "hub", tmp_path / "cut"
    for name, rows in HUB_ROWS.items():
        write_lines(hub / f"{name}.jsonl", rows)
    arc = [
        {"query": "Question: What is hot?", "choices": ["ice", "fire"], "gold": 1},
        {"query": "Question: Who barks", "choices": ["dog", "it's"], "gold": 0},
    ]
    write_lines(cut / "arc" / "arc_easy.jsonl", arc)
    write_lines(cut / "arc" / "arc_challenge.jsonl", arc)
    piqa = [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in HUB_ROWS["piqa"]]
    write_lines(cut / "piqa" / "valid.jsonl", piqa)
    write(cut / "piqa" / "valid-labels.lst", "0\n1\n")
    winogrande = [
        {
            "context_options": ["Ann met Bo so Ann", "Ann met Bo so Bo"],
            "continuation": "was glad.",
            "gold": 1,
        },
        {
            "context_options": [
                "The cup hit the jug, and the cup",
                "The cup hit the jug, and the jug",
            ],
            "continuation": "broke .",
            "gold": 0,
        },
    ]
    write_lines(cut / "winogrande" / "partial_context.jsonl", winogrande)
    hellaswag = [
        {"ctx": "Roof: A man sits. He then", "endings": ["falls  off", "b. c"], "label": 1},
        {"ctx": "Tea: How to brew. Boil. ", "endings": ["stir", "pour"], "label": 0},
    ]
    write_lines(cut / "hellaswag_val_full.jsonl", hellaswag)
    for name in HUB_ROWS:
        ours = [task(f"llq_{name}", folder=str(folder)) for folder in (hub, cut)]
        # The cut file is preprocessed by others: only the shape can be compared
        if name == "hellaswag":
            assert [len(t.eval_docs) for t in ours] == [2, 2]
            assert ours[1].eval_docs[0]["query"] == ours[0].eval_docs[0]["query"]
        else:
            assert prompts(ours[0]) == prompts(ours[1])
            assert scores(ours[0]) == scores(ours[1])


def test_parquet_and_hub_rows_read_alike(tmp_path, monkeypatch):
    import datasets

    asked = []

    def hub_rows(repository, config=None, *, split, offline_cure):
        asked.append((repository, config, split))
        name = {
            "ARC-Easy": "arc_easy",
            "ARC-Challenge": "arc_challenge",
            "winogrande_xl": "winogrande",
        }.get(config, repository.rsplit("/", 1)[-1])
        return datasets.Dataset.from_list(
            mmlu_rows(6, 2) if "mmlu" in repository else HUB_ROWS[name]
        )

    monkeypatch.setattr("llq_hf.hosts.lm_eval_choice.hub_rows", hub_rows)
    for name, rows in HUB_ROWS.items():
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
        assert prompts(task(f"llq_{name}", folder=str(tmp_path))) == prompts(task(f"llq_{name}"))
    assert task("llq_mmlu_anatomy").eval_docs[0]["subject"] == "anatomy"
    assert asked == [
        ("baber/piqa", None, "validation"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("Rowan/hellaswag", None, "validation"),
        ("allenai/winogrande", "winogrande_xl", "validation"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("cais/mmlu", "anatomy", "test"),
        ("cais/mmlu", "anatomy", "dev"),
    ]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(LLQError, match=r"no folder .*lost"):
        task("llq_piqa", folder=str(tmp_path / "lost"))
    with pytest.raises(LLQError, match=r"folder=7 "):
        task("llq_piqa", folder=7)
    for name, path in (
        ("llq_arc_easy", "arc/arc_easy.jsonl"),
        ("llq_hellaswag", "hellaswag_val_full.jsonl"),
        ("llq_mmlu_virology", "mmlu/test/virology_test.csv"),
    ):
        with pytest.raises(LLQError, match=f"no file {tmp_path}/{path}"):
            task(name, folder=str(tmp_path))
    write_lines(tmp_path / "piqa" / "valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}])
    with pytest.raises(LLQError, match=r"no file .*piqa/valid-labels\.lst"):
        task("llq_piqa", folder=str(tmp_path))
    write(tmp_path / "piqa" / "valid-labels.lst", "0\n1\n")
    with pytest.raises(LLQError, match="2 labels for 1 questions"):
        task("llq_piqa", folder=str(tmp_path))
    write_lines(tmp_path / "arc" / "arc_easy.jsonl", [{"text": "x"}])
    with pytest.raises(
        LLQError, match=r"Row 1 .*fields text; it needs \(question, choices, answerKey\) or"
    ):
        task("llq_arc_easy", folder=str(tmp_path))
    write_lines(tmp_path / "winogrande.jsonl", [HUB_ROWS["winogrande"][0] | {"answer": ""}])
    with pytest.raises(LLQError, match=r"Row 1 .*cannot be read \(ValueError"):
        task("llq_winogrande", folder=str(tmp_path))


# --- groups ---------------------------------------------------------------------------------------


def test_mmlu_has_the_subjects_and_categories_of_lm_eval():
    index = manager()
    for category in ("stem", "humanities", "social_sciences", "other"):
        theirs = {
            config["dataset_name"]
            for path in (BUILT_IN / "mmlu" / "default").glob("mmlu_*.yaml")
            if (config := load_yaml(path, resolve_func=False))["tag"] == f"mmlu_{category}_tasks"
        }
        ours = index.task_index[f"llq_mmlu_{category}_tasks"].tags
        assert ours == {f"llq_mmlu_{subject}" for subject in theirs}
        for name in ours:
            assert index.task_index[name].cfg["dataset_name"] == name.removeprefix("llq_mmlu_")
    assert (
        sum(
            name.startswith("llq_mmlu_") and "class" in entry.cfg
            for name, entry in index.task_index.items()
            if entry.cfg
        )
        == 57
    )


def test_study_holds_every_task(tmp_path, monkeypatch):
    rows = {"mmlu": mmlu_rows(6, 0), **HUB_ROWS}
    monkeypatch.setattr(
        lm_eval_choice,
        "_local_docs",
        lambda name, folder, split, subject: lm_eval_choice._converted(
            rows[name], name, subject, "x"
        ),
    )
    file = write(tmp_path / "a.txt", letters(100))
    loaded = manager(folder=str(tmp_path), text_file=file).load(["llq_study"])
    names = set(loaded["tasks"])
    texts = {f"llq_{text}" for text in EVALUATION_TEXTS if text != "demo"}
    assert {name for name in names if not name.startswith("llq_mmlu_")} == texts | {
        f"llq_{name}" for name in HUB_ROWS
    }
    assert len(names) == 10 + 57


def test_csqa_average_counts_tasks_and_not_questions(lm, tmp_path):
    for name, rows in HUB_ROWS.items():
        write_lines(tmp_path / f"{name}.jsonl", rows if name != "piqa" else rows[:1])
    lm_results = evaluate(lm, "llq_csqa", folder=str(tmp_path))["results"]
    accuracies = [lm_results[f"llq_{name}"]["acc,none"] for name in HUB_ROWS]
    assert lm_results["llq_csqa"]["acc,none"] == pytest.approx(sum(accuracies) / 5)
    assert "acc_norm,none" in lm_results["llq_piqa"]
    assert "acc_norm,none" not in lm_results["llq_winogrande"]


def test_demo_needs_nothing_but_the_package(lm, monkeypatch):
    world = pytest.importorskip("llq_hf.demo.world", reason="needs llq_hf.demo.world")
    monkeypatch.setattr(world, "heldout_text", lambda: letters(2000))
    monkeypatch.setattr(lm, "_max_length", 256)
    results = evaluate(lm, "llq_demo", limit=20, text_file="lost.txt", folder="lost")
    ppl = gptq_perplexity(lm, lm.tokenizer(letters(2000))["input_ids"], 256)
    assert results["results"]["llq_demo_ppl"]["token_perplexity,none"] == pytest.approx(
        ppl, rel=1e-5
    )
    assert 0 <= results["results"]["llq_demo_mc"]["acc,none"] <= 1
    query, choices, gold = world.questions(400, seed=0)[7]
    mc = task("llq_demo_mc")
    mc.build_all_requests()
    assert len(mc.eval_docs) == 400
    asked = [instance.arguments for instance in mc.instances if instance.doc_id == 7]
    assert asked == [(query, f" {choice.strip()}") for choice in choices]
    assert mc.doc_to_target(mc.eval_docs[7]) == gold


# --- the shared data ------------------------------------------------------------------------------


@needs_shared
def test_shared_questions_are_read_whole():
    folder = str(SHARED / "data" / "multiple_choice")
    sizes = {
        "piqa": 1838,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "hellaswag": 10042,
        "winogrande": 1267,
    }
    for name, size in sizes.items():
        docs = task(f"llq_{name}", folder=folder).eval_docs
        assert len(docs) == size
    assert len(task("llq_mmlu_anatomy", folder=folder).eval_docs) == 135


@needs_shared
def test_golden_perplexity_of_the_shared_model():
    """The reference figure was measured with the official GPTQ code on these 200 windows."""
    if not hasattr(HFLM, "llq_windows_nll"):
        HFLM.llq_windows_nll = lm_eval_perplexity.windows_nll
    model = HFLM(pretrained=str(SHARED / "models" / "stories260K"), device="cpu", batch_size=20)
    ids = str(SHARED / "golden" / "eval_ids_260k.npy")
    results = evaluate(model, "llq_wikitext2", text_file=ids, seqlen=256)["results"][
        "llq_wikitext2"
    ]
    assert results["token_perplexity,none"] == pytest.approx(3.657022714614868, rel=1e-5)
