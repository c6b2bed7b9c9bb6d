"""Build hook: compiles the CPU kernels into the wheel.

Without a compiler the wheel is pure Python; installing does not fail. An editable install (uv sync)
gets the kernels beside the sources.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "llq_hf/kernels/build.py"


class KernelsHook(BuildHookInterface):  # type: ignore[misc]
    """Runs for wheels, editable ones too. Source distributions hold the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        build = _module(Path(self.root) / BUILD)
        try:
            libraries = build.build()
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"llq-hf without compiled CPU kernels: {error}")
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":
            inside = {str(path): str(path.relative_to(self.root)) for path in libraries}
            build_data["force_include"].update(inside)


def _module(path: Path) -> ModuleType:
    """The build module alone: importing llq_hf would need torch."""
    spec = importlib.util.spec_from_file_location("llq_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
