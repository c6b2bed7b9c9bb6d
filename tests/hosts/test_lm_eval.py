"""The model `llq` of lm-eval: options, cache, what is refused, what results carry, one process
against two.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llq_hf import Calibration, LLQError, QuantizedLlama, build
from llq_hf.checkpoints.inspection import inspect_checkpoint
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.hosts.hf_quantizer import check_quantized, count_quantized
from llq_hf.hosts.lm_eval_model import LLQLM
from llq_hf.layers.kv_cache import PackedLayer


@pytest.fixture
def options(calibration_npy: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "calibration": str(calibration_npy),
        "cache_dir": str(tmp_path / "cache"),
        "device": "cpu",
    }


def test_quantizes_once_and_reuses(
    tiny_llama: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LLQLM(pretrained=str(tiny_llama), method="gptq", bits=3, **options)
    monkeypatch.setattr("llq_hf.engine.cached.execute", lambda *a: pytest.fail("quantized again"))
    second = LLQLM(pretrained=str(tiny_llama), method="gptq", bits=3, **options)
    ids = torch.arange(20)[None]
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)


def test_results_say_what_was_scored(tiny_llama: Path, options: dict) -> None:
    info = LLQLM(
        pretrained=str(tiny_llama), method="rtn", bits=3, group_size=32, **options
    ).get_model_info()["llq"]
    assert info["method"] == "rtn"
    assert info["config"]["group_size"] == 32
    assert info["nominal_bits"] == 3
    assert 3 < info["stored_bits"] < 5
    assert len(info["fingerprint"]) == 16
    assert info["quantized_linears"] == 14
    assert json.dumps(info)


def test_method_none_is_the_baseline(tiny_llama: Path, options: dict) -> None:
    model = LLQLM(pretrained=str(tiny_llama), method="none", **options)
    assert model.get_model_info()["llq"] == {"method": "none"}
    assert not any("Quant" in type(module).__name__ for module in model.model.modules())


def test_generation_with_a_packed_cache(tiny_llama: Path, options: dict) -> None:
    """kv_cache_bits: the cache of every generation, which results name; other requests have no
    cache, and are refused.
    """
    asked = {"pretrained": str(tiny_llama), "method": "none", **options}
    lm = LLQLM.create_from_arg_obj({**asked, "kv_cache_bits": 4})
    said = {"nbits": 4, "q_group_size": 64, "residual_length": 128}
    assert lm.get_model_info()["llq"] == {"method": "none", "kv_cache": said}
    caches: list[Any] = []
    own = lm.model.generate

    def generate(**given: Any) -> torch.Tensor:
        out = own(**given, return_dict_in_generate=True)
        caches.append(out.past_key_values)
        return out.sequences

    lm.model.generate = generate
    request = Instance("generate_until", {}, ("the fox", {"until": ["!"], "max_gen_toks": 4}), 0)
    assert len(lm.generate_until([request])) == 1
    assert [type(layer) for layer in caches[0].layers] == [PackedLayer, PackedLayer]
    assert caches[0].layers[0].nbits == 4
    for kind in ("loglikelihood", "loglikelihood_rolling", "llq_windows_nll", "llq_windows_kl"):
        with pytest.raises(LLQError, match=f"kv_cache_bits=4 serves tasks that generate; .*{kind}"):
            getattr(lm, kind)([])
    with pytest.raises(LLQError, match="a cache of 9 bits is outside"):
        LLQLM(**asked, kv_cache_bits=9)


def test_the_generation_config_of_a_checkpoint_changes_no_answer(
    tiny_llama: Path, tmp_path: Path, options: dict
) -> None:
    """transformers fills what a call leaves open from the checkpoint's file; results name what was
    ignored. What a task asks for holds.
    """
    shutil.copytree(tiny_llama, eager := tmp_path / "eager")
    file = eager / "generation_config.json"
    own = json.loads(file.read_text()) if file.exists() else {}
    penal = {"repetition_penalty": 9.0, "min_new_tokens": 3}
    file.write_text(json.dumps({**own, **penal}))
    asked = {"until": ["!"], "max_gen_toks": 12}

    def answer(folder: Path, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        lm = LLQLM(pretrained=str(folder), method="none", **options)
        request = Instance("generate_until", {}, ("the fox", {**asked, **kwargs}), 0)
        return lm.generate_until([request])[0], lm.get_model_info()["llq"]

    plain, said = answer(tiny_llama)
    assert "generation_config_ignored" not in said
    same, said = answer(eager)
    assert same == plain
    assert said["generation_config_ignored"] == penal
    assert (said["answers"], said["empty_answers"]) == (1, int(not same.strip()))
    assert answer(eager, repetition_penalty=9.0)[0] != plain


def test_empty_answers_are_counted(
    tiny_llama: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LLQLM(pretrained=str(tiny_llama), method="none", **options)
    for answers in (["a", " \n"], ["", "b", "c"]):
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, given=answers: given)
        assert lm.generate_until([None] * len(answers)) == answers
    info = lm.get_model_info()["llq"]
    assert (info["answers"], info["empty_answers"]) == (5, 2)


def test_a_simulated_cache_is_called_so(tiny_llama: Path, options: dict) -> None:
    lm = LLQLM(
        pretrained=str(tiny_llama), method="spinquant", bits=4, kv_bits=4, solver="rtn", **options
    )
    info = lm.get_model_info()["llq"]
    assert info["attention"] == {"simulated": True, "key_bits": 4, "value_bits": 4}
    assert "kv_cache" not in info


def test_none_in_a_string_of_model_args_is_the_baseline(tiny_llama: Path) -> None:
    """lm-eval's Python functions read the word as None, which is not the same as nothing given."""
    model = LLQLM.create_from_arg_string(f"pretrained={tiny_llama},method=none", {"device": "cpu"})
    assert model.get_model_info()["llq"] == {"method": "none"}
    with pytest.raises(LLQError, match="method=none takes no options, but bits was given"):
        LLQLM.create_from_arg_string(f"pretrained={tiny_llama},method=none,bits=4")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "gptq", "bitz": 2}, "'bits'"),
        ({"method": "gptk"}, "'gptq'"),
        ({"method": "rtn", "act_order": True}, "act_order"),
        ({}, "method=none"),
        ({"method": "none", "bits": 4}, "takes no options"),
        ({"method": "rtn", "bits": 9}, "1..8"),
    ],
    ids=[
        "misspelt option",
        "misspelt method",
        "option of another method",
        "no method",
        "none with bits",
        "bits",
    ],
)
def test_refused(tiny_llama: Path, options: dict, args: dict, message: str) -> None:
    with pytest.raises(LLQError, match=message):
        LLQLM(pretrained=str(tiny_llama), **args, **options)


