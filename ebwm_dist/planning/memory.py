"""The memory of a rank by what it is for: weights, gradients, optimizer, buckets, activations.

What DeepSpeed 0.19.8 keeps was measured on ranks of one machine, at every stage, with and without offloading; tests
hold these sums to such measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ebwm_dist.config.deepspeed import GATHERED_NUMBERS, bucket_size
from ebwm_dist.config.schema import Config, ZeroConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.models.layers import is_block_matrix
from ebwm_dist.planning.footprint import Footprint
from ebwm_dist.planning.live_bytes import UndrawnWeights

GIB = 2**30
FRAGMENTATION = 0.05
"""Share of all that the allocator loses to fragmentation, an assumption."""
CUDA_CONTEXT = 0.6 * GIB
"""Bytes that CUDA and NCCL take of a GPU for themselves, an assumption."""


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has."""

    groups: tuple[int, ...]
    """In each group of the optimizer."""
    largest: int
    """Of the largest one."""
    matrices: tuple[int, ...] = ()
    """Of each matrix that Muon trains, with one moment instead of two; in their order."""

    @property
    def total(self) -> int:
        """Return the number of all."""
        return sum(self.groups)


@dataclass(frozen=True)
class State:
    """Bytes of weights, gradients and optimizer on a rank's device, and of what is offloaded on its host."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    """What collectives copy into and out of."""
    host: float

    @property
    def device(self) -> float:
        """Return the bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def count_parameters(config: Config) -> Parameters:
    """Count them; nothing is allocated."""
    with torch.device("meta"), UndrawnWeights():
        model = build_model(config, pad_id=0)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    alpha = sum(size for name, size in sizes.items() if name.endswith("step_size.alpha"))
    matrices: tuple[int, ...] = ()
    if config.optimizer.kind == "muon":
        matrices = tuple(p.numel() for name, p in model.named_parameters() if is_block_matrix(name, p.shape))
    rest = sum(sizes.values()) - alpha - sum(matrices)
    if not alpha:
        rest += sum(p.numel() for p in model.parameters() if not p.requires_grad)
    groups = tuple(size for size in (rest, sum(matrices), alpha) if size)
    return Parameters(groups, max(sizes.values()), matrices)


def state_of(parameters: Parameters, config: Config, world_size: int) -> State:
    """Return the bytes of a rank.

    Of a parameter: its weight in 4 bytes (bf16: 2), a master copy and two moments in 12 (stage 0 in fp32: 8; 4 less for
    Muon's one moment), and the gradients of a step, which stages 1 and 2 hold in more than one copy.
    """
    spared = 4.0 * sum(parameters.matrices)
    number, precision, stage = parameters.total, config.training.precision, config.zero.stage
    weight, fp32 = 2.0 if precision == "bf16" else 4.0, precision == "fp32"
    if stage == 0:
        return State(weight * number, 4.0 * number, (8.0 if fp32 else 12.0) * number - spared, 0.0, 0.0)
    own, offload = number / world_size, config.zero.offload_optimizer
    weights, optimizer, host = weight * number, 12.0 * own - spared / world_size, 0.0
    # A parameter that is larger than a bucket is exchanged as a whole; stage 3 gathers it in any case.
    bucket = weight * min(number, max(bucket_size(config), parameters.largest if stage < 3 else 0))
    if stage == 1:
        gradients = (8.0 if fp32 else 4.0) * number
        bucket = bucket if fp32 else 0.0
    elif stage == 2 and offload:
        gradients = 5.6 * number if fp32 else 0.6 * number + 4.0 * own
    elif stage == 2:
        gradients = 6.0 * (number + own) if fp32 else 2.0 * number + 4.0 * own
    else:
        gradients = 0.0 if offload else 4.0 * own
        whole = min(number, GATHERED_NUMBERS + parameters.largest) if world_size > 1 else 0
        weights = weight * (own + whole)
    if offload:
        optimizer = 0.0
        host = _HOST[stage, precision] * own + (8.0 * parameters.largest if stage < 3 else 0.0) - spared / world_size
    if config.zero.offload_parameters:
        host += weight * own
        weights -= weight * own
    return State(weights, gradients, optimizer, bucket, host)


_HOST = {
    (1, "fp32"): 20.0, (1, "bf16"): 20.0,
    (2, "fp32"): 23.0, (2, "bf16"): 18.0,
    (3, "fp32"): 16.0, (3, "bf16"): 16.0,
}  # fmt: skip
"""Bytes on the host of a parameter that a rank updates, with an offloaded optimizer: moments, master, gradients."""


def saved_bytes(parameters: Parameters, zero: ZeroConfig, world_size: int, precision: str) -> float:
    """Return the bytes of weights, their fp32 copy and moments that rank 0, which writes the most, saves."""
    weights, number, spared = (2.0 if precision == "bf16" else 4.0), parameters.total, 4.0 * sum(parameters.matrices)
    if zero.stage == 0:
        return number * (weights + (12.0 if precision == "bf16" else 8.0)) - spared
    return number * (0.0 if zero.stage == 3 else weights) + (12.0 * number - spared) / world_size


def checkpoint_bytes(parameters: Parameters, precision: str, stage: int) -> float:
    """Return the bytes of a checkpoint, all ranks together."""
    return saved_bytes(parameters, ZeroConfig(stage), 1, precision)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank's device, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    context: float
    slice: float
    vocabulary: float
    fragmentation: float
    host: float
    """On the host, beside the device."""

    @property
    def total(self) -> float:
        """Return the bytes on the device."""
        return sum(asdict(self).values()) - self.host


def memory_of(state: State, footprint: Footprint) -> Memory:
    """Return the memory of a rank: what it keeps, and the peak of a micro-batch."""
    refining = footprint.context_peak <= footprint.context + footprint.slice + footprint.vocabulary
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buckets=state.buckets,
        context=footprint.context if refining else footprint.context_peak,
        slice=footprint.slice if refining else 0.0,
        vocabulary=footprint.vocabulary if refining else 0.0,
        fragmentation=FRAGMENTATION * (state.device + footprint.activations),
        host=state.host,
    )
