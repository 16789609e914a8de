"""What a model hands to the trainer and to evaluation, the same for energy and autoregressive models.

Shapes: K MCMC steps (1 for an autoregressive model), B batch, S positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TrainingOutput(NamedTuple):
    """Result of a training forward."""

    loss: Tensor
    """Scalar whose gradient trains the model; its value is the mean of `step_losses`."""
    step_losses: Tensor
    """Loss after each MCMC step [K], detached."""
    step_energies: Tensor | None
    """Mean energy of the state that enters each MCMC step [K], detached; None without an energy."""


class Evaluation(NamedTuple):
    """Sums over the predicted tokens of each sequence; padding does not count."""

    step_losses: Tensor
    """Summed cross-entropy after each MCMC step [K, B]."""
    energies: Tensor | None
    """Summed energy of the initial state and of the state after each step [K + 1, B]; None without an energy."""
    tokens: Tensor
    """Number of predicted tokens [B]."""


def summed_cross_entropy(logits: Tensor, targets: Tensor, pad_id: int) -> Tensor:
    """Return the cross-entropy [B] of `logits` [B, S, V], summed over the `targets` [B, S] other than `pad_id`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad_id, reduction="none")
    return losses.view_as(targets).sum(-1)
