"""The interface between the engine and the space that predictions live in.

Shapes: B batch, S positions, C of them that are refined together, D width; states have the shape [B, C, ...] of the
space's own. All of this is about single tokens, also where a state is a block of them, but for the size of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.replay import Compact
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.models.output import prediction_losses, target_mask

MIN_STEP_SIZE = 1e-4
_DRAWN_TOGETHER = 128
"""Positions, where only some of them are refined."""


class StepSize(nn.Module):
    """The step size alpha; one element, not a scalar, as DeepSpeed cannot broadcast a 0-dim tensor."""

    def __init__(self, config: MCMCConfig):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([config.initial_step_size]), requires_grad=config.learn_step_size)

    def forward(self) -> Tensor:
        """Return alpha [1], at least `MIN_STEP_SIZE`, in at least float32."""
        return _AtLeast.apply(self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32)), MIN_STEP_SIZE)


class _AtLeast(torch.autograd.Function):
    """max(x, bound). Below the bound only gradients that raise x pass: it can come back, and does not sink further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x < bound)
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (below,) = upstream, ctx.saved_tensors
        return gradient.masked_fill(below & (gradient > 0), 0), None


class Space(nn.Module, ABC):
    """States: their embedding, the steps along their energy gradient, and their losses.

    Args:
        config: of the refinement.
        state_width: numbers per position of a state.
        pad_id: token of padding; None where targets are embeddings.
        block_size: tokens of a state.
    """

    _like: Tensor

    def __init__(self, config: MCMCConfig, state_width: int, pad_id: int | None, block_size: int = 1):
        super().__init__()
        self.config, self.state_width, self.pad_id = config, state_width, pad_id
        self.block_size = block_size
        self.step_size = StepSize(config)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # has the precision of the weights

    @property
    def state_dtype(self) -> torch.dtype:
        """Precision of states and losses: at least float32, whatever the weights have."""
        return torch.promote_types(self._like.dtype, torch.float32)

    def initial_state(self, sample_ids: Tensor, seed: int, where: Slice, observed: Tensor) -> Tensor:
        """Return the initial states [B, C, ...] of a slice.

        Args:
            sample_ids: ids [B] on the CPU.
            seed: of the run.
            where: the slice.
            observed: what was observed last before each position [B, S, ...] (`BlockLayout.most_recent`).
        """
        if self.config.initial_state == "zeros":
            count = where.stop - where.start if where.index is None else where.index.shape[1]
            shape = len(sample_ids), count, self.state_width
            return torch.zeros(shape, device=observed.device, dtype=self.state_dtype)
        return self._noise(seed, sample_ids, noise.INITIAL, where, observed.device)

    def noised(self, targets: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
        """Return true states [B, S, ...] with the noise that predictions start with."""
        raise NotImplementedError  # tokens have no noise

    def add_langevin_noise(
        self, state: Tensor, seed: int, sample_ids: Tensor, step: int, where: Slice, scale: float | None = None
    ) -> Tensor:
        """Return the state with the Langevin noise of MCMC step `step`; `scale` replaces that of training."""
        scale = self.config.langevin_noise if scale is None else scale
        if scale == 0:
            return state
        return state + scale * self._noise(seed, sample_ids, noise.LANGEVIN + step, where, state.device)

    def step_factor(self, seed: int, sample_ids: Tensor, where: Slice, device: torch.device) -> Tensor | float:
        """Return the factor [B, C, 1] of alpha that training draws for each state: that of its first token."""
        jitter = self.config.step_size_jitter
        if jitter == 1:
            return 1.0
        drawn = noise.uniform(seed, sample_ids, noise.STEP_SIZE, where.start, where.stop, 1, device)
        drawn = where.take(drawn).to(self.state_dtype)
        if self.block_size > 1:
            drawn = drawn[:, :: self.block_size].repeat_interleave(self.block_size, 1)
        return 1 / jitter + drawn * (jitter - 1 / jitter)

    def step(self, state: Tensor, gradient: Tensor, factor: Tensor | float, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step against the energy gradient, without a graph.

        Args:
            state: where the step starts.
            gradient: dE/de [B, C, D].
            factor: of alpha; a number or [B, C, 1].
            targets: true next states of these positions.

        Returns:
            the next state, and the sum of its losses over all positions.
        """
        with torch.no_grad():
            after = self.update(state, factor * gradient)
            return after, self.sequence_losses(after, targets).sum()

    @abstractmethod
    def step_with_loss(
        self,
        state: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        targets: Tensor,
        weight: Tensor | float,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step with autograd.

        Args:
            weight: factor of the summed loss in the objective.
            upstream: gradient of the later steps' objective with respect to the next state.

        Returns:
            the objective, weight x summed loss + <next state, upstream>, whose backward reaches alpha, the weights,
            `gradient` and `state`; and, detached, next state and summed loss, as of `step`.
        """

    @abstractmethod
    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """Return the next state, without a graph."""

    @abstractmethod
    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how much a prediction has changed [B, C]: the largest change of a probability, or of a number."""

    def surprisal(self, expected: Tensor, state: Tensor) -> Tensor:
        """Return minus the log-probability [B, C] that `expected` gives to the most probable token of `state`."""
        raise NotImplementedError  # embeddings have no probabilities

    @abstractmethod
    def embed_context(self, observed: Tensor) -> Tensor:
        """Return the embedding [B, S, D] of observed states [B, S, ...]."""

    @abstractmethod
    def embed_next(self, states: Tensor) -> Tensor:
        """Return the candidate embedding [B, C, D] of next states [B, C, ...] that are known."""

    @abstractmethod
    def embed_state(self, state: Tensor) -> Tensor:
        """Return the candidate embedding [B, C, D] of a state, without a graph."""

    @abstractmethod
    def embed_state_with_grad(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return `embedded`, the result of `embed_state`, with gradients to the weights and the state."""

    @abstractmethod
    def compress(self, state: Tensor) -> Compact:
        """Return the compact form of a state, for the replay buffer."""

    @abstractmethod
    def expand(self, compact: Compact) -> Tensor:
        """Return the state from its compact form."""

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, ...] are not padding [B, S]."""
        return target_mask(targets, self.pad_id)

    def sequence_losses(self, state: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [B] of a state, summed over the positions."""
        return self.losses(state, targets).sum(-1)

    def losses(self, state: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [B, C] of a state at every position, 0 where its target is padding."""
        return prediction_losses(state, targets, self.pad_id)

    def _noise(self, seed: int, sample_ids: Tensor, draw: int, where: Slice, device: torch.device) -> Tensor:
        """Draw for the positions that are refined; a long window, of which they are a part, is never held whole."""
        if where.index is None:
            drawn = noise.normal(seed, sample_ids, draw, where.start, where.stop, self.state_width, device)
            return drawn.to(self.state_dtype)
        result = torch.zeros(*where.index.shape, self.state_width, device=device, dtype=self.state_dtype)
        for start in range(where.start, where.stop, _DRAWN_TOGETHER):
            stop = min(start + _DRAWN_TOGETHER, where.stop)
            drawn = noise.normal(seed, sample_ids, draw, start, stop, self.state_width, device)
            index = where.start + where.index - start
            taken = Slice(start, stop, index.clamp(0, stop - start - 1)).take(drawn).to(self.state_dtype)
            result = torch.where((index >= 0)[..., None], taken, result)
        return result
