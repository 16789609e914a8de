"""Universal checkpoints: weights and AdamW's state with a file for each parameter, for any ZeRO stage and world size.

The format is DeepSpeed's: `zero/NAME/fp32.pt`, `exp_avg.pt` and `exp_avg_sq.pt`, each `{"param": tensor}` with the
shape of the parameter, and `step.pt`; frozen parameters and buffers have `fp32.pt` alone. It is written and read here
because DeepSpeed's converter (0.19.8) makes other files of stage 3 than of stages 1 and 2, which the other stages
cannot read, and its loader fails on a rank that holds nothing of a parameter group, as most hold nothing of alpha's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ebwm_dist.checkpoint.folder import balanced_share
from ebwm_dist.checkpoint.zero_files import MOMENTS, ZeroState
from ebwm_dist.errors import CheckpointError


def write_share(
    saved: ZeroState,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write this rank's share of the parameters into `folder`, calling `progress` before each."""
    sizes = {name: tensor.numel() for name, tensor in saved.rest.items()}
    sizes |= {name: shape.numel() for name, shape in saved.shapes.items()}
    for name in balanced_share(sizes, rank, world_size):
        progress()
        target = _folder(folder, name)
        target.mkdir(parents=True)
        if name in saved.rest:
            torch.save({"param": saved.rest[name].clone()}, target / "fp32.pt")
            continue
        steps = saved.steps(name)
        for key in ("fp32", *MOMENTS) if steps is not None else ("fp32",):
            torch.save({"param": saved.read(name, key)}, target / f"{key}.pt")
        if steps is not None:
            torch.save(steps.clone(), target / "step.pt")


def read(folder: Path, name: str, key: str = "fp32") -> Tensor:
    """Return `fp32` or one of the moments of a parameter, mapped into memory, or its number of updates `step`."""
    file = _folder(folder, name) / f"{key}.pt"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensor: Tensor = content if key == "step" else content["param"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {key} of {name}: it was converted from another model") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not hold a tensor ({error}): delete {folder}, it is made again") from None
    return tensor


def has_steps(folder: Path, name: str) -> bool:
    """Return whether the optimizer had updated a parameter."""
    return (_folder(folder, name) / "step.pt").exists()


def _folder(folder: Path, name: str) -> Path:
    if name in ("", "..") or Path(name).name != name:
        raise CheckpointError(f"a parameter in a checkpoint is named {name!r}, which is not the name of a folder")
    return Path(folder) / "zero" / name
