"""Let `import torchvision` work beside a CPU build of torch, where its wheel cannot load its compiled operators.

The wheel on the package index is linked to CUDA; without CUDA the import dies with "operator torchvision::nms does not
exist", although transforms, models and image grids need no compiled operator. A finder declares these operators just
before torchvision is executed. It changes nothing where they can be loaded.

Only the standard library is imported until then: a `.pth` file imports a copy of this module in every interpreter of
the environment (see pyproject.toml), so that torchvision can be imported without `ebwm_dist`.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_kept_alive: list[Any] = []  # a torch.library.Library takes its operators with it when it is collected


class TorchvisionFinder:
    """Finds torchvision as usual, and prepares its execution."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of torchvision; torch is only imported when that is executed, not when it is looked for."""
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision" else None
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        package, execute = Path(spec.origin).parent, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            _declare_missing_operators(package)
            execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _declare_missing_operators(package: Path) -> None:
    import torch

    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(declared)


sys.meta_path.insert(0, TorchvisionFinder)
