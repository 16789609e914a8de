"""Fill an engine from a universal checkpoint: each rank reads of every parameter the part that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.checkpoint import universal
from ebwm_dist.checkpoint.zero_files import MOMENTS


class Part(NamedTuple):
    """Some consecutive numbers of a parameter: where they are in it, and in a vector of fp32 weights."""

    name: str
    offset: int
    start: int
    numel: int


class Vector(NamedTuple):
    """A tensor of fp32 weights that the optimizer updates."""

    weights: Tensor
    names: list[str]
    """Parameters of its group, of which this rank may hold nothing."""
    parts: list[Part]


@torch.no_grad()
def load_universal(engine: Any, folder: Path) -> None:
    """Give a DeepSpeed engine the weights and the optimizer state in `folder`. All ranks do it together."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
    for weights, names, parts in _vectors(engine):
        base.state.pop(weights, None)
        vectors = {"fp32": weights}
        if universal.has_steps(folder, names[0]):
            vectors |= {key: torch.zeros_like(weights) for key in MOMENTS}
            steps = universal.read(folder, names[0], "step").clone().to(weights.device)
            base.state[weights] = {"step": steps, **{key: vectors[key] for key in MOMENTS}}
        for key, vector in vectors.items():
            for name, offset, start, numel in parts:
                whole = universal.read(folder, name, key).flatten()
                vector.view(-1)[start : start + numel] = whole[offset : offset + numel]
    _round_weights(engine)
    _load_rest(engine.module, folder)


def _vectors(engine: Any) -> Iterator[Vector]:
    """Yield the vectors of this rank, and what they hold: see `ebwm_dist/checkpoint/zero_files.py`."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        for name, master in zip(names, masters, strict=True):
            yield Vector(master, [name], [Part(name, 0, 0, master.numel())])
        return
    if stage == 3:
        groups, flat = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
    elif hasattr(optimizer, "bf16_groups"):  # the class for stage 1 in bf16
        groups, flat = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, flat = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    for group, weights in zip(groups, flat, strict=True):
        names = [optimizer.param_names[p] for p in group]
        parts = _shares(group, names) if stage == 3 else _fragments(group, names)
        yield Vector(weights, names, list(parts))


def _shares(group: list[Any], names: list[str]) -> Iterator[Part]:
    start = 0
    for p, name in zip(group, names, strict=True):
        share = p.ds_tensor.ds_numel
        offset = dist.get_rank() * share
        yield Part(name, offset, start, max(0, min(share, p.ds_numel - offset)))
        start += share


def _fragments(group: list[Any], names: list[str]) -> Iterator[Part]:
    for p, name in zip(group, names, strict=True):
        if p._hp_mapping is not None:
            inside, place = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            yield Part(name, inside.start, place.start, place.numel)


def _round_weights(engine: Any) -> None:
    """Make the weights that the model computes with from those in fp32."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        optimizer.round_weights()
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _load_rest(module: torch.nn.Module, folder: Path) -> None:
    """Load frozen parameters and buffers."""
    import deepspeed

    for name, p in module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(universal.read(folder, name))
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            buffer.copy_(universal.read(folder, name))
