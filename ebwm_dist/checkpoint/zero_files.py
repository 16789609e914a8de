"""Read DeepSpeed's checkpoint files parameter by parameter, from any ZeRO stage and number of ranks.

DeepSpeed keeps fp32 weights and the optimizer's moments in flat vectors. At stages 1 and 2, a rank has one part of the
concatenated parameters of a group; at stage 3, an equal share of each parameter of a group; at stage 0, every parameter
is a vector of its own, and rank 0 writes them all.

Files are memory-mapped, so only what is used is read. No code in them is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebwm_dist.checkpoint.folder import read_marker, verify
from ebwm_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Of AdamW, and of Muon."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Counters of DeepSpeed's engine."""
_MODEL_FILE = "mp_rank_00_model_states.pt"
_SHARD_FILES = "zero_pp_rank_{}_mp_rank_00_"


class _Plain:
    """Stand-in for a class of DeepSpeed whose objects hold numbers only."""


# The classes in DeepSpeed's files, besides tensors and plain values; DeepSpeed itself is not imported.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


class Piece(NamedTuple):
    """Where a consecutive part of a parameter is stored."""

    vectors: dict[str, Tensor]
    """`fp32` and, after the first optimizer step, the moments, all flat, and the number of steps `step`."""
    start: int
    numel: int


