"""Load a checkpoint of any ZeRO stage and number of ranks: each rank reads the parts that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.checkpoint.zero_files import COUNTERS, ZeroState
from ebwm_dist.training.muon import Part


class Vector(NamedTuple):
    """A tensor of fp32 weights that the optimizer updates."""

    weights: Tensor
    names: list[str]
    """All parameters of its group; this rank may hold no part of some."""
    parts: list[Part]


@torch.no_grad()
def reshard(engine: Any, saved: ZeroState, progress: Callable[[], None]) -> None:
    """Give a DeepSpeed engine the weights and the optimizer state of a checkpoint. All ranks do it together."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
    for weights, names, parts in vectors_of(engine):
        base.state.pop(weights, None)
        steps, moments = saved.steps(names[0]), {key: torch.zeros_like(weights) for key in saved.moments(names[0])}
        vectors = {"fp32": weights, **moments}
        if steps is not None:
            base.state[weights] = {"step": steps.clone().to(weights.device), **moments}
        for name, offset, start, numel in parts:
            progress()
            for key, vector in vectors.items() if numel else ():
                vector.view(-1)[start : start + numel] = saved.read_part(name, key, offset, numel)
    _round_weights(engine)
    _load_rest(engine.module, saved)
    for name in COUNTERS:
        setattr(engine, name, saved.client[name])


def vectors_of(engine: Any) -> Iterator[Vector]:
    """Yield the vectors of this rank; their layout is described in `ebwm_dist/checkpoint/zero_files.py`."""
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
    """Copy the fp32 weights to those that the model computes with."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        optimizer.round_weights()
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _load_rest(module: torch.nn.Module, saved: ZeroState) -> None:
    """Load frozen parameters and buffers."""
    import deepspeed

    for name, p in module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(saved.read_part(name, "fp32", 0, p.numel()).view(p.shape))
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            buffer.copy_(saved.rest[name])
