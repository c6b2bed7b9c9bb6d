"""llq build-kernels."""

from __future__ import annotations

import os

from ..common.errors import LLQError
from .app import app, console


@app.command(name="build-kernels")
def build_kernels() -> None:
    """Compile the CPU kernels with g++ or clang++, where installing llq-hf could not."""
    from ..kernels.build import PACKAGED, BuildError, build
    from ..kernels.native import backend, cache_folder, describe

    folder = PACKAGED if os.access(PACKAGED.parent, os.W_OK) else cache_folder()
    try:
        with console.status("compiling"):
            paths = build(folder)
    except (BuildError, OSError) as error:
        raise LLQError(f"the kernels cannot be built: {error}") from error
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)
    backend.cache_clear()
    console.print(f"packed weights are multiplied by: {describe()}", highlight=False)
