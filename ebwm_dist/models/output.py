"""The interface between models and trainer or evaluation, the same for energy and autoregressive models.

Shapes: K MCMC steps (1 for an autoregressive model), B batch, S positions, V vocabulary, E width of embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.models.fused_attention import attend_fused
from ebwm_dist.models.layers import Attention, Block
from ebwm_dist.models.passes import PassModule


class SequenceModel(PassModule):
    """A model that predicts each next state of a sequence. By default it has no state besides its parameters."""

    loss_of = "predictions"
    """What its losses are those of, in training and of `evaluate`; losses of different things cannot be compared."""

    def compile_blocks(self) -> None:
        """Compile the transformer blocks, each stream when it is first run."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile_streams()

    def fuse_attention(self) -> None:
        """Let candidates attend by fused kernels from now on, without matrices of positions and context."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend_fused

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint of this rank must hold besides parameters."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` has returned."""

    def reshard_extra_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """Return the part of `rank` of `world_size` in the extra states of all ranks of the run so far."""
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
    """Sums over the predicted tokens or frames of each sequence, without padding."""

    step_losses: Tensor
    """Summed loss after each MCMC step [K, B]: cross-entropy of tokens, SmoothL1 of embeddings."""
    energies: Tensor | None
    """Summed energy of the initial state and of the state after each step [K + 1, B]; None without an energy."""
    tokens: Tensor
    """Number of predicted tokens or frames [B]."""


def target_mask(targets: Tensor, pad_id: int | None = None) -> Tensor:
    """Return which targets are not padding [B, S]: tokens [B, S] other than `pad_id`, all embeddings [B, S, E]."""
    if pad_id is None or targets.is_floating_point():
        return torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
    return targets != pad_id


def prediction_losses(predictions: Tensor, targets: Tensor, pad_id: int | None = None) -> Tensor:
    """Return the loss [B, S] of each prediction, computed in at least float32.

    That is the cross-entropy of logits [B, S, V], 0 where tokens [B, S] are `pad_id`, or the SmoothL1 loss of
    embeddings [B, S, E], a mean over each one's numbers.
    """
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    if targets.is_floating_point():
        return F.smooth_l1_loss(predictions, targets.to(predictions.dtype), reduction="none", beta=1.0).mean(-1)
    ignored = -100 if pad_id is None else pad_id
    losses = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=ignored, reduction="none")
    return losses.view_as(targets)
