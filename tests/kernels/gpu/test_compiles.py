"""Every GPU kernel compiled ahead of time for cards that are not here: no spill, and no value moved
between threads (`assert_trivial` in fragments.py fails to compile otherwise).
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llq_hf.kernels.gpu import few

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.experimental.gluon", reason="Triton >= 3.6 is not installed")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CARDS = [80, 90]
X = {"x_ptr": "*bf16", "y_ptr": "*bf16", "bias_ptr": "*bf16"}
FEW = {**X, "w_ptr": "*i32", "scale_ptr": "*i32", "zero_ptr": "*i32", "blocks_ptr": "*i32"}
FLOATS = ("scale_value", "zero_value", "zero_step", "top", "least")
UNIFORM = {
    "BITS1": 0, "BITS2": 0, "GROUP": 128, "SCALES": 16, "ZEROS": True, "LISTED": False,
    "BIAS": False, "STEPS": False, "UNITS": 0, "HALF": False, "T": 8,
}  # fmt: skip
LEVELS = {"MEANS": 0, "GROUP": 128, "BIAS": False, "HALF": False, "T": 8}
DENSE = {"w_ptr": "*i32", "scale_ptr": "*fp16", "y_ptr": "*bf16", "mean_ptr": "*fp16"}
TABLE = {"map_ptr": "*fp32", "step_ptr": "*fp32", "mean_ptr": "*fp32", "shift_step_ptr": "*fp32"}
TURN = {"left_ptr": "*fp32", "right_ptr": "*fp32", "source_ptr": "*i32", "back_ptr": "*i32"}

# Module, kernel, types of pointers, constants, warps.
Case = tuple[str, str, dict[str, str], dict[str, Any], int]
KERNELS: list[Case] = [
    *(("uniform_few", "uniform_few", FEW, {**UNIFORM, "BITS0": bits, "R": 32, "S": 4}, 4)
      for bits in (1, 2, 3, 4, 7, 8)),
    ("uniform_few", "uniform_few", FEW, {**UNIFORM, "BITS0": 4, "R": 16, "S": 8}, 8),
    ("uniform_few", "uniform_few", FEW,
     {**UNIFORM, "BITS0": 4, "GROUP": 32, "R": 16, "S": 8, "T": 16}, 8),
    ("uniform_few", "uniform_few", FEW,
     {**UNIFORM, "BITS0": 4, "GROUP": 0, "UNITS": 2, "R": 32, "S": 8, "T": 16}, 8),
    ("uniform_few", "uniform_few", FEW,
     {**UNIFORM, "BITS0": 1, "BITS1": 2, "BITS2": 3, "LISTED": True, "R": 32, "S": 4}, 4),
    *(("levels_few", "levels_few", {**FEW, "mean_ptr": "*i32", "salient_ptr": "*u8"},
       {**LEVELS, "KIND": kind, "MEANS": means, "R": 16 if kind == 1 else 32, "S": 8}, 8)
      for kind, means in ((0, 0), (1, 3), (2, 1))),
    ("table_few", "table_few", {**FEW, **TABLE, "shift_ptr": "*i32"},
     {"LEVELS": tuple(range(1000, 2600, 100)), "GROUP": 64, "CODED": True, "SHIFTED": True,
      "BIAS": False, "HALF": False, "R": 32, "S": 8, "T": 16}, 8),
    ("dense", "dense_uniform", {**DENSE, "zero_ptr": "*u8", "blocks_ptr": "*i32"},
     {"BITS": 7, "GROUP": 128, "SCALES": True, "ZEROS": True, "LISTED": True, "TAIL": False,
      "BN": 8, "U": 16}, 4),
    ("dense", "dense_levels", {**DENSE, "salient_ptr": "*u8"},
     {"KIND": 1, "MEANS": 3, "GROUP": 128, "TAIL": False, "BN": 8, "U": 16}, 4),
    ("dense", "dense_table",
     {**DENSE, **TABLE, "levels_ptr": "*fp32", "scale_ptr": "*u8", "shift_ptr": "*u8"},
     {"BITS": 4, "GROUP": 64, "CODED": True, "MEAN": True, "SHIFTED": True, "BN": 8, "U": 16}, 4),
    ("tokens", "turn", {**X, **TURN, "divisor_ptr": "*fp16", "factor_ptr": "*fp32"},
     {"A": 64, "B": 224, "AP": 64, "NB": 16, "KB": 64, "SHUFFLED": True, "DIVIDE": True,
      "FACTOR": True}, 4),
    ("tokens", "token_codes",
     {**X, "divisor_ptr": "*fp16", "codes_ptr": "*i8", "step_ptr": "*fp32"},
     {"DIVIDE": True, "VALUES": False, "WIDE": 16384}, 8),
    ("solve", "uniform_block",
     {"w_ptr": "*fp32", "u_ptr": "*fp32", "drift_ptr": "*fp32", "scale_ptr": "*fp32",
      "zero_ptr": "*fp32", "codes_ptr": "*u8", "error_ptr": "*fp32", "before_ptr": "*fp32"},
     {"HALVES": False, "MEANS": True, "DRIFT": True, "B": 128, "BR": 4}, 4),
    *(("solve", "backward_block",
       {"sums_ptr": "*fp32", "target_ptr": "*fp32", "matrix_ptr": "*fp32", "codes_ptr": "*fp32",
        "error_ptr": "*fp32"}, {"GREEDY": greedy, "B": 128, "BR": 4}, 4)
      for greedy in (False, True)),
    ("solve", "descend_block",
     {"gradient_ptr": "*fp32", "value_ptr": "*fp32", "matrix_ptr": "*fp32", "scale_ptr": "*fp32",
      "zero_ptr": "*fp32", "codes_ptr": "*u8", "moved_ptr": "*fp32"},
     {"HALVES": False, "B": 128, "BR": 4}, 4),
    ("tokens", "turn", {**X, **TURN, "divisor_ptr": "*fp16", "factor_ptr": "*fp32"},
     {"A": 112, "B": 128, "AP": 128, "NB": 16, "KB": 64, "SHUFFLED": False, "DIVIDE": False,
      "FACTOR": False}, 8),
]  # fmt: skip


def compiled(case: Case, card: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name, pointers, constants, warps = case
    kernel = getattr(importlib.import_module(f"llq_hf.kernels.gpu.{module}"), name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else pointers.get(argument, "*fp32")
        if argument.endswith("_ptr")
        else "fp32"
        if argument.rstrip("012") in FLOATS
        else "i32"
        for argument in kernel.arg_names
    }
    divisible = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in kernel.arg_names
        if argument.endswith("_ptr") or argument in ("K", "O", "I", "n", "row_words")
        if argument not in constants
    }
    source = GluonASTSource if module.endswith("_few") else ASTSource
    return triton.compile(
        source(kernel, signature, constants, divisible),
        target=GPUTarget("cuda", card, 32),
        options={"num_warps": warps},
    )


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: f"{case[1]}-{case[3].get('BITS0', '')}")
def test_kernels_compile_without_spills(case: Case, card: int, tmp_path: Path):
    file = tmp_path / "kernel.cubin"
    kernel = compiled(case, card)
    file.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([TOOL, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert found is not None
    assert int(found[2]) <= 16  # at times ptxas keeps a number or two there
    assert int(found[1]) <= 255
    assert kernel.metadata.shared <= few.SHARED


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_programs_take_the_shared_memory_that_tiles_are_chosen_by(bits: int):
    constants = {**UNIFORM, "BITS0": bits, "R": 32, "S": 4}
    kernel = compiled(("uniform_few", "uniform_few", FEW, constants, 4), 90)
    assert kernel.metadata.shared <= few.ring_bytes(few.Tile(32, 4), bits) + 1024
