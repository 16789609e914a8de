"""Losses and energies by MCMC step and errors of frames: of a run, or of shards of the held-out data.

A shard is the part that one of so many ranks would evaluate. Unlike ranks, shards need no collectives, so that any of
them can be computed again, anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.config.schema import EvaluationConfig
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.frames import FrameErrors, frame_errors
from ebwm_dist.evaluation.losses import Sums, accumulate
from ebwm_dist.run import Run, ValidationData


@dataclass(frozen=True)
class ErrorsByStep:
    """The errors of a part of the held-out data, on the CPU."""

    sums: Sums
    frames: FrameErrors | None
    """Of video."""
    trained_steps: int
    """MCMC steps that training takes at most."""
    tokens_per_byte: float | None
    """Of all held-out text."""

    def gathered(self, world: World) -> ErrorsByStep:
        """Return the errors of the parts of all ranks."""
        sums = replace(self.sums, values=world.gather_rows(self.sums.values[None]).sum(0))
        return replace(self, sums=sums, frames=None if self.frames is None else self.frames.gathered(world))

    def figures(self) -> dict[str, Any]:
        """Return losses, energies, of text perplexity and bits per byte, of video errors of frames, by their names."""
        frames = {} if self.frames is None else self.frames.figures()
        return {"trained_steps": self.trained_steps, **self.sums.result().figures(self.tokens_per_byte), **frames}


def measure(
    run: Run,
    data: ValidationData,
    max_mcmc_steps: int,
    max_sequences: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> ErrorsByStep:
    """Measure the rank's part of at most `max_sequences` held-out sequences."""
    steps = max(max_mcmc_steps, run.trained_steps) if run.config.model.kind == "ebt" else 1
    shared = (batch_size, max_sequences, rank, world_size)
    sums = accumulate(
        run.model.evaluate, data.batches(*shared), steps, torch.device(run.device), preprocess=data.preprocess
    )
    assert sums is not None
    frames = None
    if run.config.model.embedding_dim is not None:
        frames = frame_errors(run.model, data.batches(*shared), steps, data.preprocess)
    per_byte = data.tokens_per_byte(max_sequences)
    return ErrorsByStep(replace(sums, values=sums.values.cpu()), frames, run.trained_steps, per_byte)


def evaluate_shard(
    checkpoint: Path, index: int, count: int, settings: EvaluationConfig, device: torch.device
) -> ErrorsByStep:
    """Evaluate a checkpoint on the `index`-th of `count` shards of the held-out data of its run."""
    run = Run(checkpoint, device)
    sizes = (settings.max_mcmc_steps, settings.max_sequences, settings.batch_size)
    return measure(run, run.validation_data(), *sizes, index, count)


def merge(shards: Sequence[ErrorsByStep]) -> dict[str, Any]:
    """Return the figures of all shards together."""
    frames = [shard.frames for shard in shards if shard.frames is not None]
    return replace(
        shards[0],
        sums=reduce(add, [shard.sums for shard in shards]),
        frames=FrameErrors.joined(frames) if frames else None,
    ).figures()
