"""Which kind of device a process computes on."""

from __future__ import annotations

import os

import torch


def use_cuda() -> bool:
    """Return whether to use a GPU: where there is one, unless DS_ACCELERATOR=cpu says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def default_device() -> torch.device:
    """Return the device of a process that is alone."""
    return torch.device("cuda" if use_cuda() else "cpu")
