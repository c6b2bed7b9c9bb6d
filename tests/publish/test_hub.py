"""What is pushed is what loads: against a stand-in for the Hub that this test starts, with the real
client.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_stand_in import TOKEN, Hub, Repo, hub_stand_in
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llq_hf import cli
from llq_hf.checkpoints.packed import read_report
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.demo import resolve
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.hf_models import QuantizedLlama
from llq_hf.methods import build
from llq_hf.publish.hub import prepare_upload, push

IDS = torch.arange(2, 66)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo checkpoint."""
    out = tmp_path_factory.mktemp("hub") / "demo-rtn"
    quantize_checkpoint(resolve("demo"), out, build("rtn", bits=4), Calibration("demo"))
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process, too, takes for the real one."""
    with hub_stand_in() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def llq() -> Callable[..., str]:
    def llq(*arguments: object) -> str:
        result = CliRunner().invoke(
            cli.app, [str(part) for part in arguments], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return result.output

    return llq


FRESH = """
import sys
import torch
from lm_eval import simple_evaluate
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, fingerprint, out = sys.argv[1:]
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(repo)(torch.arange(2, 66)[None]).logits
assert AutoTokenizer.from_pretrained(repo)("The").input_ids
save_file({"logits": logits}, out)
args = f"pretrained={repo},device=cpu"
found = simple_evaluate("llq", args, tasks=["llq_demo_mc"], limit=4, bootstrap_iters=0)
assert found["results"]["llq_demo_mc"]["acc,none"] == 1
assert found["config"]["llq"]["fingerprint"] == fingerprint
"""


def test_a_pushed_checkpoint_loads_and_scores_in_a_fresh_process_as_before(
    hub, packed, llq, tmp_path
):
    llq("push", packed, "me/demo-rtn")
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
    fingerprint, out = read_report(packed)["fingerprint"], tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", FRESH, "me/demo-rtn", fingerprint, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(packed)(IDS).logits
    assert torch.equal(load_file(out)["logits"], logits)
    # and not from a cache
    assert any("resolve" in line and "model.safetensors" in line for line in hub.asked)


def test_what_is_pushed(hub, packed, llq, tmp_path):
    results = {
        "results": {
            "llq_demo_mc": {"acc,none": 1.0},
            "gsm8k": {"exact_match,strict-match": 0.5},
        },
        "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}},
        "pretty_env_info": "a secret machine",
        "config": {"llq": {}, "model_args": {"pretrained": "/home/me"}},
    }
    section = json.loads((packed / "config.json").read_text())["quantization_config"]
    method = build("rtn", bits=4)
    results["config"]["llq"] = {
        "fingerprint": section["fingerprint"],
        "method": "rtn",
        "config": method.to_dict(),
    }
    (tmp_path / "results_1.json").write_text(json.dumps(results))
    output = llq("push", packed, "me/demo-rtn", "--private", "--results", tmp_path)
    repo = hub.repos["me/demo-rtn"]
    assert repo.private
    assert hub.commits == 1
    for file in packed.iterdir():
        assert repo.files[file.name] == file.read_bytes()
    journal = packed.with_name("demo-rtn.journal.jsonl").read_bytes()
    assert repo.files["llq_journal.jsonl"] == journal
    assert b"secret" not in repo.files["results/results_1.json"]
    assert b"/home/me" not in repo.files["results/results_1.json"]
    assert json.loads(repo.files["results/results_1.json"])["results"] == results["results"]
    card = repo.files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "| llq_demo_mc | acc | 1 |" in card
    assert b"id: openai/gsm8k" in repo.files[".eval_results/gsm8k.yaml"]
    assert b"value: 50.0" in repo.files[".eval_results/gsm8k.yaml"]
    assert TOKEN not in output
    assert all(TOKEN.encode() not in content for content in repo.files.values())


def test_a_dry_run_asks_nothing_of_the_hub(hub, packed, llq):
    output = llq("push", packed, "me/demo-rtn", "--dry-run")
    assert "model.safetensors" in output
    assert "README.md" in output
    assert not hub.asked


def test_a_dry_run_shows_exactly_what_goes_up(hub, packed, llq, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "own")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    for name in ("notes.txt", "notes.md", ".env", "secret.safetensors"):
        (folder / name).write_text("private")
    shown = llq("push", folder, "me/own", "--dry-run")
    llq("push", folder, "me/own")
    uploaded = hub.repos["me/own"].files
    assert "additional_chat_templates/rag.jinja" in uploaded
    sizes = {name: f"{len(content):,}" for name, content in uploaded.items()}
    rows = [line.strip("│ ").split("│") for line in shown.splitlines() if line.count("│") == 3]
    assert {name.strip(): size.strip() for name, size in rows} == sizes


AND_BACK = """
import sys
from pathlib import Path

from llq_hf import Calibration, build, quantize_checkpoint
from llq_hf.checkpoints.dense import fetch
from llq_hf.checkpoints.hashes import damage
from llq_hf.publish.hub import prepare_upload, push

