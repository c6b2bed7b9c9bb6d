"""A reader of the format, written from llq_hf/checkpoints/README.md alone, agrees bit for bit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

# --- the reader: numpy and safetensors only -----------------------------------------------


def planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def read_block(data: np.ndarray, bits: int, codes: int) -> np.ndarray:
    """uint8 bytes of one block -> its codes."""
    found = np.zeros(codes, dtype=np.int64)
    start = 0
    for width in planes(bits):
        chunk = 16 if codes == 128 else 4 * width
        plane = data[start : start + codes * width // 8].reshape(-1, 1, chunk)
        fields = np.arange(8 // width).reshape(1, -1, 1) * width
        values = (plane.astype(np.int64) >> fields) & (2**width - 1)
        found = (found << width) | values.reshape(-1)
        start += codes * width // 8
    return found


def read_codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 words of one row -> `count` codes."""
    data = words.astype("<i4").view(np.uint8)
    sizes = [128] * (count // 128) + [32] * -(-(count % 128) // 32)
    ends = np.cumsum([0] + [size * bits // 8 for size in sizes])
    parts = [read_block(data[ends[k] : ends[k + 1]], bits, size) for k, size in enumerate(sizes)]
    return np.concatenate(parts)[:count]


def read_weight(tensors: dict, name: str, section: dict, columns: int) -> np.ndarray:
    """fp32 [O, I] of a linear on uniform grids."""
    bits, size = section["bits"], section["group_size"]
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"].astype(np.float32)
    codes = np.stack([read_codes(row, bits, columns) for row in weight]).astype(np.float32)
    zero = np.full(scale.shape, 2.0 ** (bits - 1), dtype=np.float32)
    if not section["sym"]:
        zero = read_codes(tensors[f"{name}.zero"], bits, scale.size).reshape(scale.shape)
    group = np.arange(columns) // (columns if size == -1 else size)
    return (codes - zero.astype(np.float32)[:, group]) * scale[:, group]


def read_checkpoint(folder: Path, columns: dict[str, int]) -> dict[str, np.ndarray]:
    """fp32 weights by the name of their linear. columns: its I, which its config tells."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    run = {"quant_method", "format_version", "quantized_linears", "digest", "calibration"}
    options = {k: v for k, v in section.items() if k not in run | {"fingerprint"}}
    method = section["quant_method"].removeprefix("llq_")
    told = {"method": method, **options, "linears": section["quantized_linears"], "format": 1}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    assert (digest, section["format_version"]) == (section["digest"], 1)
    tensors = load_file(folder / "model.safetensors")
    assert section["quantized_linears"] == len(columns)
    return {name: read_weight(tensors, name, section, size) for name, size in columns.items()}


# --- it agrees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("options", [{"group_size": 64}, {"group_size": -1, "sym": True}])
def test_every_weight_is_the_same(
    make_checkpoint: Callable[..., Path], tmp_path: Path, bits: int, options: dict
) -> None:
    from transformers import AutoModelForCausalLM

    from llq_hf import Calibration, build, quantize_checkpoint
    from llq_hf.layers.linear import QuantLinear

    # widths of whole blocks, of blocks and a rest, and of a rest that is no multiple of 32
    base = make_checkpoint(
        hidden_size=160, intermediate_size=300, num_attention_heads=4, num_key_value_heads=2
    )
    method = build("rtn", bits=bits, **options)
    quantize_checkpoint(str(base), tmp_path / "out", method, Calibration())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    columns = {name: linear.in_features for name, linear in linears.items()}
    found = read_checkpoint(tmp_path / "out", columns)
    assert set(found) == set(linears)
    for name, linear in linears.items():
        assert np.array_equal(found[name], linear.dequantized().numpy()), name
