"""Compile the CPU kernels: one shared library for each instruction set, with g++ or clang++.

    python llq_hf/kernels/build.py [FOLDER]

`llq build-kernels` and the wheel's build hook do the same. Nothing here imports torch. The
libraries need neither torch nor Python: they have a plain C interface, and the C++ runtime is
linked into them. A file's name holds a hash of the sources, so that a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES, PACKAGED = HERE / "cpp", HERE / "lib"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
VBMI2 = [*AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vpopcntdq"]  # Ice Lake, Zen 4
# Best first. native.py checks what the processor has.
ISAS = {"avx512vbmi2": VBMI2, "avx512": AVX512, "avx2": AVX2}
# Without contraction to FMA, decoded weights equal torch's bit for bit.
FLOATS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# "-z defs": a compiler that links no C++ runtime (CXX=gcc) fails here, and not when it is loaded.
LINKING = ["-fPIC", "-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,-z,defs"]
FLAGS = ["-O3", "-std=c++17", *LINKING, *FLOATS]


class BuildError(Exception):
    """There is no compiler, or it failed."""


def source_hash() -> str:
    """12 hex digits that stand for all sources and flags."""
    digest = hashlib.sha256(repr((ISAS, FLAGS)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def library(folder: Path, isa: str) -> Path:
    return folder / f"llq-{isa}-{source_hash()}.so"


def compiler() -> str | None:
    """Path of $CXX, g++ or clang++; None if there is none, or if this is not x86-64."""
    if os.uname().machine not in ("x86_64", "AMD64"):
        return None
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")


def build(folder: Path = PACKAGED) -> list[Path]:
    """Compile for every instruction set into `folder`. Files appear whole or not at all. BuildError
    says what went wrong.
    """
    program = compiler()
    if program is None:
        raise BuildError("no C++ compiler for x86-64 was found; install g++ or clang++, or set CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda isa: _compile(program, isa, folder), ISAS))


def _compile(program: str, isa: str, folder: Path) -> Path:
    target = library(folder, isa)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        command = [program, *FLAGS, *ISAS[isa], str(SOURCES / "cpu.cpp"), "-o", f"{draft}/lib.so"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise BuildError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
        with open(f"{draft}/lib.so", "r+b") as written:
            os.fsync(written.fileno())
        os.replace(f"{draft}/lib.so", target)
    for stale in folder.glob(f"llq-{isa}-*.so"):
        if stale != target:
            stale.unlink()
    return target


if __name__ == "__main__":
    print(*build(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGED), sep="\n")
