"""Embeddings as the space predictions live in: the state is itself the embedding of a frame.

Shapes: B batch, S observed positions, C candidate positions, E width of the embeddings, D width of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_dist.config.noise import NoiseConfig
from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.replay import Compact
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.class_tokens import ClassTokens
from ebwm_dist.models.linear import Linear


class EmbeddingSpace(Space):
    """Frame embeddings; where they are not as wide as the model, one projection embeds observed and predicted ones."""

    def __init__(
        self,
        embedding_dim: int,
        dim: int,
        config: MCMCConfig,
        block_size: int = 1,
        num_classes: int = 0,
        noise_config: NoiseConfig | None = None,
    ):
        super().__init__(config, embedding_dim, None, block_size)
        self.noise_config = noise_config
        self.projection = None if embedding_dim == dim else Projection(embedding_dim, dim)
        self.classes = ClassTokens(num_classes, dim) if num_classes else None

    def noised(self, targets: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
        """Return the states [B, S, E] with noise, whose level is drawn from the trained range for each sample."""
        assert self.noise_config is not None and self.noise_config.high is not None
        low, high = self.noise_config.low, self.noise_config.high
        device, targets = targets.device, targets.to(self.state_dtype)
        share = noise.uniform(seed, sample_ids, noise.LEVEL, 0, 1, 1, device).to(targets)
        _, positions, width = targets.shape
        added = noise.normal(seed, sample_ids, noise.INITIAL, 0, positions, width, device)
        return targets + (low + share * (high - low)) * added.to(targets)

    def initial_state(self, sample_ids: Tensor, seed: int, where: Slice, observed: Tensor) -> Tensor:
        """Return initial embeddings [B, C, E]: noise, zeros, or a copy of the last observed one, or of noised ones."""
        if self.config.initial_state in ("most_recent_embedding", "noised"):
            return where.take(observed[:, where.start : where.stop]).to(self.state_dtype)
        return super().initial_state(sample_ids, seed, where, observed)

    def step_with_loss(
        self,
        state: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        targets: Tensor,
        weight: Tensor | float,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step with autograd."""
        after = self._next(state, gradient, factor)
        loss = self.sequence_losses(after, targets).sum()
        value = weight * loss
        if upstream is not None:
            value = value + (after * upstream).sum()
        return value, after.detach(), loss.detach()

    @torch.no_grad()
    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """Return x - alpha dE/dx [B, C, E]."""
        return self._next(state, gradient, 1.0)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the largest change of a number [B, C] between two embeddings."""
        return (after - before).abs().amax(-1)

    def embed_context(self, observed: Tensor) -> Tensor:
        """Project the embeddings `observed` [B, S, E] to [B, S, D]; a class before them has a vector of its own."""
        return self.embed_next(observed) if self.classes is None else self.classes.embed(observed, self.embed_next)

    def embed_next(self, states: Tensor) -> Tensor:
        """Return the projection of embeddings, which does not differ from that of observed ones."""
        return states.to(self.step_size.alpha.dtype) if self.projection is None else self.projection(states)

    @torch.no_grad()
    def embed_state(self, state: Tensor) -> Tensor:
        """Return the projection [B, C, D] of a state, without a graph."""
        return self.embed_next(state)

    def embed_state_with_grad(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return the projection of `state`, computed again: it costs next to nothing."""
        return self.embed_next(state)

    def compress(self, state: Tensor) -> Compact:
        """Return the state in float16: it rounds finer than bfloat16, and a state beyond its range has diverged."""
        return {"embeddings": state.half()}

    def expand(self, compact: Compact) -> Tensor:
        """Return the state in its own precision."""
        return compact["embeddings"].to(self.state_dtype)

    def _next(self, state: Tensor, gradient: Tensor, factor: Tensor | float) -> Tensor:
        move = self.step_size() * factor * gradient
        return state - (move if self.projection is None else self.projection(move, read_out=True)).to(state.dtype)


class Projection(Linear):
    """The affine map between embeddings and the width of the model, used in both directions."""

    def forward(self, x: Tensor, read_out: bool = False) -> Tensor:
        """Map embeddings [B, C, E] to [B, C, D], or (`read_out`) a gradient [B, C, D] back to [B, C, E]."""
        x = x.to(self.weight.dtype)
        return x @ self.weight if read_out else super().forward(x)
