"""Losses and energies by MCMC step and errors of frames: of ranks, or of shards of the held-out data.

A shard is the part that one of so many ranks would evaluate. Any of them can be computed again, anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.config.services import EvaluationConfig
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
    part = (batch_size, max_sequences, rank, world_size)
    model, preprocess = run.model, data.preprocess
    batches = data.batches(*part)
    sums = accumulate(model.evaluate, batches, steps, preprocess, layout=model.layout, loss_of=model.loss_of)
    assert sums is not None
    frames = None
    if preprocess.frames_are_states(run.config.model):
        frames = frame_errors(model, data.batches(*part), steps, preprocess)
    sums = Sums(*(tensor.cpu() for tensor in sums))
    return ErrorsByStep(sums, frames, run.trained_steps, data.tokens_per_byte(max_sequences))


def evaluate_shard(
    checkpoint: Path, index: int, count: int, settings: EvaluationConfig, device: torch.device
) -> ErrorsByStep:
    """Evaluate a checkpoint on the `index`-th of `count` shards of the held-out data of its run."""
    run = Run(checkpoint, device)
    sizes = (settings.max_mcmc_steps, settings.max_sequences, settings.batch_size)
    return measure(run, run.validation_data(), *sizes, index, count)


def merge(parts: Sequence[ErrorsByStep]) -> dict[str, Any]:
    """Return losses, energies, of text perplexity and bits per byte, of video errors of frames, over all parts."""
    first, frames = parts[0], [part.frames for part in parts if part.frames is not None]
    result = reduce(Sums.plus, [part.sums for part in parts]).result()
    figures = {"trained_steps": first.trained_steps, **result.figures(first.tokens_per_byte)}
    return figures | (FrameErrors.joined(frames).figures() if frames else {})
