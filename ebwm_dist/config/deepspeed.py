"""The dictionary handed to DeepSpeed, derived from the configuration so that nobody writes one by hand."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ebwm_dist.config.deepspeed_keys import check_deepspeed_keys
from ebwm_dist.config.launch import check_world
from ebwm_dist.config.schema import Config
from ebwm_dist.devices import use_cuda

GATHERED_NUMBERS = 100_000_000
"""Numbers of the parameters that ZeRO-3 may hold whole at a time, beyond those of the module that runs."""
BUCKET = 50_000_000
"""Numbers that are reduced or gathered at a time. DeepSpeed's 500 million would take gigabytes beside a small model."""
# The step count after which DeepSpeed would print lines of its own: never, the trainer writes the log.
_NEVER = 1_000_000_000


def deepspeed_dict(config: Config, world_size: int) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize` on `world_size` ranks."""
    check_world(config, world_size)
    check_deepspeed_keys(config.deepspeed)
    training, stage = config.training, config.zero.stage
    derived: dict[str, Any] = {
        # A step is as many backwards as the trainer does before it steps. Given more than one micro-batch, DeepSpeed
        # would divide some of them by their number: those of a tensor that a pass has returned, at stages 0 and 1.
        "train_batch_size": training.micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if optimizer_checks(config) else config.optimizer.grad_clip,
        "bf16": {"enabled": training.precision == "bf16" and not optimizer_checks(config)},
        "zero_optimization": _zero(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }
    if derived["bf16"]["enabled"]:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        if stage == 1:  # reduces once a step, so exactness costs little; stages 2 and 3 reduce in every backward
            derived["communication_data_type"] = "fp32"
    return _merged(derived, config.deepspeed)


def optimizer_checks(config: Config) -> bool:
    """Return whether our optimizer measures, checks and clips the gradient itself, and keeps fp32 weights in bf16.

    DeepSpeed does all that but at stage 0: in fp32 it does not look for infinite gradients there, and in bf16 it adds
    up gradients in bf16 and starts AdamW with its bias corrections one step ahead.
    """
    return config.zero.stage == 0


def micro_steps(config: Config, world_size: int) -> int:
    """Return the number of micro-batches that each rank adds up for one optimizer step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * (world_size // training.position_parallel))


def bucket_size(config: Config) -> int:
    """Return how many numbers are reduced at a time."""
    return int(config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET))


def _zero(config: Config) -> dict[str, Any]:
    zero = config.zero
    values: dict[str, Any] = {"stage": zero.stage}
    if zero.stage > 0:
        values |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if zero.stage == 3:
        values |= {
            "stage3_max_live_parameters": GATHERED_NUMBERS,
            "stage3_max_reuse_distance": GATHERED_NUMBERS,
            "stage3_prefetch_bucket_size": BUCKET,
            "memory_efficient_linear": False,  # else DeepSpeed replaces torch's function for the whole process
        }
    cpu = {"device": "cpu", "pin_memory": use_cuda()}
    if zero.offload_optimizer:
        values["offload_optimizer"] = cpu
    if zero.offload_parameters:
        values["offload_param"] = dict(cpu)
    return values


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in extra.items():
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[name] = _merged(below, value)
        else:
            result[name] = deepcopy(value)
    return result
