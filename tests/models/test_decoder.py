"""A block is run for the inputs of its linears, and no further than the last of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llq_hf.models.decoder import InputsOf


class Block(nn.Module):
    """Two linears; the second is called twice, and something is counted behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.ends = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.down(self.up(x) * scale)
        x = self.down(torch.cat([x, x], -1))
        self.ends += 1
        return x


def inputs_of(block: nn.Module, names: list[str], runs: int) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    modules = {name: block.get_submodule(name) for name in names}
    run = InputsOf(block, modules, lambda name, x: seen.append((name, x.clone())))
    x_T4 = torch.randn(runs, 3, 4, generator=torch.Generator().manual_seed(0))
    for x in x_T4:
        run(x, scale=2.0)
    return seen


def test_every_call_is_seen_in_every_run() -> None:
    block = Block()
    seen = inputs_of(block, ["up", "down"], 3)
    assert [name for name, _ in seen] == ["up", "down", "down"] * 3
    assert block.ends == 1  # only the first run was whole
    whole = Block()
    whole.load_state_dict(block.state_dict())
    expected: list[Tensor] = []
    for name in ("up", "down"):
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, args: expected.append(args[0])
        )
    for x in torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0)):
        whole(x, scale=2.0)
    assert all(torch.equal(a, b) for (_, a), b in zip(seen, expected, strict=True))


def test_an_early_linear_stops_the_run_early() -> None:
    block = Block()
    calls: list[int] = []
    block.down.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs_of(block, ["up"], 5)
    assert (len(calls), block.ends) == (2, 1)


def test_no_hook_stays_behind() -> None:
    block = Block()
    inputs_of(block, ["up", "down"], 2)
    assert not block.up._forward_pre_hooks
    assert not block.down._forward_pre_hooks
    block(torch.zeros(1, 4))
    assert block.ends == 2


def test_errors_of_the_block_are_not_swallowed() -> None:
    block = Block()
    run = InputsOf(block, {"up": block.up}, lambda name, x: None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(torch.zeros(1, 5))


def test_a_block_whose_weights_are_moved_runs_as_a_whole() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    block = Block()
    add_hook_to_module(block.down, ModelHook())
    inputs_of(block, ["up"], 3)
    assert block.ends == 3


def test_statistics_are_those_of_whole_runs(
    tiny_llama: Path, calibration_npy: Path, monkeypatch: Any
) -> None:
    """Checkpoints have the same bytes as with every pass run to its end."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from llq_hf import build
    from llq_hf.engine.in_memory import quantize_model

    ids = torch.from_numpy(np.load(calibration_npy).astype("int64"))

    def packed() -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize_model(model, build("gptq", "best", bits=3, group_size=32), ids)
        return dict(model.state_dict())

    early = packed()
    monkeypatch.setattr(InputsOf, "__call__", _whole)
    late = packed()
    assert early.keys() == late.keys()
    assert all(torch.equal(early[name], late[name]) for name in early)


def _whole(self: InputsOf, *args: Any, **kwargs: Any) -> None:
    from llq_hf.models.decoder import watch_inputs

    with watch_inputs(self.modules, self.see):
        self.block(*args, **kwargs)
