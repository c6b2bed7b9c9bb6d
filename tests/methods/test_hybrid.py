"""Hybrid: which method serves which linear, by rules and by allocation; stored bits within the
budget; runs that are killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import checks
from torch import Tensor
from transformers import AutoModelForCausalLM

from llq_hf.checkpoints.packed import read_report
from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.engine.whole_model import resolve_method
from llq_hf.hosts.hf_quantizer import CONFIGS
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Flow, State
from llq_hf.methods import METHODS, build
from llq_hf.methods.hybrid import ScopedState, parse_method, parse_rules, spell_method

CHEAP = {"candidates": "rtn:2:group_size=32+rtn:3:group_size=32+rtn:6:group_size=32", "samples": 4}
MIXED = "*.down_proj=rtn:4:group_size=64+*.0.self_attn.*=gptq:2:group_size=64+*=quip:3"


# --- specs and rules as text ----------------------------------------------------------------------


def test_a_spelled_method_is_parsed_back():
    for spec, expected in {
        "gptq:2": build("gptq", bits=2),
        "gptq:3:group_size=64:preset=best": build("gptq", "best", bits=3, group_size=64),
        "rtn:8:sym=true": build("rtn", bits=8, sym=True),
        "pb_llm:1.7:salience=magnitude": build("pb_llm", bits=1.7, salience="magnitude"),
    }.items():
        assert parse_method(spec) == expected
        assert parse_method(spell_method(expected)) == expected
    for name, method in METHODS.items():
        text = spell_method(method.build("best"))
        assert not set("+,") & set(text) or name == "hybrid", text


def test_rules_may_have_commas_and_the_first_that_fits_serves():
    method = build("hybrid", rules="*.layers.0.*=rtn:8,*.down_proj=rtn:4+*=rtn:3")
    assert parse_rules("a=rtn:8,b=rtn:2+c=x:1") == [("a", "rtn:8"), ("b", "rtn:2"), ("c", "x:1")]
    for name, bits in {
        "layers.0.mlp.down_proj": 8,
        "layers.1.mlp.down_proj": 4,
        "layers.1.mlp.up_proj": 3,
    }.items():
        assert method.for_linear(f"model.{name}").bits == bits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rules": "*.down_proj"}, "not of the form PATTERN=METHOD:BITS"),
        ({"rules": "*=gtpq:4"}, "did you mean 'gptq'"),
        ({"rules": "*=gptq"}, "'' is no int"),
        ({"rules": "*=gptq:four"}, "'four' is no int"),
        ({"rules": "*=gptq:2.5"}, "'2.5' is no int"),
        ({"rules": "*=gptq:11"}, "bits=11"),
        ({"rules": "*=gptq:4:group=3"}, "did you mean 'group_size'"),
        ({"rules": "*=rtn:4:sym=maybe"}, "'maybe' is no bool"),
        ({"rules": "*=spinquant:4"}, "the model as a whole"),
        ({"rules": "*=db_llm:2"}, "the model as a whole"),
        ({"rules": "*=smoothquant:8"}, None),
        ({"candidates": "gptq:2+omniquant:3"}, "each linear alone"),
        ({"candidates": "gptq:2+hybrid:3"}, "the model as a whole"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_wrong_rules_and_candidates_are_refused(options: dict[str, Any], words: str | None):
    if words is None:
        build("hybrid", **options)
        return
    with pytest.raises(LLQError, match=words):
        build("hybrid", **options)


def test_rules_must_fit_and_cover_the_model(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(
        LLQError, match=r"the rule '\*\.donw_proj' fits no linear; they are called 'model.layers.0"
    ):
        build("hybrid", rules="*.donw_proj=rtn:4").bound_to(model)
    with pytest.raises(
        LLQError,
        match=r"no rule serves model.layers.0.self_attn.q_proj, and there are no candidates",
    ):
        build("hybrid", rules="*.mlp.*=rtn:4", candidates="").bound_to(model)


def test_bound_to_a_model_bits_are_the_average_of_the_rules(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    method = build("hybrid", rules="*=rtn:4:group_size=64:preset=best").bound_to(model)
    assert method.rules == "*=rtn:4:group_size=64:search_range=true"
    assert 4.3 < method.bits < 6, "of this odd model"
    assert not method.learns
    assert method.bound_to(model) == method


def test_one_walk_serves_all_methods():
    mixed = build(
        "hybrid", rules="*.down_proj=awq:4+*.up_proj=gptq:4:preset=best+*=rtn:3", candidates=""
    )
    assert mixed.flow is Flow.BOTH
    assert mixed.sequential
    assert mixed.calibrated
    assert build("hybrid", rules="*=awq:4", candidates="").flow is Flow.DENSE
    assert not build("hybrid", rules="*=rtn:4", candidates="").calibrated


# --- rules ----------------------------------------------------------------------------------------


def test_every_linear_gets_what_its_method_gives_alone(tiny_llama: Path, calibration_ids: Tensor):
    """In the first block, whose inputs are the same, the bits are those of a run of that method
    alone.
    """

    def first_block(name: str, **options: Any) -> dict[str, QuantLinear]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize_model(model, build(name, **options), calibration_ids)
        return {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, QuantLinear) and ".layers.0." in n
        }

    mixed = first_block("hybrid", rules=MIXED)
    alone = {
        "rtn": first_block("rtn", bits=4, group_size=64),
        "gptq": first_block("gptq", bits=2, group_size=64),
        "quip": first_block("quip", bits=3),
    }
    assert {module.method.name for module in mixed.values()} == set(alone)
    for name, module in mixed.items():
        checks.check_same_bits(module.packed(), alone[module.method.name][name].packed())


def test_methods_that_work_on_blocks_share_one(tiny_llama: Path, calibration_ids: Tensor):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rules = (
        "*.self_attn.*=omniquant:4:epochs=1",
        "*.down_proj=efficient_qat:2:tune_epochs=0:epochs=1",
        "*=awq:3:ratios=2",
    )
    method = build("hybrid", rules="+".join(rules))
    records = quantize_model(model, method, calibration_ids[:4])
    served = {record["name"].rpartition(".")[2]: record["served_by"] for record in records}
    assert served["q_proj"] == "omniquant:4"
    assert served["down_proj"] == "efficient_qat:2"
    assert served["up_proj"] == "awq:3"
    assert all(record["weight_error"] < 0.7 for record in records)


def test_scoped_states_do_not_share_tensors():
    class Memory(State):
        kept: dict[str, Tensor] | None = None

        def load(self) -> dict[str, Tensor] | None:
            return self.kept

        def save(self, tensors: dict[str, Tensor]) -> None:
            self.kept = tensors

    memory = Memory()
    first, second = ScopedState(memory, "omniquant:2"), ScopedState(memory, "omniquant:3")
    assert first.load() is None
    first.save({"losses": torch.tensor([1.0])})
    assert second.load() is None
    second.save({"losses": torch.tensor([2.0])})
    assert first.load() == {"losses": torch.tensor([1.0])}
    assert second.load() == {"losses": torch.tensor([2.0])}


# --- allocation -----------------------------------------------------------------------------------


def bits_of(records: list[dict[str, Any]]) -> float:
    sizes = [record["shape"][0] * record["shape"][1] for record in records]
    return sum(r["stored_bits"] * n for r, n in zip(records, sizes, strict=True)) / sum(sizes)


def test_the_budget_of_stored_bits_holds_and_units_stay_together(
    tiny_llama: Path, calibration_ids: Tensor
):
    for bits in (4.2, 5.0, 6.5):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        records = quantize_model(model, build("hybrid", bits=bits, **CHEAP), calibration_ids)
        assert bits - 0.5 < bits_of(records) <= bits
        served = {record["name"]: record["served_by"] for record in records}
        assert len(set(served.values())) > 1
        for block in (f"model.layers.{i}" for i in (0, 1)):
            assert len({served[f"{block}.self_attn.{letter}_proj"] for letter in "qkv"}) == 1
            assert served[f"{block}.mlp.gate_proj"] == served[f"{block}.mlp.up_proj"]


def test_rules_pin_and_candidates_serve_the_rest(tiny_llama: Path, calibration_ids: Tensor):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    method = build("hybrid", bits=5.0, rules="*.0.mlp.down_proj=rtn:8:group_size=32", **CHEAP)
    records = quantize_model(model, method, calibration_ids)
    assert bits_of(records) <= 5.0
    served = {record["name"]: record["served_by"] for record in records}
    assert served["model.layers.0.mlp.down_proj"] == "rtn:8"
    assert "rtn:8" not in [
        by for name, by in served.items() if name != "model.layers.0.mlp.down_proj"
    ]


def test_a_budget_that_cannot_be_met_is_refused(tiny_llama: Path, calibration_ids: Tensor):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(LLQError, match=r"bits=2 is too few for these rules and candidates"):
        quantize_model(model, build("hybrid", bits=2, **CHEAP), calibration_ids)


def test_bits_go_where_rounding_costs_most(tiny_llama: Path, calibration_ids: Tensor):
    """Linears whose output the next one ignores get the fewest bits, and others get the rest."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    method, learned = resolve_method(model, build("hybrid", bits=5.0, **CHEAP), calibration_ids)
    assert int(learned["model.layers.1.mlp.up_proj"]) == 0
    assert int(learned["model.layers.1.mlp.gate_proj"]) == 0
    assert max(map(int, learned.values())) == 2
    assert not method.learns


