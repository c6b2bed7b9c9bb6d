"""What goes along with a model is a list of names, and no link that leads out of its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llq_hf.checkpoints.carried import carried, own_file
from llq_hf.checkpoints.hashes import Hashes, damage
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.export.convert import export
from llq_hf.export.dense import DenseFormat
from llq_hf.methods import build
from llq_hf.publish.hub import prepare_upload

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "content-of-a-private-file"


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "base")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "token"
    file.write_text(SECRET)
    return file


def quantize(base: Path, out: Path) -> Path:
    quantize_checkpoint(str(base), out, build("rtn", bits=4), Calibration("demo", 1, 8))
    return out


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}


def test_the_list() -> None:
    """Every file that transformers knows of a tokenizer or a processor, whatever model it is of."""
    from transformers import utils

    from llq_hf.checkpoints.carried import _is_listed

    known = {
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
        *("sentencepiece.bpe.model", "source.spm", "qwen.tiktoken", "tekken.json"),
        *("tokenizer.model.v3", "additional_chat_templates/rag.jinja", "chat_template.jinja"),
        *("LICENSE", "LICENSE.txt", "license.md", "LICENCE", "NOTICE", "USE_POLICY.md"),
        *(utils.IMAGE_PROCESSOR_NAME, utils.PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME),
        *(utils.GENERATION_CONFIG_NAME, utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE),
    }
    assert {name for name in known if not _is_listed(name)} == set()
    others = (
        "added_notes.txt",
        "credentials.json",
        ".env",
        "id_rsa",
        "notes.md",
        "a.py",
        "a/b.txt",
    )
    assert [name for name in others if _is_listed(name)] == []


def test_a_file_that_belongs_to_no_model_stays(base: Path, secret: Path, tmp_path: Path) -> None:
    (base / "added_notes.txt").symlink_to(secret)
    (base / "preprocessor_extra.json").write_text(json.dumps({"also": "private"}))
    out = quantize(base, tmp_path / "out")
    assert names(out) == (names(base) - {"added_notes.txt", "preprocessor_extra.json"}) | {
        "llq_report.json",
        "llq_hashes.json",
    }
    export(out, tmp_path / "exported", DenseFormat)
    assert names(tmp_path / "exported") == names(base) - {
        "added_notes.txt",
        "preprocessor_extra.json",
    }
    (out / "private.txt").write_text(SECRET)
    (out / "private.safetensors").write_text(SECRET)
    uploaded = set(prepare_upload(out, "me/x").files)
    assert uploaded == names(out) - {"private.txt", "private.safetensors"} | {
        "README.md",
        "llq_journal.jsonl",
    }


def _file(base: Path, secret: Path) -> None:
    (base / "vocab.txt").symlink_to(secret)


def _relative(base: Path, secret: Path) -> None:
    (base / "vocab.txt").symlink_to("../home/token")


def _folder(base: Path, secret: Path) -> None:
    secret.rename(secret.with_name("token.jinja"))
    (base / "additional_chat_templates").symlink_to(secret.parent)


def _deep(base: Path, secret: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").symlink_to("../../home/token")


def _chain(base: Path, secret: Path) -> None:
    (base / "hidden").symlink_to(secret)
    (base / "merges.txt").symlink_to("hidden")


def _code(base: Path, secret: Path) -> None:
    (base / "modeling_x.py").symlink_to(secret)
    _map(base, {"AutoModelForCausalLM": "modeling_x.X"})


def _pretended_snapshot(base: Path, secret: Path) -> None:
    """A folder with the layout of the Hub's cache, whose blobs are a link to elsewhere."""
    snapshot = base / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in [file for file in base.iterdir() if file.is_file()]:
        file.rename(snapshot / file.name)
    (base / "models--a--b" / "blobs").symlink_to(secret.parent)
    (snapshot / "vocab.txt").symlink_to("../../blobs/token")


def _map(folder: Path, auto_map: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))


