"""SpinQuant: equal to the literal solver, exact rotations through every path, activations,
learning, outliers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import checks
from reference.spinquant import dynamic, spinquant
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import PassListener, Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.in_memory import quantize_model
from llq_hf.layers.linear import QuantLinear
from llq_hf.method import Job, stored_bits
from llq_hf.methods import build
from llq_hf.methods.spinquant import SpinQuant
from llq_hf.models.sequences import TextSequences
from llq_hf.numerics.rotations import hadamard
from llq_hf.numerics.stats import Hessian

VARIANTS: dict[str, dict[str, Any]] = {
    "study": {},
    "without the search": {"w_clip": False},
    "groups of 16 that see stale weights": {"group_size": 16},
    "act order": {"act_order": True},
    "act order in groups of 16": {"group_size": 16, "act_order": True},
    "levels of the full range": {"levels": "full"},
    "levels at half steps": {"levels": "halves"},
    "half steps in act order": {"levels": "halves", "act_order": True},
    "half the damping": {"damp": 0.005},
    "to nearest": {"solver": "rtn"},
    "to nearest in groups of 16": {"solver": "rtn", "group_size": 16, "levels": "halves"},
}
DOWN, OUT = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"


def inputs(in_features: int, dead: tuple[int, ...] = ()) -> Tensor:
    """Inputs [T, I] with correlations but no tiny eigenvalue, so that fp32 and fp64 round alike."""
    random = torch.Generator().manual_seed(in_features)
    mix_II = (
        torch.eye(in_features)
        + 0.3 * torch.randn(in_features, in_features, generator=random) / in_features**0.5
    )
    x_TI = torch.randn(4 * in_features, in_features, generator=random) @ mix_II
    x_TI *= 0.5 + torch.rand(in_features, generator=random)
    x_TI[:, list(dead)] = 0
    return x_TI


def hessian_of(x_TI: Tensor) -> Hessian:
    stat = Hessian(x_TI.shape[1], x_TI.device)
    stat.update(x_TI, 4)
    return stat


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_literal_solver(options: dict[str, Any], bits: int):
    weight_OI, stat = checks.weight(8, 136), hessian_of(inputs(136, dead=(3, 20)))
    method = build("spinquant", bits=bits, scale_bits=32, **options)
    restored_OI = checks.restore(method, method.quantize(weight_OI, stat, Job("test")), weight_OI)
    own = {key: value for key, value in options.items() if key != "solver"}
    H = None if options.get("solver") == "rtn" else stat.H_II.numpy()
    expected = torch.from_numpy(spinquant(weight_OI.numpy(), H, bits, **own))
    off = (restored_OI.double() - expected).abs() > 1e-5
    assert off.double().mean() <= 0.004, "a tie or two may round differently in fp32"


@pytest.mark.parametrize("in_features", [96, 172], ids=["Paley", "random orthogonal"])
def test_down_proj_is_solved_and_run_behind_the_hadamard(in_features: int):
    weight_OI, x_TI = checks.weight(8, in_features), inputs(in_features)
    turn = hadamard(in_features, x_TI.device)
    root = build("spinquant", bits=3)
    down = root.for_linear(DOWN)
    packed = down.quantize(weight_OI, hessian_of(x_TI), Job("test"))
    plain = root.quantize(turn.apply(weight_OI), hessian_of(turn.apply(x_TI)), Job("test"))
    restored_OI = checks.restore(down, packed, weight_OI)
    turned_OI = turn.apply(restored_OI)
    off = (turned_OI - checks.restore(root, plain, weight_OI)).abs() > 1e-4
    assert off.double().mean() < 0.01
    assert checks.relative_errors(weight_OI, restored_OI)[0] < 0.5
    for dtype in (torch.float32, torch.bfloat16):
        checks.check_linear(down, packed, weight_OI, dtype)
    checks.check_gradient(down, packed, weight_OI)
    without = build("spinquant", bits=3, r4=False)
    assert without.for_linear(DOWN) == without
    checks.check_same_bits(
        without.for_linear(DOWN).quantize(weight_OI, hessian_of(x_TI), Job("test")),
        without.quantize(weight_OI, hessian_of(x_TI), Job("test")),
    )


def test_roles_are_those_of_the_projections_and_keep_the_options():
    method = build("spinquant", bits=3, a_bits=4, head_dim=16)
    for name in (DOWN, OUT, "model.layers.0.mlp.up_proj"):
        assert method.for_linear(name).to_dict() == method.to_dict()
    assert [method.for_linear(name).turns for name in (DOWN, OUT, "x.q_proj")] == [
        True,
        False,
        False,
    ]
    assert [method.for_linear(name).heads for name in (DOWN, OUT, "x.q_proj")] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("a_sym", [False, True])
def test_inputs_are_rounded_token_by_token_and_head_by_head(a_sym: bool):
    weight_OI, x_TI = checks.weight(8, 48), inputs(48)[:5] + 0.5
    root = build("spinquant", bits=4, a_bits=4, a_sym=a_sym, head_dim=12)
    turn = hadamard(48, x_TI.device)
    for name, expected in {
        "x.q_proj": [dynamic(x.tolist(), 4, a_sym) for x in x_TI],
        DOWN: [dynamic(x.tolist(), 4, a_sym) for x in turn.apply(x_TI)],
        OUT: [
            [
                v
                for head in x.view(-1, 12)
                for v in dynamic(head.tolist(), 4, a_sym, zero_inside=False)
            ]
            for x in x_TI
        ],
    }.items():
        method = root.for_linear(name)
        packed = method.quantize(weight_OI, hessian_of(inputs(48)), Job("test"))
        stored_OI = method.grid.unpack(packed, 48)
        y = method.linear(x_TI[None], packed, None, 8)[0]
        assert torch.allclose(y, torch.tensor(expected) @ stored_OI.T, atol=1e-4), name


def test_keys_are_turned_and_rounded_together_values_by_head():
    assert build("spinquant").attention is None
    attention = build("spinquant", kv_bits=4).attention
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 3, 8, generator=random) for heads in (4, 2, 2))
    q, k, v = attention.transform(query, key, value)
    turn = hadamard(8, query.device)
    assert torch.allclose(q, turn.apply(query), atol=1e-6)
    for t in range(3):
        token = turn.apply(key)[0, :, t].flatten().tolist()
        assert torch.allclose(k[0, :, t].flatten(), torch.tensor(dynamic(token, 4)), atol=1e-5)
        for head in range(2):
            rounded = dynamic(value[0, head, t].tolist(), 4, zero_inside=False)
            assert torch.allclose(v[0, head, t], torch.tensor(rounded), atol=1e-5)
    _, k, _ = build("spinquant", kv_bits=4, key_heads=True).attention.transform(query, key, value)
    for head in range(2):
        rounded = dynamic(turn.apply(key)[0, head, 1].tolist(), 4)
        assert torch.allclose(k[0, head, 1], torch.tensor(rounded), atol=1e-5)


def test_stored_bits_are_codes_and_scales_alone():
    assert stored_bits(build("spinquant").layout(4096, 4096), 4096, 4096) == 4 + 16 / 4096
    assert (
        stored_bits(build("spinquant", group_size=128).layout(4096, 14336), 4096, 14336)
        == 4 + 16 / 128
    )
    assert build("spinquant", rotations="learned", a_bits=4).layout(8, 64) == build(
        "spinquant"
    ).layout(8, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rotations": "spun"}, "'spun'.*hadamard, learned"),
        ({"solver": "awq"}, "'awq'.*gptq, rtn"),
        ({"levels": "odd"}, "'odd'"),
        ({"a_bits": 1}, "bits=1"),
        ({"kv_bits": 40}, "bits=40"),
        ({"damp": 2.0}, "damp=2.0"),
        ({"learn_steps": 0}, "learn_steps=0"),
        ({"learn_rate": 0.0}, "learn_rate=0.0"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"group_size": 0}, "group_size=0"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], said: str):
    with pytest.raises(LLQError, match=said):
        build("spinquant", **options)


# --- whole models ---------------------------------------------------------------------------------


def dense(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def relative(model: nn.Module, other: nn.Module, ids: Tensor) -> float:
    expected = other(ids).logits
    return float((model(ids).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_tied", "tiny_llama_biased"])
def test_eight_bits_are_nearly_the_dense_model(
    request: pytest.FixtureRequest, base: str, calibration_ids: Tensor
):
    """Weights, activations, keys and values rounded behind R1 to R4: a rotation gone wrong would
    show at once.
    """
    original = dense(request.getfixturevalue(base))
    model = copy.deepcopy(original)
    quantize_model(model, build("spinquant", bits=8, a_bits=8, kv_bits=8, solver="rtn"), None)
    assert relative(model, original, calibration_ids) < 0.04
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_seeds_give_other_rotations_and_the_same_ones_again(
    tiny_llama: Path, calibration_ids: Tensor
):
    def embedding(seed: int) -> Tensor:
        model = dense(tiny_llama)
        quantize_model(model, build("spinquant", bits=8, solver="rtn", seed=seed), None)
        return model.model.embed_tokens.weight

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.allclose(embedding(0), embedding(1), atol=1e-2)


def test_the_report_tells_of_the_rewrite_and_config_of_head_dim(
    tiny_llama_tied: Path, calibration_npy: Path, tmp_path: Path
):
    method = build("spinquant", a_bits=8)
    report = quantize_checkpoint(
        str(tiny_llama_tied), tmp_path / "out", method, Calibration(str(calibration_npy), 8)
    )
    assert report["rewrite"] == {"rotations": "hadamard", "seed": 0, "untied": True}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["head_dim"] == 16
    with pytest.raises(LLQError, match="head_dim=8, but the model's is 16"):
        build("spinquant", a_bits=8, head_dim=8).bound_to(dense(tiny_llama_tied))


def test_models_that_cannot_be_turned_are_refused_before_anything_is_read(
    tmp_path: Path, calibration_npy: Path
):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "vocab_size": 320,
    }
    Gemma2ForCausalLM(
        Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(LLQError, match="no rotation passes"):
        quantize_checkpoint(
            str(tmp_path),
            tmp_path / "out",
            build("spinquant"),
            Calibration(str(calibration_npy), 8),
        )
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_llava_is_quantized_with_its_projector_turned(tmp_path: Path):
    from models.test_residual_stream import llava, logits, randomized
    from transformers import AutoModelForImageTextToText

    from llq_hf.hosts.hf_quantizer import CONFIGS

    original = randomized(llava)
    original.save_pretrained(tmp_path / "dense")
    config = CONFIGS["spinquant"](bits=8, a_bits=8, solver="rtn")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "dense", quantization_config=config
    ).eval()
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    before, after = logits(original), logits(model)
    assert (after - before).norm() < 0.04 * before.norm()


@pytest.fixture(scope="module")
def outliers() -> tuple[nn.Module, Tensor]:
    """The demo model, whose channels are spread by powers of two, and random text for it."""
    import llq_hf.demo

    model = dense(Path(llq_hf.demo.__file__).parent / "llama")
    ids = torch.randint(
        0, model.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(0)
    )
    return model, ids


class Naive(SpinQuant):
    """The same grids, with nothing turned."""

    def rewrite(self, model: nn.Module, learned: Any) -> None:
        return None


@torch.no_grad()
def test_rotations_save_four_bit_activations_of_a_model_with_outliers(
    outliers: tuple[nn.Module, Tensor],
):
    original, ids = outliers
    losses = {}
    for kind, options in ((SpinQuant, {}), (Naive, {"r4": False})):
        model = copy.deepcopy(original)
        quantize_model(model, kind(bits=4, a_bits=4, solver="rtn", **options), None)
        expected, got = (F.log_softmax(m(ids).logits, -1) for m in (original, model))
        losses[kind] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert losses[SpinQuant] < 0.5 * losses[Naive], losses


# --- learning -------------------------------------------------------------------------------------

LEARNED: dict[str, Any] = {
    "bits": 2,
    "rotations": "learned",
    "learn_steps": 4,
    "solver": "rtn",
    "w_clip": False,
}


def learn(model: nn.Module, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    method = build("spinquant", **{**LEARNED, **options})
    data = TextSequences(ids)
    return method.learn(copy.deepcopy(model), data, lambda module: None, PassListener())


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_tied"])
def test_learned_rotations_are_orthogonal_and_of_less_loss(
    request: pytest.FixtureRequest, base: str, calibration_ids: Tensor
):
    model = dense(request.getfixturevalue(base))
    learned = learn(model, calibration_ids, learn_steps=8)
    for R in (learned["r1"], *learned["r2"]):
        assert torch.allclose(R @ R.T, torch.eye(len(R), dtype=R.dtype), atol=1e-10)
    assert learned["r1"].shape == (96, 96)
    assert learned["r2"].shape == (2, 16, 16)
    assert learned["losses"][-1] < learned["losses"][0]
    start = learn(model, calibration_ids, learn_steps=1, learn_rate=1e-12)
    assert not torch.allclose(learned["r1"], start["r1"], atol=1e-3)


def test_the_gradient_of_a_rotation_is_that_of_the_loss(tiny_llama: Path, calibration_ids: Tensor):
    """Against differences of the loss along the manifold, with no rounding in the way."""
    from llq_hf.methods.spinquant import _Student
    from llq_hf.models.residual_stream import residual_of

    model = dense(tiny_llama).double().requires_grad_(False)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, 96))
    method = build("spinquant", bits=8, a_bits=15)
    student = _Student(method, residual_of(model), model, lambda module: None)
    turns = [torch.eye(n, dtype=torch.float64) for n in (96, 16, 16)]
    loss, gradients = student.gradients(turns, TextSequences(calibration_ids), [0])
    # Without rounding the loss does not depend on rotations: all of the gradient is normal to the
    # manifold.
    for R, G in zip(turns, gradients, strict=True):
        assert G.norm() > 1e-6
        tangent = G - R @ (G.T @ R + R.T @ G) / 2
        assert tangent.norm() < 0.05 * G.norm()
    random = torch.Generator().manual_seed(0)
    other = [
        torch.linalg.qr(torch.randn(R.shape, dtype=R.dtype, generator=random))[0] for R in turns
    ]
    assert student.gradients(other, TextSequences(calibration_ids), [0])[0] == pytest.approx(
        loss, rel=1e-3
    )


class Watch(Progress):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str, total: int = 0) -> None:
        self.stages.append(text)


class StoppedError(Exception):
    pass


class StopAtBlocks(Watch):
    def linear(self, name: str) -> None:
        if name.startswith("model.layers.1."):
            raise StoppedError


def test_a_streamed_run_learns_once_and_gives_the_live_models_bits(
    tiny_llama_tied: Path, calibration_npy: Path, calibration_ids: Tensor, tmp_path: Path
):
    method = build("spinquant", **{**LEARNED, "a_bits": 4, "kv_bits": 4})
    data = Calibration(str(calibration_npy), 8)

    def run(out: Path, watch: Watch) -> Path:
        quantize_checkpoint(str(tiny_llama_tied), out, method, data, progress=watch)
        return out

    interrupted = tmp_path / "interrupted"
    with pytest.raises(StoppedError):
        run(interrupted, StopAtBlocks())
    again = Watch()
    run(interrupted, again)
    assert "learning rotations" not in again.stages
    fresh = Watch()
    run(tmp_path / "whole", fresh)
    assert "learning rotations" in fresh.stages
    names = sorted(file.name for file in interrupted.iterdir())
    assert all(
        (interrupted / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in names
    )
    losses = json.loads((interrupted / "llq_report.json").read_text())["rewrite"]["learning_loss"]
    assert len(losses) == 2

    live = dense(tiny_llama_tied)
    quantize_model(live, method, calibration_ids)
    stored = {
        key: t for file in interrupted.glob("*.safetensors") for key, t in load_file(file).items()
    }
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    loaded = dense(interrupted)
    with torch.no_grad():
        assert torch.equal(loaded(calibration_ids).logits, live(calibration_ids).logits)


def test_learning_without_data_is_refused(tiny_llama: Path):
    with pytest.raises(LLQError, match="needs calibration data"):
        quantize_model(dense(tiny_llama), build("spinquant", **LEARNED), None)


def test_the_fallback_is_noted():
    stat = Hessian(40, torch.device("cpu"))
    stat.sum_II, stat.sequences = -torch.eye(40) * 1e6 + torch.ones(40, 40), 1
    job, weight_OI = Job("x"), checks.weight(8, 40)
    packed = build("spinquant", bits=3).quantize(weight_OI, stat, job)
    assert job.notes["fallback"] == "rtn"
    checks.check_same_bits(
        packed, build("spinquant", bits=3, solver="rtn").quantize(weight_OI, None, Job("test"))
    )


def test_preflight_counts_the_memory_of_learning():
    from transformers import LlamaConfig, LlamaForCausalLM

    from llq_hf.engine.estimates import expected_peak_bytes
    from llq_hf.engine.options import RunOptions

    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))  # 7B
    plain, learning = (
        expected_peak_bytes(
            skeleton, build("spinquant", rotations=kind), None, torch.bfloat16, RunOptions()
        )
        for kind in ("hadamard", "learned")
    )
    assert plain < 10 * 2**30 < 50 * 2**30 < learning
