"""Noise that is a pure function of the run's seed, the sample, what it is drawn for, and the position.

Shapes: B batch, S positions, W width.

So it depends neither on the rank that holds a sample, nor on the samples beside it, nor on how positions are sliced,
and it is the same again after a resume. CPU and CUDA draw different numbers for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What is drawn: the initial state, alpha's factor, the shuffled states of a contrast, and (+ the index of the MCMC
# step) the Langevin noise.
INITIAL = 0
STEP_SIZE = 1
SHUFFLE = -2
LANGEVIN = 2
# The level of the noise of a denoiser.
LEVEL = -1
# Which predictions start at another state of the sample, and at which.
CORRUPTED = -3

# Positions that share a generator: a short slice draws at most a block too many before it, and a whole sequence takes
# few launches. A multiple of 16, below which torch's CPU kernel would draw by another rule.
BLOCK = 32

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix_seed(*values: int) -> int:
    """Hash integers, in order, into an unrelated 63-bit seed (chained finalisers of SplitMix64)."""
    x = len(values)
    for value in values:
        x = (x + value + 1) * _GOLDEN & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        x ^= x >> 31
    return x >> 1


def normal(
    seed: int, sample_ids: Tensor, draw: int, start: int, stop: int, width: int, device: torch.device | None = None
) -> Tensor:
    """Draw from N(0, 1) for positions `start` to `stop` of every sample.

    Args:
        seed: seed of the run.
        sample_ids: ids [B] of the samples; on the CPU, as reading them from elsewhere waits for it.
        draw: what the noise is for; other draws are unrelated.
        start: first position.
        stop: position after the last.
        width: numbers W per position.
        device: where to draw; unset, on the CPU.

    Returns:
        noise [B, stop - start, W] in float32.
    """
    return _draw(torch.Tensor.normal_, seed, sample_ids, draw, start, stop, width, device)


def uniform(
    seed: int, sample_ids: Tensor, draw: int, start: int, stop: int, width: int, device: torch.device | None = None
) -> Tensor:
    """Draw from the uniform distribution on [0, 1); arguments and result as of `normal`."""
    return _draw(torch.Tensor.uniform_, seed, sample_ids, draw, start, stop, width, device)


def _numbers(positions: int, width: int, device: torch.device) -> int:
    """Return how many numbers of a block to draw so that those of its first positions are what the whole block has."""
    # torch's CPU kernel draws one number after the other, 16 at a time; on CUDA each depends on how many there are.
    return -(-positions * width // 16) * 16 if device.type == "cpu" else BLOCK * width


def _draw(
    fill: Callable[..., Tensor],
    seed: int,
    sample_ids: Tensor,
    draw: int,
    start: int,
    stop: int,
    width: int,
    device: torch.device | None,
) -> Tensor:
    device = torch.device("cpu") if device is None else device
    noise = torch.empty(len(sample_ids), stop - start, width, device=device, dtype=torch.float32)
    generator = torch.Generator(device)
    for row, sample_id in zip(noise, sample_ids.tolist(), strict=True):
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first, last = block * BLOCK, (block + 1) * BLOCK
            low, high = max(first, start), min(last, stop)
            here = row[low - start : high - start]
            generator.manual_seed(mix_seed(seed, sample_id, draw, block))
            if high - low == BLOCK:
                fill(here, generator=generator)
                continue
            drawn = row.new_empty(_numbers(high - first, width, device))
            fill(drawn, generator=generator)
            here.copy_(drawn[: (high - first) * width].view(-1, width)[low - first :])
    return noise