@pytest.mark.parametrize(
    "link", [_file, _relative, _folder, _deep, _chain, _code, _pretended_snapshot]
)
def test_a_link_out_of_the_folder_is_refused(base, secret, tmp_path, link) -> None:
    link(base, secret)
    folder = next(base.rglob("config.json")).parent
    with pytest.raises(LLQError, match=r"is a link that leads out of its folder, to .*home"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_uploaded(base, secret, tmp_path, name) -> None:
    out = quantize(base, tmp_path / "out")
    if (out / name).is_file():  # elsewhere, and as it was
        (out / name).rename(secret)
    (out / name).symlink_to(secret)
    with pytest.raises(LLQError, match=f"{name} is a link that leads out of its folder"):
        prepare_upload(out, "me/x")


def test_a_link_inside_the_folder_is_a_file_of_it(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").rename(base / "the-tokenizer")
    (base / "tokenizer.json").symlink_to("the-tokenizer")
    out = quantize(base, tmp_path / "out")
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == (base / "the-tokenizer").read_bytes()


def test_snapshots_of_the_hub_consist_of_links(base: Path, tmp_path: Path) -> None:
    """As the Hub's client lays them out: snapshots/COMMIT/NAME -> ../../blobs/HASH."""
    repo = tmp_path / "hub" / "models--org--base"
    snapshot = repo / "snapshots" / COMMIT
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    for number, file in enumerate(sorted(base.rglob("*"))):
        if file.is_file():
            link = snapshot / file.relative_to(base)
            blob = repo / "blobs" / f"{number:040x}"
            for folder in (link.parent, blob.parent):
                folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            up = "../" * (2 + len(file.relative_to(base).parents) - 1)
            link.symlink_to(f"{up}blobs/{blob.name}")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "hub")  # a cache on another disk
    here, there = quantize(base, tmp_path / "a"), tmp_path / "b"
    quantize(tmp_path / "elsewhere" / repo.name / "snapshots" / COMMIT, there)
    assert names(here) == names(there)
    for name in names(here) - {"llq_report.json", "llq_hashes.json"}:
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_further_chat_templates_come_along(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {
        "default": "D {{ messages[0]['content'] }}",
        "rag": "R {{ messages[0]['content'] }}",
    }
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates" / "rag.jinja").is_file()
    out = quantize(base, tmp_path / "out")
    said = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, chat_template="rag"
    )
    assert said == "R hi"
    assert "additional_chat_templates/rag.jinja" in Hashes.read(out).files
    assert "additional_chat_templates/rag.jinja" in prepare_upload(out, "me/x").files
    (out / "additional_chat_templates" / "rag.jinja").write_text("other")
    assert damage(out) == ["additional_chat_templates/rag.jinja is not as it was written"]


def test_code_that_an_auto_map_names_comes_along(base: Path, tmp_path: Path) -> None:
    """With what it imports from beside it, but no other Python file."""
    (base / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass XConfig(LlamaConfig):\n    pass\n"
    )
    (base / "helper_x.py").write_text("NUMBER = 7\n")
    (base / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_x import XConfig\n"
        "from .helper_x import NUMBER\n\n\n"
        "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n    number = NUMBER\n"
    )
    (base / "setup.py").write_text("raise SystemExit\n")
    _map(
        base,
        {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XForCausalLM",
            "AutoTokenizer": ["org/other--tokenization_y.Y", None],
            "AutoProcessor": "../home/token.X",
        },
    )
    out = quantize(base, tmp_path / "out")
    code = {name for name in names(out) if name.endswith(".py")}
    assert code == {"configuration_x.py", "helper_x.py", "modeling_x.py"}
    assert code <= set(prepare_upload(out, "me/x").files)
    assert code <= set(Hashes.read(out).files)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert (type(model).__name__, model.number) == ("XForCausalLM", 7)
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    ids = torch.arange(2, 20)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_hashes_that_list_a_stranger_are_not_uploaded_without_it(base, tmp_path) -> None:
    """As older versions wrote them, which carried along any .txt and .json."""
    out = quantize(base, tmp_path / "out")
    (out / "added_notes.txt").write_text(SECRET)
    Hashes.made(out, [*carried(out), "llq_report.json", "added_notes.txt"]).write(out)
    with pytest.raises(LLQError, match=r"lists added_notes\.txt, which belongs to no model"):
        prepare_upload(out, "me/x")
    (out / "llq_hashes.json").unlink()
    files = prepare_upload(out, "me/x").files
    assert "added_notes.txt" not in files
    assert "added_notes.txt" not in json.loads(files["llq_hashes.json"])["files"]


def test_own_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    assert own_file(tmp_path / "a", "x") == (tmp_path / "a" / "x").resolve()
    assert own_file(tmp_path / "a", "y") is None
    (tmp_path / "b").symlink_to("a")  # the user's own link to the folder is none out of it
    assert own_file(tmp_path / "b", "x") == (tmp_path / "a" / "x").resolve()
