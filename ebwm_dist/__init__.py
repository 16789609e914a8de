"""Train Energy-Based World Models at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebwm_dist import torchvision_compat as torchvision_compat  # Its import prepares that of torchvision.

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ebwm_dist.inference.api import Predictor

__version__ = "0.1.0"


def load(path: str | Path, device: torch.device | None = None) -> Predictor:
    """Return the trained model of a run folder, one of its checkpoints or an export, to predict and generate with.

    It is put on the GPU, where there is one, unless a `device` is given.
    """
    import torch

    from ebwm_dist.devices import use_cuda
    from ebwm_dist.inference.api import Predictor
    from ebwm_dist.inference.load import load_model

    loaded = load_model(path, device or torch.device("cuda" if use_cuda() else "cpu"))
    return Predictor(loaded.model, loaded.config, loaded.tokenizer)
