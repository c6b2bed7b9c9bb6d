"""The card says what the files say, passes the licence on, and takes no figure that is not this
checkpoint's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.common.errors import LLQError
from llq_hf.common.resources import template_path
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.methods import build
from llq_hf.publish.card import make_card

BASE_CARD = """---
license: llama3
license_name: a-name
language: [en, de]
extra_gated_prompt: secret
---
# Base
"""


@pytest.fixture(scope="module")
def packed(
    tiny_llama: Path, calibration_npy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A GPTQ checkpoint of a base with a card and a LICENSE."""
    folder = tmp_path_factory.mktemp("card")
    base = shutil.copytree(tiny_llama, folder / "base")
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_text("Do as you please.\n")
    method = build("gptq", bits=3, group_size=32, true_sequential=True)
    quantize_checkpoint(
        str(base), folder / "packed", method, Calibration(str(calibration_npy), samples=8)
    )
    return folder / "packed"


@pytest.fixture
def scored(packed: Path, tmp_path: Path) -> Callable[..., Path]:
    """A results file as lm-eval writes them, of the packed checkpoint; overrides go into its `llq`
    section.
    """

    def scored(
        name: str = "results_1.json", value: float = 12.5, date: float = 1.0, **overrides: Any
    ) -> Path:
        found = inspect_checkpoint(packed)
        llq = {key: found[key] for key in ("fingerprint", "method", "config")} | overrides
        content = {
            "results": {
                "wikitext": {
                    "alias": "wikitext",
                    "word_perplexity,none": value,
                    "word_perplexity_stderr,none": "N/A",
                },
                "arc_easy": {
                    "alias": " - arc",
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.01,
                    "acc_norm,none": 0.25,
                },
            },
            "configs": {
                "arc_easy": {
                    "dataset_path": "allenai/ai2_arc",
                    "dataset_name": "ARC-Easy",
                    "test_split": "t",
                }
            },
            "n-shot": {"arc_easy": 5},
            "higher_is_better": {"wikitext": {"word_perplexity": False}, "arc_easy": {"acc": True}},
            "config": {"model": "llq", "model_args": {"pretrained": "/home/me/secret"}, "llq": llq},
            "pretty_env_info": "a secret machine",
            "lm_eval_version": "0.4.13",
            "date": date,
        }
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return scored


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_files_say(packed):
    found, text = inspect_checkpoint(packed), str(make_card(packed, repo="me/tiny-gptq"))
    assert f"| {found['stored_bits']:.3f} |" in text
    assert "GPTQ (Frantar et al. 2023) to **3 bits**" in text
    assert f"`{found['fingerprint']}`" in text
    assert "| `true_sequential` | True |" in text
    assert "`ids.npy`, seed 0, 8 x 32 tokens" in text
    assert 'from_pretrained("me/tiny-gptq")' in text
    assert (
        "llq quantize base tiny-gptq --method gptq --bits 3 --group-size 32 --true-sequential"
        in text
    )
    assert "Nothing was measured yet" in text
    assert str(packed.parent) not in text  # nothing of this machine


def test_a_simulated_cache_is_called_so(packed, tiny_llama, tmp_path):
    method = build("spinquant", bits=4, kv_bits=4, solver="rtn")
    quantize_checkpoint(str(tiny_llama), tmp_path / "out", method, Calibration("demo"))
    text = str(make_card(tmp_path / "out"))
    assert "key/value cache is simulated (key 4 bits, value 4 bits where attention reads" in text
    assert "simulated" not in str(make_card(packed))


def test_a_packed_cache_is_named(packed, tmp_path):
    """Where generation_config.json asks for one."""
    folder = shutil.copytree(packed, tmp_path / "copy")
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"cache_implementation": "quantized", "cache_config": {"backend": "llq", "nbits": 4}}
    (folder / "generation_config.json").write_text(json.dumps(own))
    said = "`generate` keeps keys and values packed in 4 bits, as `generation_config.json` says"
    assert said in str(make_card(folder))
    assert "keeps keys and values packed" not in str(make_card(packed))


def test_calibration_on_pairs_is_described(tiny_llava, tmp_path):
    (tmp_path / "pairs").mkdir()
    Image.new("RGB", (30, 40), (200, 30, 30)).save(tmp_path / "pairs" / "red.png")
    (tmp_path / "pairs" / "about.jsonl").write_text('{"image": "red.png", "text": "a red fox"}')
    report = quantize_checkpoint(
        str(tiny_llava),
        tmp_path / "out",
        build("gptq", bits=4),
        Calibration(str(tmp_path / "pairs"), samples=1),
    )
    used = report["identity"]["calibration"]
    text = str(make_card(tmp_path / "out"))
    assert f"text pairs, {used['tokens']} tokens" in text
    assert f"tokens (sha256 `{used['pairs_sha256'][:16]}`)" in text
    assert "--calibration-samples 1" in text


def test_the_licence_is_the_bases(packed):
    data = front_matter(str(make_card(packed)))
    assert data["license"] == "llama3"
    assert data["license_name"] == "a-name"
    assert data["language"] == ["en", "de"]
    assert "extra_gated_prompt" not in data
    assert "base_model" not in data  # it is a folder, and no model of the Hub


