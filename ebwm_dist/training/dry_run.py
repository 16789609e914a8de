"""What a run would be and take, told without starting it: `launchers/train.py --dry-run`."""

from __future__ import annotations

import dataclasses

import torch
from omegaconf import OmegaConf

from ebwm_dist.config.schema import Config
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.registry import build_model

GIB = 2**30
# Larger counts differ little: what ZeRO shards is then nearly gone.
WORLD_SIZES = (1, 8, 64)


def describe(config: Config) -> str:
    """Return the resolved configuration, parameters, FLOPs per token and memory per GPU by ZeRO stage."""
    parameters = parameter_count(config)
    flops = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length)
    training = config.training
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    tokens = tokens_per_step * training.max_steps
    activations = activation_bytes(config)
    lines = [
        OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip(),
        "---",
        f"parameters: {parameters:,}",
        f"training FLOPs per token: {flops:.4g} ({flops / parameters:.1f} per parameter)",
        f"tokens: {tokens_per_step:,} per step, {tokens:.4g} in {training.max_steps:,} ({flops * tokens:.3g} FLOPs)",
        f"memory per GPU in GiB ({training.precision}, micro-batch {training.micro_batch_size}: "
        f"{activations / GIB:.2f} of activations, the rest weights, gradients and optimizer state):",
        "  GPUs  " + "".join(f"{f'ZeRO {stage}':>10}" for stage in (0, 1, 2)),
    ]
    for world_size in WORLD_SIZES:
        row = [state_bytes(parameters, stage, world_size, training.precision) + activations for stage in (0, 1, 2)]
        lines.append(f"  {world_size:4}  " + "".join(f"{size / GIB:10.2f}" for size in row))
    lines.append(f"  (this configuration: ZeRO {config.zero.stage}; CUDA's own context and fragmentation come on top)")
    return "\n".join(lines)


def parameter_count(config: Config) -> int:
    """Return the number of parameters; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, pad_id=0).parameters())


def state_bytes(parameters: int, stage: int, world_size: int, precision: str) -> float:
    """Return the bytes of weights, gradients and optimizer state on one rank.

    fp32: weights 4, gradients 4, AdamW 8 per parameter; ZeRO adds its own 4-byte copy of the weights it owns. bf16:
    weights 2, gradients 2, and in fp32 a master copy 4 and AdamW 8.
    """
    shards = world_size if stage >= 1 else 1
    gradient_shards = world_size if stage >= 2 else 1
    if precision == "bf16":
        per_parameter = 2 + 2 / gradient_shards + 12 / shards
    else:
        per_parameter = 4 + 4 / gradient_shards + (8 if stage == 0 else 12 / shards)
    return parameters * per_parameter


def activation_bytes(config: Config) -> int:
    """Return the bytes that autograd keeps for the backward of one micro-batch, by running it on the meta device."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    # Noise would need a generator, which the meta device does not have; the start's size is the same.
    config = dataclasses.replace(config, mcmc=dataclasses.replace(config.mcmc, initial_state="zeros"))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"):
        model = build_model(config, pad_id=0).to(dtype)
        tokens = torch.zeros(config.training.micro_batch_size, config.data.sequence_length + 1, dtype=torch.long)
        ids = torch.zeros(config.training.micro_batch_size, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens, ids)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    del output
    return total
