"""What to do when the memory of a GPU is not enough: one line with the settings that would lessen it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.training.profiling import FOLDER


def out_of_memory(error: torch.OutOfMemoryError, config: Config, world: World) -> UserError:
    """Return the error that a user reads, and on CUDA leave a snapshot of the memory in the run folder."""
    reason = ". ".join(" ".join(str(error).split()).split(". ")[:2]).rstrip(".")
    advice = list(remedies(config, world.world_size)) or ["a smaller model"]
    text = f"{reason}. In the order of what they cost, these take less: {'; '.join(advice)}"
    if world.device.type == "cuda":
        path = Path(config.run_dir) / FOLDER / f"out_of_memory_rank_{world.rank:05d}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        text += f". What the memory holds is in {path}, for https://docs.pytorch.org/memory_viz"
    return UserError(text)


def remedies(config: Config, world_size: int) -> Iterator[str]:
    """Yield the settings that would lessen the memory of a step, the cheapest first."""
    training, zero, sharded = config.training, config.zero, config.zero.stage
    if config.model.kind == "ebt":
        if training.attention == "math" and not training.compile and config.model.block_size == 1:
            yield "training.attention=auto"
        if (positions := min(training.position_chunk, config.data.sequence_length)) > config.model.block_size:
            yield f"training.position_chunk below {positions}"
    if training.micro_batch_size > 1:
        yield f"training.micro_batch_size below {training.micro_batch_size}"
    if world_size > 1 and sharded < (2 if training.compile else 3):
        yield f"zero.stage={sharded + 1}"
    if training.activation_checkpointing == "none":
        yield "training.activation_checkpointing=block"
    if sharded > 0 and not zero.offload_optimizer:
        yield "zero.offload_optimizer=true"
    if sharded == 3 and not zero.offload_parameters:
        yield "zero.offload_parameters=true"
