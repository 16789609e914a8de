"""A diffusion transformer (DiT) from the blocks of the energy model: it tells which noise is in the states of a sample.

As candidates of the energy model do, the tokens of a noised state see one another and what was observed before their
state, without noise: an image is one state, and all frames of a video are learned at once. Blocks are conditioned on
the timestep of each state, and on the class of the sample, by adaptive norms whose gates are 0 at first (adaLN-Zero).

Shapes: B batch, L tokens of a sample (`BlockLayout`), C noised tokens of c states, D width, E width of the embeddings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.block_layout import BlockLayout, BlockPositions
from ebwm_dist.models.class_tokens import ClassTokens
from ebwm_dist.models.layers import Blocks, KeysValues, Modulation, RMSNorm, modulate
from ebwm_dist.models.linear import Linear, ZeroLinear

_LONGEST_PERIOD = 10_000.0
_FREQUENCIES = 128


class TimestepEmbedding(nn.Module):
    """Waves of the timestep, as many as frequencies and phases, mapped to the width of the model by two layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner, self.outer = Linear(2 * _FREQUENCIES, dim), Linear(dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map timesteps [...] to [..., D]."""
        steps = torch.arange(_FREQUENCIES, device=timesteps.device, dtype=torch.float32)
        angle = timesteps[..., None].float() * torch.exp(-math.log(_LONGEST_PERIOD) * steps / _FREQUENCIES)
        waves = torch.cat((angle.cos(), angle.sin()), -1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves)))


class DiffusionTransformer(nn.Module):
    """Llama-2 blocks that predict the noise in embeddings."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        dim, width = config.dim, config.embedding_dim
        assert width is not None
        self.layout = BlockLayout.of(config)
        self.embeddings = Linear(width, dim)
        self.block_positions = BlockPositions(config.block_axes, dim) if config.block_size > 1 else None
        self.timesteps = TimestepEmbedding(dim)
        self.classes = ClassTokens(config.num_classes, dim) if config.num_classes else None
        self.blocks = Blocks(config, adaln=True, zero=True)
        self.blocks.checkpointing = activation_checkpointing == "block"
        self.norm, self.modulation = RMSNorm(dim, config.norm_eps), Modulation(dim, 2, zero=True)
        self.head = ZeroLinear(dim, width)

    def context(self, observed: Tensor) -> KeysValues:
        """Return the keys and values of every block for what is observed before the last state [B, L - P, E]."""
        start = torch.zeros(len(observed), 1, device=observed.device)  # what is observed has no noise
        condition = self._condition(start, observed)
        x = self.embeddings(observed) if self.classes is None else self.classes.embed(observed, self.embeddings)
        positions = self.layout.context_positions(x.shape[1], x.device)
        if self.block_positions is not None:
            x = self.block_positions(x, before=self.layout.unplaced)
        mask, rotary = self.layout.mask(positions, 0), self.blocks.rotary(self.layout.places(positions), x.dtype)
        keys_values = []
        *body, last = self.blocks
        for block in body:
            x, keys, values = self.blocks.run(block, block.context, x, rotary, condition, mask)
            keys_values.append((keys, values))
        keys_values.append(self.blocks.run(last, last.context_keys_values, x, rotary, condition))
        return tuple(keys_values)

    def noise_in(
        self, noised: Tensor, timesteps: Tensor, observed: Tensor, context: KeysValues, start: int | Tensor = 0
    ) -> Tensor:
        """Return the noise in states [B, C, E], or their velocity where that is learned, in at least float32.

        Args:
            noised: tokens [B, C, E] of states.
            timesteps: of each state [B, c].
            observed: what was observed before the last state [B, L - P, E]; the class of a sample is read from it.
            context: what `context` has returned for it.
            start: position of the first token; or, for every token [B, C], its position.
        """
        positions = (
            torch.arange(noised.shape[1], device=noised.device) + start if isinstance(start, int) else start[:, None]
        )
        condition = self._condition(timesteps, observed)
        if condition.shape[1] > 1:
            condition = condition.repeat_interleave(self.layout.block_size, 1)
        x = self.embeddings(noised.to(self.embeddings.weight.dtype))
        if self.block_positions is not None:
            x = self.block_positions(x)
        rotary, seen = self.blocks.rotary(self.layout.places(positions), x.dtype), self.layout.seen(positions)
        for block, (keys, values) in zip(self.blocks, context, strict=True):
            x, _ = self.blocks.run(block, block.candidate, x, keys, values, rotary, seen, condition)
        x = self.head(modulate(self.norm(x), self.modulation(condition)))
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _condition(self, timesteps: Tensor, observed: Tensor) -> Tensor:
        """Return what the blocks are conditioned on [B, c, D]."""
        condition = self.timesteps(timesteps)
        return condition if self.classes is None else condition + self.classes(observed[:, :1])
