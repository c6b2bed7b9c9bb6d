"""Environments of other programs, which scripts here make with uv."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

GPTQMODEL = ["gptqmodel>=7.7", "optimum", "transformers==5.23.0"]
UV = ("uv",) if shutil.which("uv") else ("python3", "-m", "uv")


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


def environment(folder: Path, packages: list[str]) -> Path:
    """The interpreter of an environment with these packages, which uv makes unless it is there."""
    python = folder / "bin" / "python"
    if not python.exists():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        run(*UV, "venv", "--quiet", "--python", version, folder)
        # From there: in a folder of this project uv would hold it to this project's tested
        # versions.
        install = (*UV, "pip", "install", "--quiet", "--directory", folder, "--python", python)
        run(*install, *packages)
    return python
