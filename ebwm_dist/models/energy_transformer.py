"""The energy transformer: a scalar energy for every (context, candidate next state) pair of a sequence.

Shapes: B batch, S candidate positions, T context positions including a time token, D width.

A *landscape* is one step conditioning. The context stream never sees a prediction, so its keys and values are
computed once per landscape (`context`) and serve every MCMC step and candidate on that landscape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.layers import (
    Block,
    Blocks,
    Modulation,
    RMSNorm,
    Rotary,
    modulate,
    modulate_with_tangent,
    rotary_table,
)


@dataclass(frozen=True)
class ContextCache:
    """Keys and values [B, H, T, d] of every block, for one landscape."""

    landscape: int
    keys_values: tuple[tuple[Tensor, Tensor], ...]

    def detach(self) -> ContextCache:
        """Return the same cache outside the autograd graph."""
        return ContextCache(self.landscape, tuple((k.detach(), v.detach()) for k, v in self.keys_values))

    @property
    def length(self) -> int:
        """Number of context positions T."""
        return self.keys_values[0][0].shape[2]


class EnergyTransformer(nn.Module):
    """Llama-2 blocks with a scalar head, run as context, candidate and tangent streams."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        adaln = config.variant == "adaln"
        self.variant, self.num_landscapes = config.variant, config.num_landscapes
        self.head_dim, self.rope_base = dim // config.num_heads, config.rope_base
        self.time_embeddings = None if config.variant == "default" else nn.Embedding(config.num_landscapes, dim)
        self.blocks = Blocks(
            Block(dim, config.num_heads, config.ffn_hidden_dim, eps, adaln) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(dim, eps)
        self.modulation = Modulation(dim, 2) if adaln else None
        self.head = nn.Linear(dim, 1, bias=False)

    def landscape(self, step: int) -> int:
        """Return the landscape of MCMC step `step`, counted from 0: the last one repeats."""
        return min(step, self.num_landscapes - 1)

    def context(self, x: Tensor, landscape: int) -> ContextCache:
        """Run the context stream over the embedded observed states `x` [B, S, D]."""
        condition = None
        if self.time_embeddings is not None:
            time = self._time(landscape, x)
            if self.variant == "time_embed":
                x = torch.cat((time.expand(x.shape[0], 1, -1), x), dim=1)
            else:
                condition = time
        rotary = self._rotary(torch.arange(x.shape[1], device=x.device), x)
        keys_values = []
        *body, last = self.blocks
        for block in body:
            x, pair = block.context(x, rotary, condition)
            keys_values.append(pair)
        keys_values.append(last.context_keys_values(x, rotary, condition))
        return ContextCache(landscape, tuple(keys_values))

    def energy(self, candidate: Tensor, cache: ContextCache) -> Tensor:
        """Return the energy [B, S] (float32 or wider) of embedded candidates [B, S, D].

        The candidates are the next states after the last S positions of the context.
        """
        x, condition = candidate, self._condition(cache, candidate)
        rotary, hidden = self._candidate_positions(candidate, cache)
        for block, pair in zip(self.blocks, cache.keys_values, strict=True):
            x = block.candidate(x, rotary, pair, hidden, condition)
        final = None if self.modulation is None else self.modulation(condition)
        return self._head(modulate(self.norm(x), final))

    def energy_with_tangent(self, candidate: Tensor, tangent: Tensor, cache: ContextCache) -> tuple[Tensor, Tensor]:
        """Return energies [B, S] and their derivatives [B, S] along `tangent` [B, S, D]."""
        x, condition = candidate, self._condition(cache, candidate)
        rotary, hidden = self._candidate_positions(candidate, cache)
        for block, pair in zip(self.blocks, cache.keys_values, strict=True):
            x, tangent = block.candidate_with_tangent(x, tangent, rotary, pair, hidden, condition)
        final = None if self.modulation is None else self.modulation(condition)
        energy, derivative = self._head(modulate_with_tangent(self.norm(x, tangent), final)).chunk(2)
        return energy, derivative

    def _head(self, h: Tensor) -> Tensor:
        return self.head(h).squeeze(-1).to(torch.promote_types(h.dtype, torch.float32))

    def _time(self, landscape: int, like: Tensor) -> Tensor:
        assert self.time_embeddings is not None
        return self.time_embeddings(torch.tensor(landscape, device=like.device))

    def _condition(self, cache: ContextCache, like: Tensor) -> Tensor | None:
        return self._time(cache.landscape, like) if self.variant == "adaln" else None

    def _rotary(self, positions: Tensor, like: Tensor) -> Rotary:
        return rotary_table(positions, self.head_dim, self.rope_base, like.dtype)

    def _candidate_positions(self, candidate: Tensor, cache: ContextCache) -> tuple[Rotary, Tensor]:
        """Return the rotary angles and hidden keys [S, T]: a candidate sits where the state it predicts will be."""
        offset, size = cache.length - candidate.shape[1], candidate.shape[1]
        positions = torch.arange(offset + 1, offset + 1 + size, device=candidate.device)
        hidden = torch.ones(size, cache.length, dtype=torch.bool, device=candidate.device).triu(offset + 1)
        return self._rotary(positions, candidate), hidden
