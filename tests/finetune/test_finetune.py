"""Fine-tuning of packed models: from rows to an ordinary peft adapter, through kills, on its own
base only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llq_hf import cli
from llq_hf.checkpoints.adapter import base_of, is_adapter
from llq_hf.common.errors import LLQError
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.finetune import elastic, trainer
from llq_hf.methods import build

RECIPE = trainer.Recipe(
    rank=4,
    alpha=8,
    max_steps=6,
    batch_size=4,
    micro_batch=2,
    learning_rate=1e-2,
    heldout=4,
    recompute=False,
)
ELASTIC = replace(RECIPE, connections=True)
MACHINE = trainer.Machine(save_steps=2)
WORDS = ["fox", "king", "hill", "river", "night", "day", "name", "red", "old", "small"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a pattern that can be learnt."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"the {a} and the {b}:", "completion": f" {b} {a}"} for a in WORDS for b in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pack(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_npy: Path
) -> Callable[..., Path]:
    """A packed tiny Llama by a method's name and options, each made once."""
    made: dict[str, Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = json.dumps([name, options])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "base"
            calibration = Calibration(str(calibration_npy), samples=8)
            quantize_checkpoint(str(tiny_llama), made[key], build(name, **options), calibration)
        return made[key]

    return make


@pytest.fixture(scope="module")
def base(pack: Callable[..., Path]) -> Path:
    return pack("nf4", icq=True, tau_steps=5)


@pytest.fixture(scope="module")
def trained(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Folder and note of an unbroken IR-QLoRA run."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, trainer.finetune(str(base), out, str(data), ELASTIC, MACHINE)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits


def on_base(out: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(str(out))), out)


# --- what comes out -------------------------------------------------------------------------------


def test_the_loss_falls_and_answers_get_better(trained: tuple[Path, dict[str, Any]]):
    _, note = trained
    assert len(note["losses"]) == RECIPE.max_steps
    assert note["losses"][-1] < 0.8 * note["losses"][0]
    assert note["after"]["loss"] < 0.8 * note["before"]["loss"]


def test_out_is_a_plain_peft_adapter(trained: tuple[Path, dict[str, Any]], calibration_ids: Tensor):
    out, _ = trained
    tensors = load_file(out / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    assert len(tensors) == 2 * 14
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert not out.with_name("out.training").exists()
    through_peft = logits(on_base(out), calibration_ids)
    bare = logits(AutoModelForCausalLM.from_pretrained(base_of(str(out))), calibration_ids)
    assert not torch.allclose(through_peft, bare, atol=1e-2)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out), calibration_ids), through_peft
    )


def test_the_saved_adapter_is_the_trained_one(
    base: Path, data: Path, tmp_path: Path, calibration_ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []
    merge = elastic.merge

    def spy(model: torch.nn.Module) -> None:
        assert any(
            p.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("beta")
        )
        seen.append(logits(model, calibration_ids))
        merge(model)

    monkeypatch.setattr(elastic, "merge", spy)
    trainer.finetune(str(base), tmp_path / "out", str(data), replace(ELASTIC, max_steps=2), MACHINE)
    assert torch.equal(logits(on_base(tmp_path / "out"), calibration_ids), seen[0])


BASES = [
    ("gptq", {"bits": 2}),
    ("awq", {"bits": 3, "ratios": 4}),
    ("quip", {"bits": 2}),
    ("slim_llm", {"bits": 2}),
]


@pytest.mark.parametrize(("name", "options"), BASES, ids=[name for name, _ in BASES])
def test_any_packed_base_can_be_trained_on(
    pack: Callable[..., Path], data: Path, tmp_path: Path, name: str, options: dict[str, Any]
):
    """Every adapter of every block moves: gradients reach the first block through all packed
    linears.
    """
    if name != "quip":
        options = {**options, "group_size": 32}
    base = pack(name, **options)
    note = trainer.finetune(
        str(base), tmp_path / "out", str(data), replace(RECIPE, max_steps=3), MACHINE
    )
    assert note["after"]["loss"] < note["before"]["loss"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key)


# --- ways to train --------------------------------------------------------------------------------


def first_loss(base: Path, data: Path, out: Path, **changes: Any) -> float:
    recipe = replace(RECIPE, max_steps=1, **changes)
    return trainer.finetune(str(base), out, str(data), recipe, MACHINE)["losses"][0]


def test_packing_and_recomputing_change_no_loss(base: Path, data: Path, tmp_path: Path):
    """Packed rows see only themselves; else their loss would be another."""
    plain = first_loss(base, data, tmp_path / "plain", batch_size=8, micro_batch=8)
    assert first_loss(
        base, data, tmp_path / "packed", batch_size=8, micro_batch=8, packing=True
    ) == pytest.approx(plain, rel=1e-4)
    assert first_loss(
        base, data, tmp_path / "again", batch_size=8, micro_batch=8, recompute=True
    ) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"streaming": True, "packing": True}], ids=["stored rows", "a packed stream"]
)
def test_a_killed_run_goes_on_to_the_same_losses(
    base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    recipe = replace(ELASTIC, dropout=0.1, **changes)
    unbroken = trainer.finetune(str(base), tmp_path / "unbroken", str(data), recipe, MACHINE)
    out, step_end = tmp_path / "killed", trainer.TrainerProgress.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainerProgress, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    assert not is_adapter(str(out))
    work = out.with_name("killed.training")
    assert (work / "checkpoint-4").is_dir()
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-4"]
    torn = Path(shutil.copytree(work / "checkpoint-4", work / "checkpoint-6"))
    (torn / "llq_whole").unlink()  # killed while this one was written, or deleted
    (torn / "optimizer.pt").write_bytes(b"")
    began: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer.TrainerProgress,
            "on_train_begin",
            lambda self, args, state, control, **kwargs: began.append(state.global_step),
        )
        resumed = trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    assert began == [4]
    assert resumed["losses"] == unbroken["losses"]
    assert resumed["after"] == unbroken["after"]
    first, second = (
        load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "unbroken")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "the same file whatever the process"


