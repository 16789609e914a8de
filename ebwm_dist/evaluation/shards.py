"""The evaluation of one checkpoint in shards, which different processes compute and whose sums are then put together.

Each shard is what a rank of so many would evaluate; unlike ranks, shards know nothing of each other, so that any of
them can be computed again, anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.config.schema import EvaluationConfig
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.frames import ClipErrors, errors_of_clips
from ebwm_dist.evaluation.perplexity import Sums, add_up
from ebwm_dist.evaluation.suite import Options, Suite, figures_by_steps
from ebwm_dist.run import Run


@dataclass(frozen=True)
class ShardResult:
    """What is known after a part of the held-out data."""

    sums: Sums
    frames: ClipErrors | None
    """Of video."""
    trained_steps: int
    """MCMC steps that training takes at most."""
    tokens_per_byte: float | None
    """Of held-out text."""


def evaluate_shard(
    checkpoint: Path, index: int, count: int, settings: EvaluationConfig, device: torch.device
) -> ShardResult:
    """Evaluate a checkpoint on the `index`-th of `count` shards of the held-out data."""
    run = Run(checkpoint, device)
    options = Options(
        steps=(settings.max_mcmc_steps,), max_sequences=settings.max_sequences, batch_size=settings.batch_size
    )
    suite = Suite(run, run.validation_data(), options, World(index, 0, count, device))
    steps = max(settings.max_mcmc_steps, suite.trained_steps) if suite.is_energy else 1
    sums = add_up(suite.model, suite.batches(), steps, device, observe=suite.data.preprocess)
    assert sums is not None
    frames = None
    if run.config.model.embedding_dim is not None:
        frames = errors_of_clips(suite.model, suite.batches(), steps, suite.data.preprocess)
    return ShardResult(replace(sums, values=sums.values.cpu()), frames, suite.trained_steps, suite.tokens_per_byte)


def merge(shards: Sequence[ShardResult]) -> dict[str, Any]:
    """Return the figures of all shards together: loss, perplexity and energy by MCMC steps, and errors of frames."""
    first = shards[0]
    sums = first.sums
    for shard in shards[1:]:
        sums = sums + shard.sums
    figures = figures_by_steps(sums.result(), first.tokens_per_byte)
    frames = [shard.frames for shard in shards if shard.frames is not None]
    if frames:
        figures["frames"] = ClipErrors.joined(frames).means()
    return {"trained_steps": first.trained_steps, **figures}