@dataclass
class ZeroState:
    """Weights and optimizer state of a checkpoint, read from its files as they are used."""

    shapes: dict[str, torch.Size]
    """Shapes of the trained parameters."""
    pieces: dict[str, list[Piece]]
    """Their pieces, in order."""
    rest: dict[str, Tensor]
    """Frozen parameters and buffers."""
    shared: dict[str, str]
    """Tied parameters: name -> the name that it is stored under."""
    client: dict[str, Any]
    """`training_state`, and DeepSpeed's `COUNTERS`."""

    def read(self, name: str, key: str = "fp32") -> Tensor:
        """Return `fp32` or one of the `MOMENTS` of a trained parameter, whole."""
        shape = self.shapes[name]
        return self.read_part(name, key, 0, shape.numel()).view(shape)

    def read_part(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Return `numel` > 0 consecutive numbers of a parameter; of a frozen one, only `fp32` is there."""
        if name not in self.pieces:
            return self.rest[name].flatten()[start : start + numel]
        parts, offset = [], 0
        for vectors, first, size in self.pieces[name]:
            low, high = max(start, offset), min(start + numel, offset + size)
            if low < high:
                parts.append(vectors[key][first + low - offset : first + high - offset])
            offset += size
        return torch.cat(parts)

    def moments(self, name: str) -> tuple[str, ...]:
        """Return which of the `MOMENTS` the optimizer has of a parameter, none before its first step."""
        return tuple(key for key in MOMENTS if name in self.pieces and key in self.pieces[name][0].vectors)

    def steps(self, name: str) -> Tensor | None:
        """Return how often the optimizer has updated a parameter, a scalar; None if it never has."""
        return self.pieces[name][0].vectors.get("step") if name in self.pieces else None


def open_zero_state(path: Path) -> ZeroState:
    """Open the weights and the optimizer state of a committed checkpoint."""
    metadata = read_marker(path)["metadata"]
    with _reading(path):
        if metadata["zero_stage"] == 0:
            return _open_whole(path)
        models, optimizers = _shard_files(metadata)
        states = [load_file(path, name)["optimizer_state_dict"] for name in optimizers]
        if metadata["zero_stage"] < 3:
            return _open_partitions(path, states)
        return _open_shares([load_file(path, name) for name in models], states)


def weight_files(path: Path) -> list[str]:
    """Return the names of the files of a checkpoint that `load_module_state` reads."""
    metadata = read_marker(path)["metadata"]
    with _reading(path):
        if metadata.get("zero_stage") != 3:
            return [_MODEL_FILE]
        models, optimizers = _shard_files(metadata)
        return models + optimizers


def verify_weights(path: Path) -> None:
    """Hash the files that `load_module_state` reads, and raise a `CheckpointError` if one has changed."""
    verify(path, weight_files(path))


def load_module_state(path: Path) -> dict[str, Tensor]:
    """Return the weights of the model in a checkpoint, on the CPU, in the precision that the model computes in."""
    metadata = read_marker(path)["metadata"]
    with _reading(path):
        if metadata.get("zero_stage") != 3:
            return dict(load_file(path, _MODEL_FILE)["module"])
        saved = open_zero_state(path)
        dtype = torch.bfloat16 if metadata["precision"] == "bf16" else torch.float32
        state = {name: saved.read(name).to(dtype) for name in saved.shapes} | saved.rest
        return state | {name: state[same] for name, same in saved.shared.items()}


def load_file(path: Path, name: str) -> dict[str, Any]:
    """Load one of DeepSpeed's files, memory-mapped, without executing code."""
    file = path / name
    if not file.exists():
        raise CheckpointError(f"{path} holds no {name}: take another checkpoint")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{file} is not a file of model weights ({reason}): take another checkpoint") from None


def _shard_files(metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of the files that hold the ranks' shares of the model, and of the optimizer state."""
    names = [_SHARD_FILES.format(rank) for rank in range(metadata["world_size"])]
    prefix = "bf16_" if metadata["precision"] == "bf16" else ""
    return [f"{name}model_states.pt" for name in names], [f"{prefix}{name}optim_states.pt" for name in names]


def _open_whole(path: Path) -> ZeroState:
    content = load_file(path, _MODEL_FILE)
    optimizer, module = content["optimizer"], content["module"]
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    weights = dict(zip(names, optimizer["masters"], strict=True)) if optimizer["masters"] else module
    shapes, pieces = {}, {}
    for number, name in enumerate(names):
        state = optimizer["state"].get(number, {})
        vectors = {key: value.flatten() if key in MOMENTS else value for key, value in state.items()}
        shapes[name] = weights[name].shape
        pieces[name] = [Piece({"fp32": weights[name].flatten(), **vectors}, 0, weights[name].numel())]
    rest = {name: tensor for name, tensor in module.items() if name not in shapes}
    return ZeroState(shapes, pieces, rest, {}, _client(content))


def _open_partitions(path: Path, optimizers: list[dict[str, Any]]) -> ZeroState:
    content = load_file(path, _MODEL_FILE)
    shapes = {name: shape for group in content["param_shapes"] for name, shape in group.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for optimizer in optimizers:
        states = optimizer["base_optimizer_state"]["state"]
        groups = zip(optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"], strict=True)
        for number, (weights, fragments) in enumerate(groups):
            vectors = {"fp32": weights, **states.get(number, {})}
            for name, fragment in fragments.items():
                pieces[name].append(Piece(vectors, fragment.start, fragment.numel))
    shared = dict(content["shared_params"])
    rest = {name: tensor for name, tensor in content["module"].items() if name not in shapes and name not in shared}
    return ZeroState(shapes, pieces, rest, shared, _client(content))


def _open_shares(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> ZeroState:
    first, world_size = models[0], len(models)
    shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank, optimizer in enumerate(optimizers):
        states = optimizer["optimizer_state_dict"]["state"]
        for number, group in enumerate(first["param_shapes"]):
            vectors, start = {"fp32": optimizer["fp32_flat_groups"][number], **states.get(number, {})}, 0
            for name, shape in group.items():
                share = -(-shape.numel() // world_size)  # the last ranks' are padded
                numel = max(0, min(share, shape.numel() - rank * share))
                pieces[name].append(Piece(vectors, start, numel))
                start += share
    rest = {name: first["module"][name] for name in first["buffer_names"]}
    for name, shape in first["frozen_param_shapes"].items():
        whole = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        rest[name] = whole[: shape.numel()].view(shape)
    return ZeroState(shapes, pieces, rest, dict(first["shared_params"]), _client(first))


def _client(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in ("training_state", *COUNTERS) if key in content}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever content of another shape raises into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold weights as they are saved ({error}): take another") from None
