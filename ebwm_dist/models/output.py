"""What a model hands to the trainer and to evaluation, the same for energy and autoregressive models.

Shapes: K MCMC steps (1 for an autoregressive model), B batch, S positions, V vocabulary, E width of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[..., Any]
"""Runs a pass of the model by name, as `PassModule.forward` does."""
Backward = Callable[[Tensor], Any]
"""Adds the gradients of a scalar to those of the parameters."""


class PassModule(nn.Module):
    """A model whose `forward` runs one of its passes by name, as that is all that a distributed engine sees of it."""

    def forward(self, name: str, *args: Any) -> Any:
        """Run the method `name`."""
        return getattr(self, name)(*args)

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint of this rank must hold besides parameters."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` has returned."""

    def deal_extra_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """Return what of the extra states of all ranks of the run so far belongs to `rank` of `world_size` now."""
        return {}


class TrainingOutput(NamedTuple):
    """Result of a training step on a micro-batch; everything is detached.

    Losses, energies and norms are sums over the targets without padding, divided by the number of targets that the step
    was given: those of all micro-batches add up to the means over them.
    """

    loss: Tensor
    """The loss that was trained on, a scalar."""
    step_losses: Tensor
    """Loss after each MCMC step [K]."""
    step_energies: Tensor | None = None
    """Energy of the state that enters each MCMC step [K]; None without an energy."""
    step_gradient_norms: Tensor | None = None
    """Norm of the energy's gradient dE/de at each step [K]."""
    step_nonfinite: Tensor | None = None
    """Number of positions whose energy or gradient was not finite at each step [K]."""


class Evaluation(NamedTuple):
    """Sums over the predicted tokens or frames of each sequence; padding does not count."""

    step_losses: Tensor
    """Summed loss after each MCMC step [K, B]: cross-entropy of tokens, SmoothL1 of embeddings."""
    energies: Tensor | None
    """Summed energy of the initial state and of the state after each step [K + 1, B]; None without an energy."""
    tokens: Tensor
    """Number of predicted tokens or frames [B]."""


def cross_entropies(logits: Tensor, targets: Tensor, pad_id: int) -> Tensor:
    """Return the cross-entropy [B, S] of `logits` [B, S, V], 0 where the `targets` [B, S] are `pad_id`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad_id, reduction="none")
    return losses.view_as(targets)


def smooth_l1_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the SmoothL1 loss [B, S] of embeddings [B, S, E], a mean over each one's numbers."""
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return F.smooth_l1_loss(predictions, targets.to(predictions.dtype), reduction="none", beta=1.0).mean(-1)