def test_a_finished_run_is_left_alone_and_another_is_refused(
    trained: tuple[Path, dict[str, Any]], base: Path, data: Path, tmp_path: Path
):
    out, note = trained
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert trainer.finetune(str(base), out, str(data), ELASTIC, MACHINE)["losses"] == note["losses"]
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(LLQError, match=r"begun with other inputs: .*rank"):
        trainer.finetune(str(base), out, str(data), replace(ELASTIC, rank=2), MACHINE)
    other = shutil.copyfile(data, tmp_path / data.name)
    with other.open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(LLQError, match=r"begun with other inputs: .*sha256"):
        trainer.finetune(str(base), out, str(other), ELASTIC, MACHINE)


LOOKS = """
import sys
from pathlib import Path
from filelock import Timeout
from llq_hf.common.files import locked
from llq_hf.finetune import trainer

def look(base, out, *_):
    try:
        with locked(out.with_name("out.lock"), timeout=0):
            print("free")
    except Timeout:
        print("taken")

trainer._finetune = look
trainer.finetune("base", Path(sys.argv[1]), "data", None, trainer.Machine())
"""


def test_a_run_has_its_folder_for_itself(tmp_path: Path):
    """Another one waits for the lock, which is gone in the end. In a process of its own, which no
    other test has touched.
    """
    command = [sys.executable, "-c", LOOKS, str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "taken\n"
    assert list((tmp_path / "new").iterdir()) == []


def test_killed_after_the_last_step(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It does not train one step more."""
    recipe, out = replace(RECIPE, max_steps=4), tmp_path / "out"
    whole = trainer.finetune(str(base), tmp_path / "whole", str(data), recipe, MACHINE)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    assert trainer.finetune(str(base), out, str(data), recipe, MACHINE) == whole
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_finished_adapter_is_mended(base: Path, data: Path, tmp_path: Path, how: str):
    """And what a kill left behind it is deleted: the run's files, drafts."""
    recipe, out = replace(RECIPE, max_steps=2), tmp_path / "out"
    trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    wanted = {file.name: file.read_bytes() for file in out.iterdir()}
    weights = out / "adapter_model.safetensors"
    if how == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-4])
    trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted
    out.with_name("out.training").mkdir()  # killed when all was written
    (out / "adapter_config.json.tmp").mkdir()
    trainer.finetune(str(base), out, str(data), recipe, MACHINE)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted
    assert list(tmp_path.iterdir()) == [out]


