"""The tasks of divergence: against a literal loop, against themselves, and which model is taken for
full precision.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from conftest import TEXT
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf import Calibration, LLQError, build
from llq_hf.checkpoints.packed import named_base
from llq_hf.demo import MODELS
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.lm_eval_divergence import windows_kl
from llq_hf.hosts.lm_eval_model import LLQLM
from llq_hf.hosts.loading import load_model
from llq_hf.numerics.divergence import FIGURES, Divergence
from llq_hf.study.divergence import measure_divergence

YAMLS = Path(__file__).resolve().parents[2] / "tasks" / "lm_eval"
SEQLEN = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT * 12)  # more windows than shards
    return str(path)


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "rtn"
    quantize_checkpoint(str(tiny_llama), out, build("rtn", bits=3, group_size=32), Calibration())
    return out


def evaluate(lm: Any, text: str, name: str = "llq_kl", **options: Any) -> dict[str, Any]:
    log = options.pop("log_samples", False)
    metadata = {"text_file": text, "seqlen": SEQLEN, **options}
    tasks = TaskManager(include_path=str(YAMLS), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(
        model=lm, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=log
    )


def figures(lm: Any, text: str, **options: Any) -> dict[str, float]:
    results = evaluate(lm, text, **options)["results"]["llq_kl"]
    return {name: results[f"{name},none"] for name in FIGURES}


def windows_of(model: Path, text: str) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text())["input_ids"]
    count = len(ids) // SEQLEN
    return torch.tensor(ids[: count * SEQLEN]).view(count, SEQLEN)


def literal(model: Path, base: Path, text: str) -> dict[str, float]:
    """Token by token, in Python's floats."""
    q, p = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (model, base))
    nats, same = [], []
    for ids_S in windows_of(base, text):
        with torch.no_grad():
            q_SV, p_SV = (m(ids_S[None]).logits[0].double().softmax(-1).tolist() for m in (q, p))
        for p_V, q_V in zip(p_SV, q_SV, strict=True):
            nats.append(sum(a * math.log(a / b) for a, b in zip(p_V, q_V, strict=True)))
            same.append(p_V.index(max(p_V)) == q_V.index(max(q_V)))
    place = 0.99 * (len(nats) - 1)
    below, above = (sorted(nats)[round_(place)] for round_ in (math.floor, math.ceil))
    return {
        "kl": sum(nats) / len(nats),
        "kl_median": statistics.median(nats),
        "kl_p99": below + (place % 1) * (above - below),
        "kl_max": max(nats),
        "top1_agreement": sum(same) / len(same),
    }


def test_it_is_the_literal_loop(tiny_llama: Path, packed: Path, text: str) -> None:
    lm = LLQLM(pretrained=str(packed), base=str(tiny_llama), device="cpu", batch_size=5)
    found, wanted = figures(lm, text), literal(packed, tiny_llama, text)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert 0 < found["kl_median"] < found["kl_p99"] < found["kl_max"]
    assert 0 < found["top1_agreement"] < 1
    model, base = (load_model(str(each), "cpu") for each in (packed, tiny_llama))
    measured = measure_divergence(model, base, windows_of(tiny_llama, text))
    assert {name: measured[name] for name in FIGURES} == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_of_a_model_from_itself_there_is_none(tiny_llama: Path, text: str) -> None:
    zero = {"kl": 0, "kl_median": 0, "kl_p99": 0, "kl_max": 0, "top1_agreement": 1}
    itself = LLQLM(pretrained=str(tiny_llama), method="none", device="cpu")
    assert figures(itself, text) == zero
    assert not hasattr(itself, "_llq_reference")  # no second model is loaded
    twice = LLQLM(pretrained=str(tiny_llama), method="none", base=str(tiny_llama), device="cpu")
    assert figures(twice, text) == pytest.approx(zero, abs=1e-6)


def test_the_full_precision_model_is_the_one_that_was_quantized(
    tiny_llama: Path, packed: Path, text: str, tmp_path: Path
) -> None:
    wanted = literal(packed, tiny_llama, text)
    made = LLQLM(
        pretrained=str(tiny_llama), method="rtn", bits=3, group_size=32, device="cpu",
        cache_dir=str(tmp_path),
    )  # fmt: skip
    assert figures(made, text) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    own = LLQLM(pretrained=str(packed), device="cpu")
    assert figures(own, text, base=str(tiny_llama)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_any_model_of_lm_eval_is_compared(
    tiny_llama: Path, tiny_llama_tied: Path, text: str
) -> None:
    lm = HFLM(pretrained=str(tiny_llama_tied), device="cpu", batch_size=4)
    wanted = literal(tiny_llama_tied, tiny_llama, text)
    assert figures(lm, text, base=str(tiny_llama)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_report_names_the_bundled_model_but_no_folder(packed: Path, tmp_path: Path) -> None:
    quantize_checkpoint("demo", tmp_path / "demo", build("rtn", bits=4), Calibration())
    assert named_base(tmp_path / "demo") == MODELS["demo"]
    assert LLQLM(pretrained=str(tmp_path / "demo"), device="cpu").llq_base() == str(MODELS["demo"])
    assert named_base(packed) is None


def test_ranks_and_batches_do_not_change_the_figures(
    tiny_llama: Path, packed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LLQLM(pretrained=str(packed), base=str(tiny_llama), device="cpu")
    metadata = {"text_file": text, "seqlen": SEQLEN}
    tasks = TaskManager(include_path=str(YAMLS), include_defaults=False, metadata=metadata)
    task = tasks.load(["llq_kl"])["tasks"]["llq_kl"]
    task.build_all_requests()
    whole = Divergence.together([part for part, _ in windows_kl(lm, task.instances)])
    assert len(whole) == windows_of(tiny_llama, text).numel()
    for batch_size in (1, 7, "auto"):
        monkeypatch.setattr(lm, "batch_size_per_gpu", batch_size)
        ranks = [windows_kl(lm, task.instances[rank::3]) for rank in range(3)]
        found = Divergence.together([part for rank in ranks for part, _ in rank])
        assert found.summary() == pytest.approx(whole.summary(), rel=1e-4, abs=1e-6)
        assert all(length == SEQLEN for rank in ranks for _, length in rank)


def test_logs_of_samples_hold_no_lists_of_figures(tiny_llama: Path, text: str) -> None:
    lm = LLQLM(pretrained=str(tiny_llama), method="none", device="cpu")
    samples = evaluate(lm, text, log_samples=True)["samples"]["llq_kl"]
    logged = json.dumps(samples, default=str)
    assert "tokens" in logged
    assert len(logged) < 1500 * len(samples)


def test_what_cannot_be_compared_is_said(
    tiny_llama: Path, tiny_llava: Path, packed: Path, text: str
) -> None:
    lm = LLQLM(pretrained=str(packed), device="cpu")
    with pytest.raises(LLQError, match=r"nothing says which .* give base=MODEL in model_args"):
        evaluate(lm, text)
    with pytest.raises(LLQError, match="is quantized itself"):
        evaluate(lm, text, base=str(packed))
    with pytest.raises(LLQError, match="base=3 in the metadata is no folder"):
        evaluate(lm, text, base=3)
    with pytest.raises(LLQError, match="320 and 321 different tokens"):
        evaluate(lm, text, base=str(tiny_llava))
    with pytest.raises(LLQError, match="neither a local folder"):
        evaluate(lm, text, base="nowhere/nothing")
    with pytest.raises(LLQError, match="no token was compared"):
        Divergence.together([]).summary()