def test_the_base_model_is_named_where_it_is_on_the_hub(packed):
    data = front_matter(str(make_card(packed, base="org/base")))
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("said", "files", "licence", "text"),
    [
        (
            {},
            ["LICENSE.txt"],
            {"license": "other", "license_link": "LICENSE.txt"},
            "came along: `LICENSE.txt`",
        ),
        ({}, [], {}, "Its card names none"),
    ],
)
def test_a_licence_is_never_invented(packed, tmp_path, said, files, licence, text):
    folder = shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns("LICENSE"))
    report = json.loads((folder / "llq_report.json").read_text())
    report["made_from"]["card"] = said
    (folder / "llq_report.json").write_text(json.dumps(report))
    for name in files:
        (folder / name).write_text("text")
    card = str(make_card(folder))
    assert {
        key: value for key, value in front_matter(card).items() if key.startswith("license")
    } == licence
    assert text in card


def test_results_become_a_model_index(packed, scored):
    card = str(make_card(packed, results=[scored(value=12.5)]))
    (index,) = front_matter(card)["model-index"]
    found = {
        (r["task"]["name"], m["type"]): (m["value"], r["dataset"])
        for r in index["results"]
        for m in r["metrics"]
    }
    assert found["wikitext", "word_perplexity"][0] == 12.5
    value, dataset = found["arc_easy", "acc"]
    assert value == 0.5
    assert (dataset["type"], dataset["config"], dataset["split"]) == (
        "allenai/ai2_arc",
        "ARC-Easy",
        "t",
    )
    assert "| arc_easy | acc ↑ | 0.5 ± 0.01 | 5 |" in card
    assert "| wikitext | word_perplexity ↓ | 12.5 |" in card
    assert "secret" not in card


def test_of_two_results_the_newer_counts(packed, scored):
    files = [scored("results_2.json", 11.0, date=2.0), scored("results_1.json", 12.5, date=1.0)]
    for order in (files, files[::-1]):
        assert "| 11 |" in str(make_card(packed, results=order))


@pytest.mark.parametrize(
    "overrides",
    [{"fingerprint": "0" * 16}, {"method": "rtn"}, {"config": {"bits": 2}}],
    ids=lambda each: next(iter(each)),
)
def test_results_of_another_model_are_refused(packed, scored, overrides):
    with pytest.raises(LLQError, match="scored another model"):
        make_card(packed, results=[scored(**overrides)])


def test_results_without_a_fingerprint_are_refused(packed, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"results": {}, "config": {"model": "hf"}}))
    with pytest.raises(LLQError, match="--model llq"):
        make_card(packed, results=[tmp_path])
    with pytest.raises(LLQError, match="does not exist"):
        make_card(packed, results=[tmp_path / "none.json"])


def test_a_model_saved_by_transformers_has_a_card_too(packed, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(tmp_path / "saved")
    text = str(make_card(tmp_path / "saved", base="org/base"))
    # With no report to count from
    assert f"| {inspect_checkpoint(packed)['stored_bits']:.3f} |" in text


def test_the_template_is_where_the_wheel_or_the_checkout_has_it():
    assert template_path().is_file()


EVIL = "<img src=x onerror=alert(1)>|`[a](b)\n---\n# b\nlicense: mit"


def test_names_of_others_stay_text(packed, scored, tmp_path):
    """Licences, tasks, base and calibration, in Markdown and in the front matter."""
    folder = shutil.copytree(packed, tmp_path / 'x") <b>')
    report = json.loads((folder / "llq_report.json").read_text())
    report["made_from"]["card"] = {"license": "other", "license_name": EVIL, "language": EVIL}
    report["made_from"] |= {"model": EVIL, "revision": EVIL}
    report["made_from"]["calibration"]["source"] = EVIL
    (folder / "llq_report.json").write_text(json.dumps(report))
    (folder / "LICENSE <i>`").write_text("text")
    results = json.loads(scored().read_text())
    results["results"] = {EVIL: {f"{EVIL},none": 1.0}}
    results["configs"], results["n-shot"] = {EVIL: {"dataset_path": EVIL}}, {EVIL: EVIL}
    (tmp_path / "evil_results.json").write_text(json.dumps(results))
    card = str(make_card(folder, results=[tmp_path / "evil_results.json"]))
    front, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    data = yaml.safe_load(front)
    assert data["license_name"] == data["language"] == EVIL
    assert data["license"] == "other"
    assert data["model-index"][0]["results"][0]["task"]["name"] == EVIL
    lines = [re.sub(r"`[^`]*`", "", line) for line in _outside_blocks(text)]
    assert not [line for line in lines if re.search(r"<\w|(?<!\\)\[a\]", line)]
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 5}
    assert [line for line in lines if line.startswith("# ")] == [lines[1]]
    assert 'from_pretrained("USER/x\\") <b>")' in text
    assert "pretrained='USER/x\") <b>'" in text


def _outside_blocks(text: str) -> list[str]:
    """Lines of Markdown that are not inside fences."""
    parts = text.split("\n```")
    assert len(parts) % 2 == 1
    return "\n".join(parts[::2]).splitlines()
