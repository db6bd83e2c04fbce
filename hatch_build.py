"""Builds the kernels in C while embedmesh is installed or packed, where there is a C compiler and a CPU for them.

Nothing needs them: without, models run on OpenVINO. A wheel that has them is for its platform alone.
"""

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("embedmesh") / "engine" / "native"


class KernelsBuildHook(BuildHookInterface):
    """Beside their source for an editable install, else into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build them. Without a compiler one line says so, and nothing else changes."""
        if self.target_name != "wheel":
            return
        recipe = self._recipe()
        editable = version == "editable"
        self._made = tempfile.TemporaryDirectory()
        library = recipe.LIBRARY if editable else Path(self._made.name) / recipe.LIBRARY.name
        recipe.LIBRARY.unlink(missing_ok=True)  # of an older source
        try:
            recipe.build(library)
        except recipe.CannotBuild as why:
            self.app.display_info(f"embedmesh: installed without its own kernels ({why}); models run on OpenVINO")
            return
        if not editable:
            build_data["force_include"][str(library)] = str(NATIVE / library.name)
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was made on the way."""
        if self.target_name == "wheel":
            self._made.cleanup()

    def _recipe(self) -> ModuleType:
        """`build.py`, by its path: embedmesh cannot be imported yet."""
        spec = importlib.util.spec_from_file_location("kernels_recipe", Path(self.root) / NATIVE / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