out = Path(sys.argv[1])
quantize_checkpoint("org/coded", out, build("rtn", bits=4), Calibration("demo", 1, 8))
push(prepare_upload(out, "me/coded"))
folder = fetch("me/coded")
assert folder != out
assert damage(folder) == []
"""


def test_code_of_a_base_on_the_hub_comes_along(hub, tiny_llama, tmp_path):
    """Through real snapshots in the Hub's cache, whose files are links, and back to the Hub."""
    files = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    mapped = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "org/other--configuration_x.X"}
    config = {**json.loads(files["config.json"]), "auto_map": mapped}
    files["config.json"] = json.dumps(config).encode()
    files["modeling_x.py"], files["helper_x.py"] = b"from .helper_x import A\n", b"A = 1\n"
    files["setup.py"] = b"raise SystemExit\n"
    files["additional_chat_templates/rag.jinja"] = b"RAG"
    hub.repos["org/coded"] = Repo(False, files)
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "out"
    command = [sys.executable, "-c", AND_BACK, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name for file in out.glob("*.py")} == {"modeling_x.py", "helper_x.py"}
    assert (out / "additional_chat_templates" / "rag.jinja").read_bytes() == b"RAG"
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    snapshots = {path.parts[-3]: path for path in (tmp_path / "home").glob("hub/*/snapshots/*")}
    for repo in ("org--coded", "me--coded"):
        code = sorted(snapshots[f"models--{repo}"].glob("*.py"))
        assert [path.name for path in code] == ["helper_x.py", "modeling_x.py"]
        assert all(path.is_symlink() for path in code)


def test_a_card_of_ones_own_goes_up_as_it_is(hub, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "own")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    push(prepare_upload(folder, "me/own"))
    assert hub.repos["me/own"].files["README.md"].endswith(b"# Mine\n")


def test_weights_of_an_earlier_checkpoint_go_away(hub, packed):
    old = {
        "model.safetensors.index.json": b"old",
        "model-00009-of-00009.safetensors": b"old",
        "notes.txt": b"mine",
    }
    hub.repos["me/demo-rtn"] = Repo(private=False, files=old)
    push(prepare_upload(packed, "me/demo-rtn"))
    files = hub.repos["me/demo-rtn"].files
    assert "model.safetensors.index.json" not in files
    assert "model-00009-of-00009.safetensors" not in files
    assert files["notes.txt"] == b"mine"


def test_a_model_in_memory_pushes_the_same_card_and_weights(hub, packed):
    model = QuantizedLlama.from_pretrained(packed)
    model.push_to_hub("me/from-memory", private=True)
    push(prepare_upload(packed, "me/demo-rtn"))
    first, second = hub.repos["me/from-memory"].files, hub.repos["me/demo-rtn"].files
    assert first["README.md"] == second["README.md"].replace(b"demo-rtn", b"from-memory")
    assert first["tokenizer.json"] == second["tokenizer.json"]
    assert hub.repos["me/from-memory"].private


def test_a_model_quantized_in_memory_has_a_card(hub, tiny_llama):
    model = QuantizedLlama.from_pretrained(tiny_llama, method="rtn", bits=3, group_size=32)
    model.push_to_hub("me/tiny", base_model="org/tiny")
    card = hub.repos["me/tiny"].files["README.md"].decode()
    assert "base_model: org/tiny" in card
    assert "quantized in memory" in card
    assert json.loads(hub.repos["me/tiny"].files["llq_report.json"])["linears"]


def test_a_public_repository_does_not_pass_for_a_private_one(hub, packed):
    hub.repos["me/demo-rtn"] = Repo(private=False)
    with pytest.raises(LLQError, match="it exists and is public"):
        push(prepare_upload(packed, "me/demo-rtn"), private=True)
    assert not hub.repos["me/demo-rtn"].files


def test_the_token_is_in_no_error(hub, packed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongToken")
    upload = prepare_upload(packed, "me/demo-rtn")
    with pytest.raises(LLQError, match="was not uploaded") as caught:
        push(upload)
    assert "hf_wrongToken" not in str(caught.value)
    with pytest.raises(LLQError) as caught:
        push(upload, token="hf_another\nbad")  # no header holds it: the HTTP library quotes it
    assert "hf_another" not in str(caught.value)
    assert not hub.repos


@pytest.mark.parametrize("name", ["me/a/b", "me/--x", ""])
def test_a_name_that_cannot_be(packed, name):
    with pytest.raises(LLQError, match="USER/NAME"):
        prepare_upload(packed, name)


def test_a_damaged_checkpoint_is_not_pushed(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "damaged")
    shutil.copyfile(packed.with_name("demo-rtn.journal.jsonl"), tmp_path / "damaged.journal.jsonl")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    with pytest.raises(LLQError):
        prepare_upload(folder, "me/damaged")
