"""Losses, energies and perplexities of a model on held-out batches, on one rank, many ranks, or shard by shard.

Shapes: K MCMC steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.models.block_layout import TOKENS, BlockLayout
from ebwm_dist.models.output import Evaluation, prediction_losses

_LARGEST_EXPONENT = 709.0
"""exp of more than this is no float64."""


@dataclass(frozen=True)
class Result:
    """Means over all predicted tokens or frames."""

    step_losses: list[float]
    """Cross-entropy in nats, or SmoothL1 of embeddings, after each MCMC step [K]; one value for an autoregressive
    model, and for a diffusion model, the squared error of the noise or velocity that it finds."""
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


class Sums(NamedTuple):
    """The sums over sequences that a result is made of, in float64."""

    tokens: Tensor
    sequences: Tensor
    losses: Tensor
    """[K]."""
    changes: Tensor
    """Mean loss of a sequence after each step minus that after the first one [K]."""
    squared_changes: Tensor
    """[K]."""
    energies: Tensor
    """[K + 1], or [0] without an energy."""
    copies: Tensor
    """Loss of a copy of the last frame [1], or [0] of tokens."""

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the sequences of both."""
        return Sums(*map(torch.add, self, other))

    def over_ranks(self) -> Sums:
        """Return the sums over the sequences of all ranks of the process group, if there is one."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        flat = torch.cat([tensor.flatten() for tensor in self])
        dist.all_reduce(flat)
        return Sums(*(part.view_as(x) for part, x in zip(flat.split([x.numel() for x in self]), self, strict=True)))

    def result(self) -> Result:
        """Return the means."""
        spread = self.squared_changes / self.sequences - (self.changes / self.sequences).square()
        variance = spread.clamp(min=0) / (self.sequences - 1).clamp(min=1)
        return Result(
            step_losses=(self.losses / self.tokens).tolist(),
            energies=(self.energies / self.tokens).tolist() or None,
            standard_errors=variance.sqrt().tolist(),
            tokens=round(self.tokens.item()),
            copy_loss=(self.copies / self.tokens).item() if len(self.copies) else None,
        )


def accumulate(
    evaluate: Callable[[Tensor, Tensor, int, Tensor | None], Evaluation],
    batches: Iterable[Batch],
    num_steps: int,
    preprocess: Callable[[Tensor, Tensor | None], Tensor],
    proceed: Callable[[], bool] = lambda: True,
    layout: BlockLayout = TOKENS,
    loss_of: str = "predictions",
) -> Sums | None:
    """Evaluate a model at `num_steps` MCMC steps on the batches of this process.

    Args:
        evaluate: that of the model, or an engine's call of it.
        batches: at least one.
        num_steps: of MCMC.
        preprocess: of the samples of a batch, to the states that the model observes.
        proceed: called before each batch; where it returns False the result is None.
        layout: of the samples.
        loss_of: what the model's losses are of; only those of predictions have copies of the last frame beside them.
    """
    total: Sums | None = None
    for batch in batches:
        if not proceed():
            return None
        observed = preprocess(batch.observed, batch.labels)
        found = evaluate(observed, batch.sample_ids, num_steps, batch.targets)
        # What samples with classes begin with is no frame that could be copied.
        copied = None if batch.labels is not None or loss_of != "predictions" else layout
        sums = _sums(found, observed, batch.sample_mask, copied)
        total = sums if total is None else total.plus(sums)
    assert total is not None, "no validation batch"
    return total


def _sums(found: Evaluation, observed: Tensor, in_batch: Tensor, layout: BlockLayout | None) -> Sums:
    """Return the sums over those sequences of a batch that do not only fill it up."""
    in_batch = in_batch.to(observed.device, torch.float64)
    losses, tokens = (x.to(observed.device) * in_batch for x in (found.step_losses, found.tokens))
    changes = (losses - losses[0]) / tokens.clamp(min=1)
    energies, copies = losses[:0, 0], losses[:0, 0]
    if found.energies is not None:
        energies = (found.energies.to(observed.device) * in_batch).sum(-1)
    if observed.is_floating_point() and layout is not None and layout.prefix:
        before = layout.most_recent(layout.context(observed))
        copies = (prediction_losses(before, layout.targets(observed)).sum(-1) * in_batch).sum(-1, keepdim=True)
    sums = losses.sum(-1), changes.sum(-1), changes.square().sum(-1), energies, copies
    return Sums(tokens.sum(), (tokens > 0).double().sum(), *(x.double() for x in sums))
