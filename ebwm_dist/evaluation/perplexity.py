"""Losses, energies and perplexities of a model on held-out batches, on one rank, many ranks, or shard by shard.

Shapes: K MCMC steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.models.output import Evaluation, Forward, smooth_l1_losses

_LARGEST_EXPONENT = 709.0
"""exp of more than this is no float64."""


@dataclass(frozen=True)
class Result:
    """Means over all predicted tokens or frames."""

    step_losses: list[float]
    """Cross-entropy in nats, or SmoothL1 of embeddings, after each MCMC step [K]; one value for an autoregressive
    model."""
    energies: list[float] | None
    """Energy of the initial state and after each step [K + 1]; None for an autoregressive model."""
    standard_errors: list[float]
    """Standard error of each step's loss minus the first step's [K], from the spread over sequences."""
    tokens: int
    """Number of predicted tokens or frames."""
    copy_loss: float | None = None
    """Of embeddings: the loss of predicting each next one by a copy of the last."""

    @property
    def perplexities(self) -> list[float]:
        """Return exp of the mean loss after each step, infinite where it is too large to write."""
        return [math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf for loss in self.step_losses]


@dataclass(frozen=True)
class Sums:
    """What a result is made of: sums over sequences, so that those of different sequences add up."""

    values: Tensor
    """Of copies, tokens, sequences, losses [K], changes [K], their squares [K], energies [K + 1 or 0]; in float64."""
    steps: int
    energies: int
    video: bool

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over the sequences of both."""
        return replace(self, values=self.values + other.values)

    def result(self) -> Result:
        """Return the means."""
        steps = self.steps
        copied, tokens, sequences, loss, moved, squares, energy = self.values.split(
            [1, 1, 1, steps, steps, steps, self.energies]
        )
        variance = (squares / sequences - (moved / sequences).square()).clamp(min=0) / (sequences - 1).clamp(min=1)
        return Result(
            step_losses=(loss / tokens).tolist(),
            energies=(energy / tokens).tolist() if self.energies else None,
            standard_errors=variance.sqrt().tolist(),
            tokens=round(tokens.item()),
            copy_loss=(copied / tokens).item() if self.video else None,
        )


def evaluate(
    forward: Forward,
    batches: Iterable[Batch],
    num_steps: int,
    device: torch.device,
    proceed: Callable[[], bool] = lambda: True,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Result | None:
    """Evaluate a model at `num_steps` MCMC steps; with a process group, over the batches of all ranks.

    `forward` is the model, or an engine around it. Every rank must have the same number of batches. `proceed` is called
    before each; where it returns False, on all ranks alike, there is no result. `observe` turns samples into what the
    model observes; unset, they only go to the device.
    """
    sums = add_up(forward, batches, num_steps, device, proceed, observe)
    if sums is None:
        return None
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums.values)
    return sums.result()


def add_up(
    forward: Forward,
    batches: Iterable[Batch],
    num_steps: int,
    device: torch.device,
    proceed: Callable[[], bool] = lambda: True,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Sums | None:
    """Do the same over the batches of this process alone."""
    total: torch.Tensor | None = None
    steps = energies = 0
    video = False
    for batch in batches:
        if not proceed():
            return None
        observed = batch.observed.to(device) if observe is None else observe(batch.observed)
        sums: Evaluation = forward("evaluate", observed, batch.sample_ids, num_steps)
        steps, energies = len(sums.step_losses), 0 if sums.energies is None else len(sums.energies)
        counted = batch.counted.to(device, torch.float64)
        losses, counts = sums.step_losses.to(device) * counted, sums.tokens.to(device) * counted
        # Over sequences: how far the mean of a sequence moves from the first step to each later one, and its square.
        moved = (losses - losses[0]) / counts.clamp(min=1)
        video = observed.is_floating_point()
        copied = (
            smooth_l1_losses(observed[:, :-1], observed[:, 1:]).sum(-1) * counted if video else counted.new_zeros(1)
        )
        parts = [
            copied.sum()[None],
            counts.sum()[None],
            (counts > 0).sum()[None],
            losses.sum(-1),
            moved.sum(-1),
            moved.square().sum(-1),
        ]
        if sums.energies is not None:
            parts.append((sums.energies.to(device) * counted).sum(-1))
        values = torch.cat([part.to(torch.float64) for part in parts])
        total = values if total is None else total + values
    assert total is not None, "no validation batch"
    return Sums(total, steps, energies, video)
