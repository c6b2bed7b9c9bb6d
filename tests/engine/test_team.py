"""Two processes make the bytes of one, by torchrun's own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llq_hf.common.errors import LLQError
from llq_hf.common.progress import Progress
from llq_hf.data.calibration import Calibration
from llq_hf.engine.execute import quantize_checkpoint
from llq_hf.engine.options import RunOptions
from llq_hf.engine.prepare import prepare
from llq_hf.engine.team import Team, batches_of, edges_of, pack_message, unpack_message
from llq_hf.kernels.bitpack import unpack
from llq_hf.methods import build
from llq_hf.numerics.stats import AbsMax, Hessian, PairedHessian, Samples, Stat

METHOD = {"bits": 3, "group_size": 32}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def codes(folder: Path) -> torch.Tensor:
    tensors = [t for file in sorted(folder.glob("*.safetensors")) for t in load_file(file).values()]
    return torch.cat(
        [
            unpack(t, 3, t.shape[1] * 32 // 3 // 32 * 32).flatten()
            for t in tensors
            if t.dtype == torch.int32 and t.ndim == 2
        ]
    )


def test_two_processes_make_the_bytes_of_one(tiny_llama, calibration_npy, tmp_path):
    method, calibration = build("gptq", **METHOD), Calibration(str(calibration_npy), 8, 128)
    one, two, plain = tmp_path / "one", tmp_path / "two", tmp_path / "plain"
    quantize_checkpoint(str(tiny_llama), one, method, calibration, RunOptions(shards=2))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [
        "-m",
        "llq_hf",
        "quantize",
        str(tiny_llama),
        str(two),
        "--method",
        "gptq",
        "--bits",
        "3",
    ]
    command += [
        "--group-size",
        "32",
        "--calibration",
        str(calibration_npy),
        "--calibration-samples",
        "8",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*torchrun, *command, "--device", "cpu", "--no-speak"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(two) == files(one)
    quantize_checkpoint(str(tiny_llama), plain, method, calibration)  # one sum: other last bits
    assert (codes(one) == codes(plain)).float().mean() > 0.99


@pytest.mark.parametrize("name", ["awq", "omniquant", "slim_llm", "db_llm", "smoothquant"])
def test_methods_that_read_data_themselves_are_refused(tiny_llama, calibration_npy, tmp_path, name):
    run = RunOptions(shards=2, team=Team(0, 2))
    calibration = Calibration(str(calibration_npy), samples=8)
    with pytest.raises(LLQError, match=f"{name} reads activations or trains"):
        prepare(str(tiny_llama), build(name), calibration, run, tmp_path / "out", Progress())


def test_sequences_are_shared_out_in_order():
    edges = edges_of(10, 4)
    assert edges == [0, 2, 5, 7, 10]
    assert Team(0, 2).own_shards(edges) == [0, 2, 5]
    assert Team(1, 2).own_shards(edges) == [5, 7, 10]
    assert batches_of([0, 2, 5], 2) == [[slice(0, 2)], [slice(2, 4), slice(4, 5)]]
    with pytest.raises(LLQError, match="cannot be shared by 3 processes"):
        Team(0, 3).own_shards(edges)
    for shards in (0, 11):
        with pytest.raises(LLQError, match="at most the 10"):
            edges_of(10, shards)


@pytest.mark.parametrize("kind", [Hessian, PairedHessian, AbsMax, Samples])
def test_merged_statistics_are_those_of_all_sequences(kind: type[Stat]):
    x_TI = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    whole, first, second = (kind(8, torch.device("cpu")) for _ in range(3))
    for stat, part in ((whole, x_TI), (first, x_TI[:1800]), (second, x_TI[1800:])):
        stat.update(part, len(part) // 100)
        if isinstance(stat, PairedHessian):
            stat.pair(part, part + 1)
    sent = second.fresh()
    sent.load(second.state())
    first.merge(sent)
    for key, value in whole.state().items():
        if key == "rows_TI":
            assert Samples.LIMIT // 2 <= len(first.rows_TI) < Samples.LIMIT
            assert all((row == x_TI).all(1).any() for row in first.rows_TI[::50])
        else:
            # Sums of 3000 in another order
            torch.testing.assert_close(first.state()[key], value, rtol=1e-4, atol=0.02)


def test_notes_travel_with_tensors():
    packed, notes = {"weight": torch.arange(3)}, {"damp": 0.01, "dead_columns": 2, "text": "ä"}
    found, said = unpack_message(pack_message(packed, notes))
    assert torch.equal(found["weight"], packed["weight"])
    assert said == notes
    assert list(found) == ["weight"]
