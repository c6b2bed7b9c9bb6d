"""Files that are filled in place end as save_file would have written them, whole or in shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llq_hf.checkpoints.shards import (
    PART,
    Shards,
    damaged_tensors,
    digest_of,
    gathered,
    names_by_block,
    tensor_files,
)
from llq_hf.common.spec import Spec

DTYPES = (torch.int32, torch.float16, torch.float32, torch.uint8, torch.bfloat16, torch.int64)


def unit(name: str, seed: int) -> dict[str, torch.Tensor]:
    """One tensor of every dtype, of odd sizes, one of them empty, one with a name in Greek."""
    random = torch.Generator().manual_seed(seed)
    made = {
        f"{name}.{i}": torch.randint(0, 100, (3, 2 * i + 1), generator=random).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    return {**made, f"{name}.empty": torch.zeros(0, 4), f"{name}.\u03bb": torch.ones(1)}


UNITS = [unit(name, seed) for seed, name in enumerate(("outside", "block.0", "block.1", "block.2"))]
ALL = {name: tensor for each in UNITS for name, tensor in each.items()}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def planned(folder: Path) -> Shards:
    return Shards(folder, [specs(each) for each in UNITS])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_one_file_has_the_bytes_of_save_file(tmp_path: Path) -> None:
    shards = planned(tmp_path / "out")
    shards.open()
    for each in reversed(UNITS):  # in any order
        shards.write(each.items())
    assert list(files(tmp_path / "out")) == ["model.safetensors" + PART]
    shards.finish()
    save_file(ALL, tmp_path / "expected", metadata={"format": "pt"})
    assert files(tmp_path / "out") == {
        "model.safetensors": (tmp_path / "expected").read_bytes(),
    }


@pytest.mark.parametrize("limit", [1, 100, 300, 500])
def test_shards_keep_to_the_limit_and_units_together(tmp_path, monkeypatch, limit) -> None:
    monkeypatch.setattr(Shards, "limit_bytes", limit)
    shards = planned(tmp_path)
    shards.open()
    for each in UNITS:
        shards.write(each.items())
    shards.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ALL)
    assert index["metadata"]["total_size"] == shards.nbytes
    names = sorted(set(index["weight_map"].values()))
    assert names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    for name in names:
        held = load_file(tmp_path / name)
        sizes = [tensor.nbytes for tensor in held.values() if tensor.nbytes]
        assert sum(sizes) <= limit or len(sizes) == 1  # one that is larger has a file of its own
    for each in UNITS:
        size = sum(t.nbytes for t in each.values())
        assert size > limit or len({index["weight_map"][name] for name in each}) == 1
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], ALL[name])


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    first = planned(tmp_path)
    first.open()
    digests = first.write(UNITS[1].items())
    again = planned(tmp_path)
    again.open()
    assert damaged_tensors(tensor_files(tmp_path), digests) == []
    read = again.read(UNITS[1])
    assert all(torch.equal(read[name], UNITS[1][name]) for name in UNITS[1])
    assert digests == {name: digest_of(tensor) for name, tensor in UNITS[1].items()}


def test_files_of_another_plan_go(tmp_path: Path) -> None:
    for stranger in ("model-00001-of-00009.safetensors", "model-00002-of-00009.safetensors.part"):
        (tmp_path / stranger).write_bytes(b"old")
    (tmp_path / ("model.safetensors" + PART)).write_bytes(b"of another header")
    (tmp_path / "notes.txt").write_text("mine")
    planned(tmp_path).open()
    assert set(files(tmp_path)) == {"model.safetensors" + PART, "notes.txt"}


@pytest.mark.parametrize("name", sorted(UNITS[1]))
def test_a_changed_tensor_is_found(tmp_path: Path, name: str) -> None:
    shards = planned(tmp_path)
    shards.open()
    digests = shards.write(UNITS[1].items())
    if not UNITS[1][name].numel():
        pytest.skip("nothing in it can change")
    shards.write([(name, UNITS[1][name] + 1)])
    assert damaged_tensors(tensor_files(tmp_path), digests) == [name]


def test_a_tensor_of_another_layout_is_a_bug_of_ours(tmp_path: Path) -> None:
    shards = planned(tmp_path)
    shards.open()
    with pytest.raises(AssertionError, match="its layout says"):
        shards.write([("block.0.2", torch.zeros(4, 4))])


def test_gathering_deletes_the_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{i}.safetensors" for i in range(len(UNITS))]
    for part, each in zip(parts, UNITS, strict=True):
        save_file(each, part)
    (tmp_path / "out").mkdir()
    gathered(parts, tmp_path / "out")
    assert not any(part.exists() for part in parts)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(ALL)
    assert all(torch.equal(found[name], ALL[name]) for name in ALL)


def test_names_by_block() -> None:
    names = ["b.1.x", "head", "b.10.x", "b.0.y", "b.0.x"]
    found = list(names_by_block(names, ["b.0", "b.1", "b.10"]))
    assert found == [["head"], ["b.0.x", "b.0.y"], ["b.1.x"], ["b.10.x"]]
