"""What the ranks of a step exchange, and how long that takes.

The collectives are those that DeepSpeed makes of the passes of a step (0.19.8, with the settings of
`config/deepspeed.py`), counted on real ranks: stages 0 and 1 reduce all gradients once, at the end; stages 2 and 3
reduce in every backward those that it ends with; stage 3 gathers every parameter in each forward and backward that uses
it. Stages 1 and 2 end with a gathering of the new weights. Collectives of single numbers are left out, and at stage 3
those of parameters that are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ebwm_dist.config.deepspeed import BUCKET
from ebwm_dist.planning.footprint import Footprint
from ebwm_dist.planning.machines import Machine
from ebwm_dist.planning.memory import Parameters


@dataclass(frozen=True)
class Collective:
    """Collective calls of one kind in an optimizer step: their bytes together, as the whole tensor has them."""

    kind: str
    """`all_reduce`, `all_gather` or `reduce_scatter`."""
    bytes: float
    calls: float
    overlapped: bool = False
    """Whether the computation goes on meanwhile."""


def collectives(
    stage: int, precision: str, parameters: Parameters, footprint: Footprint, accumulation: int, world_size: int
) -> Iterator[Collective]:
    """Yield the collectives of an optimizer step.

    Args:
        stage: of ZeRO.
        precision: `fp32` or `bf16`.
        parameters: how many there are.
        footprint: of a micro-batch.
        accumulation: micro-batches of a step.
        world_size: ranks.
    """
    group_sizes, weight = parameters.groups, 2 if precision == "bf16" else 4
    padded = [_padded(size, world_size) for size in group_sizes]
    if world_size == 1:
        return
    if stage <= 1:
        reduced = sum(padded) if stage == 1 and precision == "bf16" else parameters.total
        yield Collective("all_reduce", 4 * reduced, math.ceil(reduced / BUCKET))
    else:
        kind, numbers = ("all_reduce" if stage == 2 else "reduce_scatter"), accumulation * footprint.gradients
        yield Collective(kind, weight * numbers, accumulation * footprint.backwards, overlapped=stage == 3)
    if shared := _shared(stage, parameters.matrices, world_size):
        yield Collective("all_reduce", 4 * shared, math.ceil(shared / BUCKET))
    if stage in (1, 2):
        weights = sum(size for size, own in zip(padded, group_sizes, strict=True) if own > 1)
        yield Collective("all_gather", weight * weights, len(group_sizes))
    if stage == 3:
        yield Collective("all_gather", weight * accumulation * footprint.gathered, accumulation * footprint.gathers)


def _padded(size: int, world_size: int) -> int:
    """Return the numbers of a group of parameters whose parts are alike."""
    return -(-size // (2 * world_size)) * 2 * world_size


def _shared(stage: int, matrices: Sequence[int], world_size: int) -> int:
    """Return the numbers of the matrices of which no rank has all."""
    if stage in (0, 3):
        return sum(matrices) if stage else 0
    part, start, shared = _padded(sum(matrices), world_size) // world_size, 0, 0
    for size in matrices:
        shared += size if start // part != (start + size - 1) // part else 0
        start += size
    return shared


def seconds(collective: Collective, machine: Machine, world_size: int, gpus_per_node: int) -> float:
    """Return how long the calls take, by a ring or by a tree, whichever is faster.

    A ring moves (n - 1) / n of the bytes over every connection, in n - 1 messages one after the other, an all-reduce
    twice as much; a tree moves them whole, in log2 n messages. Among several nodes the network of a node is shared by
    its GPUs' rings.
    """
    nodes = math.ceil(world_size / gpus_per_node)
    bandwidth = machine.link if nodes == 1 else min(machine.link, machine.network)
    farthest = machine.link_latency if nodes == 1 else machine.network_latency
    # A ring enters and leaves every node once.
    hop = machine.link_latency if nodes == 1 else machine.link_latency + farthest / gpus_per_node
    ring = collective.bytes * (world_size - 1) / world_size / bandwidth + collective.calls * (world_size - 1) * hop
    tree = collective.bytes / bandwidth + collective.calls * math.ceil(math.log2(world_size)) * farthest
    return (2 if collective.kind == "all_reduce" else 1) * min(ring, tree)
