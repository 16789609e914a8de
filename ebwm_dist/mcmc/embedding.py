"""Embeddings as the space predictions live in: the state is itself the embedding of a frame.

Shapes: B batch, S observed positions, C candidate positions, E width of the embeddings, D width of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.replay import Compact, compress_embeddings, expand_embeddings
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.layers import Linear
from ebwm_dist.models.output import smooth_l1_losses


class EmbeddingSpace(Space):
    """Frame embeddings; where they are not as wide as the model, one projection embeds observed and predicted ones."""

    def __init__(self, embedding_dim: int, dim: int, config: MCMCConfig):
        super().__init__(config)
        self.state_width = embedding_dim
        self.projection = None if embedding_dim == dim else Projection(embedding_dim, dim)

    def embed_context(self, observed: Tensor) -> Tensor:
        """Project the embeddings `observed` [B, S, E] to [B, S, D]."""
        return observed.to(self.step_size.alpha.dtype) if self.projection is None else self.projection(observed)

    def start(self, sample_ids: Tensor, seed: int, start: int, stop: int, observed: Tensor) -> Tensor:
        """Return initial embeddings [B, C, E]: noise, zeros, or a copy of the last observed one."""
        if self.initial_state == "most_recent_embedding":
            return observed[:, start:stop].to(self.state_dtype)
        if self.initial_state == "zeros":
            return self._zeros(sample_ids, stop - start, observed.device)
        return self._noise(seed, sample_ids, noise.INITIAL, start, stop, observed.device)

    def embed_next(self, states: Tensor) -> Tensor:
        """Return the projection [B, C, D] of embeddings [B, C, E]: observed and predicted ones are read alike."""
        return self.embed_context(states)

    @torch.no_grad()
    def embed_state(self, state: Tensor) -> Tensor:
        """Return the projection [B, C, D] of a state, without a graph."""
        return self.embed_context(state)

    def embed_state_with_grad(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return the projection of `state`, with its graph: it costs next to nothing."""
        return self.embed_context(state)

    @torch.no_grad()
    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """Return x - alpha dE/dx [B, C, E]."""
        return self._next(state, gradient, 1.0)

    def objective(
        self,
        state: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        targets: Tensor,
        weight: float | Tensor,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight x summed SmoothL1 + <next state, upstream>, the next state and the loss."""
        after = self._next(state, gradient, factor)
        loss = self.sequence_losses(after, targets).sum()
        value = weight * loss
        if upstream is not None:
            value = value + (after * upstream).sum()
        return value, after.detach(), loss.detach()

    def compress(self, state: Tensor) -> Compact:
        """Return the state in half precision."""
        return compress_embeddings(state)

    def expand(self, compact: Compact) -> Tensor:
        """Return the state in its own precision."""
        return expand_embeddings(compact, self.state_dtype)

    def _next(self, state: Tensor, gradient: Tensor, factor: Tensor | float) -> Tensor:
        move = self.step_size() * factor * gradient
        return state - (move if self.projection is None else self.projection(move, read_out=True)).to(state.dtype)

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return true for all positions [B, S]."""
        return torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)

    def losses(self, state: Tensor, targets: Tensor) -> Tensor:
        """Return the SmoothL1 loss [B, C] of states [B, C, E], a mean over each position's numbers."""
        return smooth_l1_losses(state, targets)


class Projection(Linear):
    """The affine map between embeddings and the width of the model, used in both directions."""

    def forward(self, x: Tensor, read_out: bool = False) -> Tensor:
        """Map embeddings [B, C, E] to [B, C, D], or (`read_out`) a gradient [B, C, D] back to [B, C, E]."""
        x = x.to(self.weight.dtype)
        return x @ self.weight if read_out else super().forward(x)
