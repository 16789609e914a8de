"""Describe a run and its cost without starting it: `launchers/train.py --dry-run`."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebwm_dist.config.deepspeed import GATHERED_NUMBERS
from ebwm_dist.config.loading import to_yaml
from ebwm_dist.config.schema import Config, ZeroConfig
from ebwm_dist.data.loading.mixture import Mixture, describe_weights
from ebwm_dist.data.remote import is_remote
from ebwm_dist.errors import UserError
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Share
from ebwm_dist.models.flops import training_flops_per_token

GIB = 2**30
# Larger counts differ little: what ZeRO shards is then nearly gone.
WORLD_SIZES = (1, 8, 64)
LAYOUTS = {
    **{f"ZeRO {stage}": ZeroConfig(stage) for stage in (0, 1, 2, 3)},
    "3, offloaded": ZeroConfig(3, offload_optimizer=True, offload_parameters=True),
}


def describe(config: Config) -> str:
    """Return the resolved configuration, parameters, FLOPs per token or frame and memory per GPU by ZeRO stage."""
    parameters = parameter_count(config)
    share = target_share(config)
    flops = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length, share)
    training = config.training
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    tokens = tokens_per_step * training.max_steps
    activations = activation_bytes(config)
    unit = "token" if config.model.embedding_dim is None else "frame"
    lines = [
        to_yaml(config).rstrip(),
        "---",
        f"parameters: {parameters:,}",
        f"training FLOPs per {unit}: {flops:.4g} ({flops / parameters:.1f} per parameter)",
        f"{unit}s: {tokens_per_step:,} per step, {tokens:.4g} in {training.max_steps:,} ({flops * tokens:.3g} FLOPs)",
        f"memory per GPU in GiB ({training.precision}, micro-batch {training.micro_batch_size}: "
        f"{activations / GIB:.2f} of activations, the rest weights, gradients and optimizer state):",
        "  GPUs  " + "".join(f"{name:>14}" for name in LAYOUTS),
    ]
    for world_size in WORLD_SIZES:
        row = [state_bytes(parameters, zero, world_size, training.precision)[0] for zero in LAYOUTS.values()]
        lines.append(f"  {world_size:4}  " + "".join(f"{(size + activations) / GIB:14.2f}" for size in row))
    group = training.position_parallel
    if group > 1:
        own = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length, share, group)
        per_rank = f"{own:.4g} on each of {group} ranks that share its positions"
        lines.insert(4, f"training FLOPs per {unit}: {per_rank}, {flops / own:.2f} times less than on one rank")
    if config.data.mixture:
        lines.insert(2, f"mixture: {describe_weights(config.data.mixture)}")
    if share < 1:
        lines.insert(2, f"targets: {100 * share:.1f} % of the positions, which alone are refined")
    zero = config.zero
    offloaded = [key for key in ("offload_optimizer", "offload_parameters") if getattr(zero, key)]
    lines.append(
        f"  (this configuration: {' and '.join([f'ZeRO {zero.stage}', *offloaded])}; "
        "CUDA's own context and fragmentation come on top)"
    )
    for world_size in WORLD_SIZES if offloaded else ():
        on_cpu = state_bytes(parameters, zero, world_size, training.precision)[1]
        lines.append(f"  memory of the CPU per GPU, with {world_size:2} GPUs: {on_cpu / GIB:.2f}")
    if config.checkpoint.asynchronous:
        sizes = [saved_bytes(parameters, zero, world_size, training.precision) / GIB for world_size in WORLD_SIZES]
        copies = ", ".join(f"{size:.2f} with {number}" for size, number in zip(sizes, WORLD_SIZES, strict=True))
        lines.append(f"  memory of the CPU for rank 0's copy of a save (checkpoint.asynchronous): {copies} GPUs")
    return "\n".join(lines)


def target_share(config: Config) -> float:
    """Return the share of positions that are targets in data on this machine; 1 where they are not made yet."""
    if any(is_remote(address) for address in config.data.mixture or [config.data.path]):
        return 1.0
    try:
        return Mixture.load(config.data).target_share
    except UserError:
        return 1.0


def parameter_count(config: Config) -> int:
    """Return the number of parameters; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, pad_id=0).parameters())