@pytest.fixture
def base_with(tiny_llama: Path, tmp_path: Path) -> Callable[[object], Path]:
    """Makes a copy of the tiny Llama whose config.json has this `quantization_config`."""

    def make(section: object) -> Path:
        base = shutil.copytree(tiny_llama, tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        return base

    return make


def test_a_null_quantization_config_is_none(
    base_with: Callable[[object], Path], options: dict, tmp_path: Path
) -> None:
    base = base_with(None)
    LLQLM(pretrained=str(base), method="none", device="cpu")
    LLQLM(pretrained=str(base), method="rtn", bits=3, **options)
    quantize_checkpoint(str(base), tmp_path / "packed", build("rtn", bits=3), Calibration())
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "llq_rtn"
    assert count_quantized(QuantizedLlama.from_pretrained(base, method="rtn", bits=3)) == 14


@pytest.mark.parametrize("section", [[], "gptq", 5, True])
def test_a_quantization_config_of_another_kind_is_named(
    base_with: Callable[[object], Path], tmp_path: Path, section: object
) -> None:
    base = base_with(section)
    said = "config.json: quantization_config is .* not an object"
    with pytest.raises(LLQError, match=said):
        LLQLM(pretrained=str(base), method="none", device="cpu")
    with pytest.raises(LLQError, match=said):
        quantize_checkpoint(str(base), tmp_path / "packed", build("rtn"), Calibration())
    with pytest.raises(LLQError, match=said):
        inspect_checkpoint(base)


def test_packed_checkpoint_is_scored_as_it_is(
    tiny_llama: Path, options: dict, tmp_path: Path
) -> None:
    quantize_checkpoint(str(tiny_llama), tmp_path / "packed", build("rtn", bits=2), Calibration())
    model = LLQLM(pretrained=str(tmp_path / "packed"), device="cpu")
    assert model.get_model_info()["llq"]["config"]["bits"] == 2
    LLQLM(pretrained=str(tmp_path / "packed"), method="rtn", bits=2, device="cpu")
    with pytest.raises(LLQError, match="bits=2"):
        LLQLM(pretrained=str(tmp_path / "packed"), method="rtn", bits=4, device="cpu")
    with pytest.raises(LLQError, match="method='rtn'"):
        LLQLM(pretrained=str(tmp_path / "packed"), method="gptq", device="cpu")


def test_a_model_with_a_dense_layer_left_is_not_scored(tiny_llama: Path, options: dict) -> None:
    model = LLQLM(pretrained=str(tiny_llama), method="rtn", **options).model
    check_quantized(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(2, 2)
    with pytest.raises(LLQError, match="13 linears are packed"):
        check_quantized(model)


def launch(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command; a second time, with a warning, where it fails: processes sometimes fail to
    meet over sockets.
    """
    for attempt in (1, 2):
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=600, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        warnings.warn(f"attempt {attempt} failed:\n{done.stderr[-6000:]}", stacklevel=1)
    pytest.fail("failed twice; see the warnings")


def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    """The command as users type it, from another folder; the second run takes the first one's
    quantized model.
    """
    command = [
        "-m",
        "lm_eval",
        "--model",
        "llq",
        "--model_args",
        "pretrained=demo,method=rtn,bits=3",
    ]
    command += [
        "--tasks",
        "llq_demo,llq_demo_kl",
        "--batch_size",
        "16",
        "--limit",
        "8",
        "--output_path",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "LLQ_CACHE": str(tmp_path / "cache")}
    environment["GLOO_SOCKET_IFNAME"] = "lo"  # both processes are here
    launchers = {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    found = {}
    for name, launcher in launchers.items():
        out = tmp_path / name
        launch([sys.executable, *launcher, *command, str(out)], tmp_path, environment)
        (results,) = out.rglob("results*.json")
        found[name] = json.loads(results.read_text())
    one, two = (found[name]["results"] for name in launchers)
    assert two["llq_demo_ppl"]["token_perplexity,none"] == pytest.approx(
        one["llq_demo_ppl"]["token_perplexity,none"], rel=1e-6
    )
    assert two["llq_demo_mc"]["acc,none"] == one["llq_demo_mc"]["acc,none"]
    assert one["llq_demo_kl"]["kl,none"] > 0
    for name in ("kl", "kl_median", "kl_p99", "kl_max", "top1_agreement"):
        figure = one["llq_demo_kl"][f"{name},none"]
        assert two["llq_demo_kl"][f"{name},none"] == pytest.approx(figure, rel=1e-4)
    assert found["two"]["config"]["llq"]["method"] == "rtn"


def test_the_table_has_its_headers() -> None:
    """Another release of a library far below lm-eval prints A, B, C instead."""
    from lm_eval.utils import make_table

    results = {
        "results": {"llq_demo_mc": {"alias": "llq_demo_mc", "acc,none": 0.5}},
        "versions": {"llq_demo_mc": 1},
        "n-shot": {"llq_demo_mc": 0},
        "higher_is_better": {"llq_demo_mc": {"acc": True}},
    }
    header = make_table(results).splitlines()[0]
    named = [word.strip() for word in header.split("|") if word.strip()]
    assert named == ["Tasks", "Version", "Filter", "n-shot", "Metric", "Value", "Stderr"]
