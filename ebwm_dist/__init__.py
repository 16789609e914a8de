"""Train Energy-Based World Models at scale."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# OpenMP reads these when torch is imported. By default its threads wait for each other in loops of milliseconds, and
# beside other busy processes they take the very cores that those they wait for would need. So few rounds cost nothing
# on an idle machine, where sleeping at once would cost a third (docs/training.md).
WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in WAIT_POLICIES):
    os.environ["GOMP_SPINCOUNT"] = "1000"

from ebwm_dist import torchvision_compat as torchvision_compat  # noqa: E402  Its import prepares that of torchvision.

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ebwm_dist.inference.api import Predictor

__version__ = "0.1.0"


def load(path: str | Path, device: torch.device | None = None) -> Predictor:
    """Return the trained model of a run, to predict and generate with.

    `path` is a run folder, one of its checkpoints, an export, or the address of a run's copy in object storage. The
    model is put on the GPU, where there is one, unless a `device` is given.
    """
    from ebwm_dist.devices import default_device
    from ebwm_dist.inference.api import Predictor
    from ebwm_dist.run import Run

    run = Run(path, device or default_device())
    return Predictor(run.model, run.config, run.tokenizer)
