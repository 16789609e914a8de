"""Check the free-form `deepspeed` section: keys of DeepSpeed that follow from no other key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ebwm_dist.errors import ConfigError

_PRECISION = "set training.precision to 'fp32' or 'bf16'"
# Keys that follow from the rest of the configuration, and those that cannot work with it.
_OWNED = {
    "train_batch_size": "set training.global_batch_size",
    "train_micro_batch_size_per_gpu": "set training.micro_batch_size",
    "gradient_accumulation_steps": "it follows from training.global_batch_size, training.micro_batch_size and ranks",
    "managed_gradient_accumulation": "always false, because a step is made of many backwards",
    "data_types": "always fp32 for sums of gradients and the model's own for the rest; set training.precision",
    "gradient_clipping": "set optimizer.grad_clip",
    "optimizer": "set optimizer.*",
    "scheduler": "set optimizer.*",
    "zero_allow_untested_optimizer": "always true, because the optimizer is not one of DeepSpeed's; set optimizer.*",
    "zero_force_ds_cpu_optimizer": "always false, because the optimizer is not one of DeepSpeed's; set optimizer.*",
    "bf16": "set training.precision",
    "bfloat16": "set training.precision",
    "fp16": f"half precision is not supported; {_PRECISION}",
    "amp": f"mixed precision by amp is not supported; {_PRECISION}",
    "torch_autocast": f"autocast is not supported; {_PRECISION}",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.offload_optimizer": "set zero.offload_optimizer",
    "zero_optimization.offload_param": "set zero.offload_parameters",
    "zero_optimization.cpu_offload": "set zero.offload_optimizer",
    "zero_optimization.cpu_offload_param": "set zero.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "pinned where there is a GPU; set zero.offload_optimizer",
    "zero_optimization.elastic_checkpoint": "such checkpoints cannot be loaded",
    "zero_optimization.leaf_module": "always empty: gradients would be taken from a block before they are all there",
    "zero_optimization.stage3_module_granularity_threshold": "always 0: it makes leaf modules of blocks",
    "activation_checkpointing": "set training.activation_checkpointing",
    "seed": "set seed",
    "steps_per_print": "set training.log_interval",
    "wandb": "set wandb.*",
}
# All others that may be passed on. DeepSpeed silently ignores unknown top-level keys, so a misspelt one would go
# unnoticed; inside the sections it checks the names itself.
_PASSED_ON = (
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)


def check_deepspeed_keys(extra: Mapping[str, Any]) -> None:
    """Refuse keys of the `deepspeed` section that are set by other keys, cannot work, or do not exist."""
    for path, value in _paths(extra):
        if path in _OWNED:
            raise ConfigError(f"deepspeed.{path} = {value!r}: cannot be set here; {_OWNED[path]}")
    for name, value in extra.items():
        if name not in _PASSED_ON:
            close = difflib.get_close_matches(name, _PASSED_ON, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"deepspeed.{name} = {value!r}: {meant}allowed are {', '.join(_PASSED_ON)}")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"deepspeed.zero_optimization = {zero!r}: expected a section; set zero.stage for the stage")


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every section and value of `tree` with its dotted path."""
    for name, value in tree.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
