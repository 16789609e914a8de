"""Describe a run and its cost without starting it: `launchers/train.py --dry-run`."""

from __future__ import annotations

from dataclasses import replace

from ebwm_dist.config.loading import to_yaml
from ebwm_dist.config.schema import Config, ZeroConfig
from ebwm_dist.data.loading.mixture import Mixture, describe_weights
from ebwm_dist.data.remote import is_remote
from ebwm_dist.errors import UserError
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.planning.footprint import FootprintModel
from ebwm_dist.planning.memory import GIB, Parameters, State, count_parameters, saved_bytes, state_of
from ebwm_dist.training.initial_weights import check_initial_weights

# Larger counts differ little: what ZeRO shards is then nearly gone.
WORLD_SIZES = (1, 8, 64)
LAYOUTS = {
    **{f"ZeRO {stage}": ZeroConfig(stage) for stage in (0, 1, 2, 3)},
    "3, offloaded": ZeroConfig(3, offload_optimizer=True, offload_parameters=True),
}


def describe(config: Config) -> str:
    """Return the resolved configuration, parameters, FLOPs per token or frame and memory per GPU by ZeRO stage."""
    counted = count_parameters(config)
    parameters = counted.total
    data = load_data(config)
    share = 1.0 if data is None else data.target_share
    flops = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length, share)
    training = config.training
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    tokens = tokens_per_step * training.max_steps
    activations = FootprintModel(config).of(config).activations
    unit = config.model.unit
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
        row = [_state(config, counted, zero, world_size).device for zero in LAYOUTS.values()]
        lines.append(f"  {world_size:4}  " + "".join(f"{(size + activations) / GIB:14.2f}" for size in row))
    group = training.position_parallel
    if group > 1:
        own = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length, share, group)
        per_rank = f"{own:.4g} on each of {group} ranks that share its positions"
        lines.insert(4, f"training FLOPs per {unit}: {per_rank}, {flops / own:.2f} times less than on one rank")
    if training.initialize_from is not None:
        lines[2:2] = check_initial_weights(config, data)
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
        on_cpu = _state(config, counted, zero, world_size).host
        lines.append(f"  memory of the CPU per GPU, with {world_size:2} GPUs: {on_cpu / GIB:.2f}")
    if config.checkpoint.asynchronous:
        sizes = [saved_bytes(counted, zero, world_size, training.precision) / GIB for world_size in WORLD_SIZES]
        copies = ", ".join(f"{size:.2f} with {number}" for size, number in zip(sizes, WORLD_SIZES, strict=True))
        lines.append(f"  memory of the CPU for rank 0's copy of a save (checkpoint.asynchronous): {copies} GPUs")
    return "\n".join(lines)


def _state(config: Config, parameters: Parameters, zero: ZeroConfig, world_size: int) -> State:
    return state_of(parameters, replace(config, zero=zero), world_size)


def load_data(config: Config) -> Mixture | None:
    """Return data on this machine; None where they are not made yet, or somewhere else."""
    if any(is_remote(address) for address in config.data.mixture or [config.data.path]):
        return None
    try:
        return Mixture.load(config.data)
    except UserError:
        return None
