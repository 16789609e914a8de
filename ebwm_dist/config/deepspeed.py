"""The dictionary handed to DeepSpeed, derived from the configuration so that nobody writes one by hand."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ebwm_dist.config.checks import check_world
from ebwm_dist.config.passthrough import check_passthrough
from ebwm_dist.config.schema import Config

# The step count after which DeepSpeed would print lines of its own: never, the trainer writes the log.
_NEVER = 1_000_000_000


def deepspeed_dict(config: Config, world_size: int) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize` on `world_size` ranks."""
    check_world(config, world_size)
    check_passthrough(config.deepspeed)
    training = config.training
    derived = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * world_size),
        "gradient_clipping": 0.0 if optimizer_checks(config) else config.optimizer.grad_clip,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }
    return _merged(derived, config.deepspeed)


def optimizer_checks(config: Config) -> bool:
    """Return whether our optimizer measures, checks and clips the gradient itself.

    DeepSpeed does all that, but for ZeRO 0 in fp32: there it does not look for infinite gradients.
    """
    return config.zero.stage == 0 and config.training.precision == "fp32"


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in extra.items():
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[name] = _merged(below, value)
        else:
            result[name] = deepcopy(value)
    return result
