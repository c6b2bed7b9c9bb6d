"""`llq build-kernels`: compile the CPU kernels."""

from __future__ import annotations

import os

from ..common.errors import LLQError
from .app import OTHER, app, console


@app.command(name="build-kernels", rich_help_panel=OTHER)
def build_kernels() -> None:
    """Compile the CPU kernels, with g++ or clang++.

    Installing llq-hf compiles them where it finds a compiler. Run this where it found none, and
    one is there now. Without kernels PyTorch decodes the weights, which is slower.
    """
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
