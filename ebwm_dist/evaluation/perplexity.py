"""Losses, energies and perplexities of a model on held-out batches, on one rank or many.

Shapes: K MCMC steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ebwm_dist.data.stream import TextBatch
from ebwm_dist.registry import Model


@dataclass(frozen=True)
class Result:
    """Means over all predicted tokens."""

    step_losses: list[float]
    """Cross-entropy in nats after each MCMC step [K]; one value for an autoregressive model."""
    energies: list[float] | None
    """Energy of the initial state and after each step [K + 1]; None for an autoregressive model."""
    tokens: int
    """Number of predicted tokens."""

    @property
    def perplexities(self) -> list[float]:
        """Return exp of the mean loss after each step."""
        return [math.exp(loss) for loss in self.step_losses]


def evaluate(
    model: Model,
    batches: Iterable[TextBatch],
    num_steps: int,
    device: torch.device,
    proceed: Callable[[], bool] = lambda: True,
) -> Result | None:
    """Evaluate `model` at `num_steps` MCMC steps; with a process group, over the batches of all ranks.

    Every rank must have the same number of batches. `proceed` is called before each; where it returns False, on all
    ranks alike, there is no result.
    """
    total: torch.Tensor | None = None
    has_energy = False
    for batch in batches:
        if not proceed():
            return None
        sums = model.evaluate(batch.tokens.to(device), batch.sample_ids.to(device), num_steps)
        has_energy = sums.energies is not None
        parts = [sums.tokens[None], sums.step_losses] + ([] if sums.energies is None else [sums.energies])
        values = torch.cat([part.to(device, torch.float64) for part in parts])
        total = values if total is None else total + values
    assert total is not None, "no validation batch"
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    tokens, *means = (total / total[0]).tolist()
    tokens = round(total[0].item())
    count = (len(means) - 1) // 2 if has_energy else len(means)
    return Result(means[:count], means[count:] if has_energy else None, tokens)