def test_two_processes_train_one_adapter(base: Path, data: Path, tmp_path: Path):
    """Both runs see the same rows per step: the curve of two processes is that of one."""
    options = {
        "rank": 4,
        "alpha": 8,
        "max-steps": 3,
        "batch-size": 4,
        "micro-batch": 2,
        "heldout": 4,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--learning-rate", "0.01", "--no-recompute", "--data", str(data)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "llq_hf", "finetune", str(base), str(tmp_path / "two"), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    note = json.loads((tmp_path / "two" / "llq_adapter.json").read_text())
    assert note["identity"]["processes"] == 2
    one = trainer.finetune(
        str(base), tmp_path / "one", str(data), replace(RECIPE, max_steps=3), MACHINE
    )
    assert note["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert note["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-2)


def test_alpaca_on_a_model_of_stories(shared: Path, tmp_path: Path):
    """The real data set, streamed, on a real model that was never told what an instruction is."""
    base = tmp_path / "base"
    quantize_checkpoint(
        str(shared / "models" / "stories260K"), base, build("nf4"), Calibration("demo")
    )
    recipe = replace(
        RECIPE, rank=8, max_steps=12, micro_batch=4, streaming=True, answer_tokens=64, heldout=16
    )
    alpaca = str(shared / "data" / "text" / "alpaca_data.json")
    note = trainer.finetune(str(base), tmp_path / "out", alpaca, recipe, MACHINE)
    assert sum(note["losses"][-4:]) < 0.95 * sum(note["losses"][:4])
    assert note["after"]["loss"] < note["before"]["loss"]


# --- the right base, and only it ------------------------------------------------------------------


def test_another_base_is_refused_however_it_is_loaded(
    trained: tuple[Path, dict[str, Any]], pack: Callable[..., Path]
):
    out, _ = trained
    other = AutoModelForCausalLM.from_pretrained(pack("gptq", bits=2, group_size=32))
    with pytest.raises(LLQError, match="was trained on another base"):
        PeftModel.from_pretrained(other, out)
    other = AutoModelForCausalLM.from_pretrained(pack("gptq", bits=2, group_size=32))
    with pytest.raises(LLQError, match="was trained on another base"):
        other.load_adapter(str(out))


def test_the_dense_model_is_refused(trained: tuple[Path, dict[str, Any]], tiny_llama: Path):
    with pytest.raises(LLQError, match="was trained on another base"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), trained[0])


def test_the_same_base_saved_again_is_the_same(
    trained: tuple[Path, dict[str, Any]], base: Path, tmp_path: Path
):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(
        tmp_path / "again", max_shard_size="40KB"
    )
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config["quantization_config"]["fingerprint"] = None  # as if quantized in memory
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), trained[0])


def test_lm_eval_scores_base_and_adapter(
    trained: tuple[Path, dict[str, Any]], calibration_ids: Tensor, tmp_path: Path
):
    from llq_hf.hosts.lm_eval_model import LLQLM

    out, _ = trained
    scored = LLQLM(pretrained=str(out), device="cpu")
    assert torch.equal(logits(scored.model, calibration_ids), logits(on_base(out), calibration_ids))
    info = scored.get_model_info()["llq"]
    assert info["adapter"] == str(out)
    assert info["method"] == "nf4"
    moved = shutil.copytree(out, tmp_path / "moved")
    shutil.copytree(base_of(str(out)), moved / "base")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/nowhere"})
    )
    assert base_of(str(moved)) == str(moved / "base")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank=0"),
        ({"micro_batch": 3, "batch_size": 4}, "no multiple of micro_batch=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"heldout": -1}, "heldout=-1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_recipes_are_checked(changes: dict[str, Any], words: str):
    with pytest.raises(LLQError, match=words):
        replace(RECIPE, **changes).accumulation(1)


def test_a_dense_base_is_refused(tiny_llama: Path, data: Path, tmp_path: Path):
    with pytest.raises(LLQError, match="quantization_config"):
        trainer.finetune(str(tiny_llama), tmp_path / "out", str(data), RECIPE, MACHINE)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(base: Path, data: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(LLQError, match=r"not empty .model.safetensors."):
        trainer.finetune(str(base), tmp_path, str(data), RECIPE, MACHINE)
    with pytest.raises(LLQError, match="paged=True needs a GPU"):
        trainer.finetune(
            str(base), tmp_path / "out", str(data), replace(RECIPE, paged=True), MACHINE
        )


# --- the command ----------------------------------------------------------------------------------


def llq(*words: object) -> str:
    result = CliRunner().invoke(cli.app, ["finetune", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = [
    "--rank",
    4,
    "--max-steps",
    2,
    "--heldout",
    4,
    "--batch-size",
    4,
    "--device",
    "cpu",
    "--no-recompute",
]


def test_a_dense_model_is_packed_first(tiny_llama: Path, data: Path, tmp_path: Path):
    said = llq(
        tiny_llama, tmp_path / "out", "--method", "ir_qlora", "--bits", 3, "--data", data, *SMALL
    )
    assert "right to the last token" in said
    section = json.loads((tmp_path / "out" / "base" / "config.json").read_text())[
        "quantization_config"
    ]
    assert (section["quant_method"], section["bits"], section["icq"]) == ("llq_nf4", 3, True)
    note = json.loads((tmp_path / "out" / "llq_adapter.json").read_text())
    assert note["identity"]["recipe"]["connections"]
    assert note["base"]["fingerprint"] == section["fingerprint"]


def test_what_the_command_cannot_do_is_said(base: Path, data: Path, tmp_path: Path):
    for words, said in (
        (["--method", "lora"], "unknown method 'lora'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--save-steps", 0], "save_steps=0"),
    ):
        with pytest.raises(LLQError, match=said):
            llq(base, tmp_path / "out", "--data", data, *words)
    assert not (tmp_path / "out").exists()
