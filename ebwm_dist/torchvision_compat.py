"""Let `import torchvision` work where its compiled operators cannot be loaded.

torchvision's wheel is linked to CUDA. Beside a CPU build of torch its library does not load, and the import then dies
with "operator torchvision::nms does not exist", although transforms and image grids need no compiled operator. A
finder on `sys.meta_path` waits for that import and declares the missing operators just before; where the library
loads it changes nothing.

Only the standard library is imported until then, and nothing of this package: the file is also installed as a
top-level module that a `.pth` file starts with the interpreter (see pyproject.toml), so that torchvision can be
imported in the environment without importing `ebwm_dist` first.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A torch.library.Library takes its operators with it when it is collected.
_kept_alive: list[Any] = []


def install() -> None:
    """Watch for the first import of torchvision; do nothing if it is past or already watched for."""
    watched = any(type(finder).__name__ == TorchvisionFinder.__name__ for finder in sys.meta_path)
    if not watched and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, TorchvisionFinder())


class TorchvisionFinder:
    """Finds torchvision as usual, but has it loaded by `_Loader`; leaves with that import."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        # A mere look for the package (importlib.util.find_spec) does not come here, and so costs no import of torch.
        _declare_missing_operators(Path(self.path).parent)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, TorchvisionFinder)]
        super().exec_module(module)


def _declare_missing_operators(package: Path) -> None:
    import torch

    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            declared.define(schema)
        _kept_alive.append(declared)


install()