@pytest.fixture
def files(tiny_llama: Path, calibration_npy: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Run (or resume) a run into a folder, and return the digests of its files."""

    def run(name: str, progress: Progress | None = None) -> dict[str, str]:
        method = build(
            "hybrid",
            bits=5.0,
            **{**CHEAP, "candidates": CHEAP["candidates"] + "+gptq:4:group_size=32"},
        )
        data = Calibration(str(calibration_npy), samples=8)
        quantize_checkpoint(str(tiny_llama), tmp_path / name, method, data, None, progress)
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((tmp_path / name).iterdir())
        }

    return run


class Stop(Progress):
    """Raises KeyboardInterrupt at the first linear whose name starts with `at`; lists stages."""

    def __init__(self, at: str = "") -> None:
        self.at = at
        self.stages: list[str] = []

    def stage(self, text: str, total: int = 0) -> None:
        self.stages.append(text)

    def linear(self, name: str) -> None:
        if self.at and name.startswith(self.at):
            raise KeyboardInterrupt


def test_a_killed_run_keeps_its_allocation(files: Callable[..., dict[str, str]], tmp_path: Path):
    whole, resumed = files("whole"), Stop()
    with pytest.raises(KeyboardInterrupt):
        files("out", Stop("model.layers.1"))
    assert files("out", resumed) == whole
    assert "costs of the candidates" not in resumed.stages
    assert files("out", resumed) == whole, "a finished run is taken as it is"


def test_the_allocation_is_in_the_config_and_protected(
    files: Callable[..., dict[str, str]],
    tiny_llama: Path,
    calibration_ids: Tensor,
    calibration_npy: Path,
    tmp_path: Path,
):
    files("out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    section = config["quantization_config"]
    assert section["quant_method"] == "llq_hybrid"
    served = {r["name"]: r["served_by"] for r in read_report(tmp_path / "out")["linears"]}
    for pattern, spec in parse_rules(section["allocation"]):
        method = parse_method(spec)
        assert served[pattern] == f"{method.name}:{method.bits}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    options = {key: section[key] for key in ("bits", "candidates", "samples")}
    direct = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=CONFIGS["hybrid"](
            **options, calibration=str(calibration_npy), calibration_samples=8
        ),
    ).eval()
    assert direct.config.quantization_config.method.allocation == section["allocation"]
    with torch.no_grad():
        assert torch.equal(loaded(calibration_ids).logits, direct(calibration_ids).logits)
    section["allocation"] = (
        section["allocation"].replace("rtn:2", "rtn:3", 1).replace("rtn:6", "rtn:3", 1)
    )
    path.write_text(json.dumps(config))
    with pytest.raises(LLQError, match="edited"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