def state_bytes(parameters: int, zero: ZeroConfig, world_size: int, precision: str) -> tuple[float, float]:
    """Return the bytes of weights, gradients and optimizer state of one rank: on its device, and offloaded to the CPU.

    Per parameter: weights 4 (bf16: 2), their gradients added up in fp32 4, AdamW's moments 8; and a master copy 4 in
    bf16, and at stages 1 to 3 in fp32 too, where DeepSpeed keeps one. Stage 3 gathers weights as it goes.
    """
    whole = 2.0 if precision == "bf16" else 4.0
    state = 8.0 if precision == "fp32" and zero.stage == 0 else 12.0
    shards = [world_size if zero.stage >= stage else 1 for stage in (1, 2, 3)]
    weights, gradients, state = whole / shards[2], 4 / shards[1], state / shards[0]
    on_device = whole * min(parameters, GATHERED_NUMBERS) if zero.stage == 3 else 0.0
    on_cpu = 0.0
    if zero.offload_optimizer:
        on_cpu += parameters * (state + 4 / shards[0])  # with the gradients of what this rank updates
        on_device += parameters * (0 if zero.stage == 3 else gradients)
    else:
        on_device += parameters * (state + gradients)
    if zero.offload_parameters:
        on_cpu += parameters * weights
    else:
        on_device += parameters * weights
    return on_device, on_cpu


def saved_bytes(parameters: int, zero: ZeroConfig, world_size: int, precision: str) -> float:
    """Return the bytes of weights, their fp32 copy and moments that rank 0, which writes the most, saves."""
    weights = 2.0 if precision == "bf16" else 4.0
    if zero.stage == 0:
        return parameters * (weights + (12.0 if precision == "bf16" else 8.0))
    return parameters * ((0.0 if zero.stage == 3 else weights) + 12.0 / world_size)


def activation_bytes(config: Config) -> int:
    """Return the peak memory of a micro-batch without weights and their gradients, from a run on the meta device.

    Deep models are extrapolated from a few layers, unless their layers are checkpointed: those hold next to nothing,
    so the peak is not linear in their number.
    """
    layers = config.model.num_layers
    if layers <= 6 or config.training.activation_checkpointing != "none":
        return _live_bytes(config, layers)
    few, more = _live_bytes(config, 3), _live_bytes(config, 6)
    return more + (more - few) * (layers - 6) // 3


def _live_bytes(config: Config, layers: int) -> int:
    training, mcmc = config.training, config.mcmc
    rows = training.micro_batch_size + mcmc.replayed_rows(training.micro_batch_size)
    # Noise would need a generator, which the meta device does not have, and replayed states a full buffer.
    quiet = dataclasses.replace(mcmc, initial_state="zeros", langevin_noise=0.0, step_size_jitter=1.0, replay_size=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers), mcmc=quiet)
    with torch.device("meta"):
        model = build_model(config, pad_id=0).to(torch.bfloat16 if training.precision == "bf16" else torch.float32)
        if training.attention == "fused":
            model.fuse_attention()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        length, width = config.data.sequence_length + 1, config.model.embedding_dim
        observed = torch.zeros(rows, length, dtype=torch.long) if width is None else torch.zeros(rows, length, width)
        if isinstance(model, EnergyBasedTransformer):
            model.share_positions(Share(0, training.position_parallel))
        plan: Any = StepPlan(mcmc.max_mcmc_steps)
        with LiveBytes() as live:
            model.training_step(observed, torch.arange(rows, device="cpu"), plan)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view of it is not new
        for storage in _storages(output):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen and key not in given:
                self.seen.add(key)
                self.now += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return output

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storage of every tensor in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
