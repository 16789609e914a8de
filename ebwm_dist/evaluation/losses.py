"""Losses, energies and perplexities of a model on held-out batches, on one rank, many ranks, or shard by shard.

Shapes: K MCMC steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.models.output import Evaluation, prediction_losses

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

    def figures(self, tokens_per_byte: float | None) -> dict[str, Any]:
        """Return everything by name for JSON; `tokens_per_byte` of text adds perplexity and bits per byte."""
        result: dict[str, Any] = {"steps": [0], "loss": self.step_losses, "tokens": self.tokens}
        if self.energies is not None:
            result["steps"] = list(range(1, len(self.step_losses) + 1))
            result["energy"] = self.energies
            changes = [loss - self.step_losses[0] for loss in self.step_losses]
            result["change_from_first"] = [list(pair) for pair in zip(changes, self.standard_errors, strict=True)]
        if self.copy_loss is not None:
            result["copy_loss"] = self.copy_loss
        if tokens_per_byte is not None:
            result["perplexity"] = self.perplexities
            result["bits_per_byte"] = [loss * tokens_per_byte / math.log(2) for loss in self.step_losses]
        return result


@dataclass(frozen=True)
class Sums:
    """The sums over sequences that a result is made of, so that those of different sequences add up."""

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
    forward: Callable[[Tensor, Tensor, int], Evaluation],
    batches: Iterable[Batch],
    num_steps: int,
    device: torch.device,
    proceed: Callable[[], bool] = lambda: True,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Result | None:
    """Evaluate a model at `num_steps` MCMC steps; with a process group, over the batches of all ranks.

    Args:
        forward: the model's `evaluate`, or that run by an engine.
        batches: as many on every rank.
        num_steps: of MCMC.
        device: of the model.
        proceed: called before each batch; where it returns False, on all ranks alike, the result is None.
        preprocess: of the samples of a batch; None: they are moved to the device.
    """
    sums = accumulate(forward, batches, num_steps, device, proceed, preprocess)
    if sums is None:
        return None
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums.values)
    return sums.result()


def accumulate(
    forward: Callable[[Tensor, Tensor, int], Evaluation],
    batches: Iterable[Batch],
    num_steps: int,
    device: torch.device,
    proceed: Callable[[], bool] = lambda: True,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Sums | None:
    """Sum over the batches of this process alone; arguments as of `evaluate`."""
    total: Sums | None = None
    for batch in batches:
        if not proceed():
            return None
        observed = batch.observed.to(device) if preprocess is None else preprocess(batch.observed)
        sums = _sums(forward(observed, batch.sample_ids, num_steps), observed, batch.counted)
        total = sums if total is None else total + sums
    assert total is not None, "no validation batch"
    return total


def _sums(found: Evaluation, observed: Tensor, in_batch: Tensor) -> Sums:
    """Return the sums over those sequences of a batch that do not only fill it up."""
    device, video = observed.device, observed.is_floating_point()
    in_batch = in_batch.to(device, torch.float64)
    losses, tokens = found.step_losses.to(device) * in_batch, found.tokens.to(device) * in_batch
    # Over sequences: how far the mean of a sequence moves from the first step to each later one, and its square.
    moved = (losses - losses[0]) / tokens.clamp(min=1)
    copied = prediction_losses(observed[:, :-1], observed[:, 1:]).sum(-1) * in_batch if video else tokens.new_zeros(1)
    parts = [copied.sum()[None], tokens.sum()[None], (tokens > 0).sum()[None]]
    parts += [losses.sum(-1), moved.sum(-1), moved.square().sum(-1)]
    energies = 0
    if found.energies is not None:
        energies = len(found.energies)
        parts.append((found.energies.to(device) * in_batch).sum(-1))
    return Sums(torch.cat([part.to(torch.float64) for part in parts]), len(losses), energies, video)
