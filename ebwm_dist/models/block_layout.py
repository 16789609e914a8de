"""Blocks of tokens: how a sample is divided into them, and which of them sees which.

A state is a block of P tokens that are predicted together: one word of a text, the patches of an image or of a frame,
the cells of a puzzle. A sample is a *prefix* of m tokens that are observed only, and S predicted tokens, S / P blocks:

    prefix | block 0 | block 1 | ... | block S/P - 1

A token of block j is predicted from the prefix and the blocks before j. In the context stream tokens see their own
block and all before it; the prefix sees itself. All tokens of a block have one rotary position, that of the block.

Positions count predicted tokens, from 0; those of the prefix are -m to -1. With P = 1 and a prefix of one token this is
a causal sequence of S + 1 tokens, each predicted from those before it.

Shapes: B batch, S predicted tokens, L = m + S tokens of a sample, C tokens of whole blocks, c = C / P blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a sample."""

    block_size: int = 1
    """Tokens P of a block."""
    prefix: int = 1
    """Tokens m that come before the first block: 0, 1 or P."""

    @staticmethod
    def of(config: ModelConfig) -> BlockLayout:
        """Return the layout of a configured model's samples."""
        return BlockLayout(config.block_size, config.prefix_length)

    def context(self, observed: Tensor) -> Tensor:
        """Return what the last block of a sample `observed` [B, L, ...] is predicted from [B, L - P, ...]."""
        return observed[:, : observed.shape[1] - self.block_size]

    def targets(self, observed: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the predicted tokens [B, S, ...] of samples `observed` [B, L, ...].

        Where `chosen` [B, L - 1] has the tokens after the first, with padding for those without a loss, return these.
        """
        if chosen is None:
            return observed[:, self.prefix :]
        assert self.prefix > 0
        return chosen[:, self.prefix - 1 :]

    def longest_context(self, length: int) -> int:
        """Return the tokens of the context of samples with `length` S predicted ones."""
        return self.prefix + length - self.block_size

    def whole_blocks(self, observed: Tensor, padding: int = 0) -> Tensor:
        """Return `observed` [B, n, ...] with padding at the end, up to a sample of whole blocks."""
        missing = -(observed.shape[1] - self.prefix) % self.block_size
        return torch.cat((observed, observed.new_full((len(observed), missing, *observed.shape[2:]), padding)), 1)

    def predicted(self, context: Tensor) -> int:
        """Return the number S of tokens that are predicted from `context` [B, L - P, ...]."""
        return context.shape[1] - self.prefix + self.block_size

    def most_recent(self, context: Tensor) -> Tensor:
        """Return the token at the same place of the block before [B, S, ...]; a prefix of one token stands for a block.

        Without a prefix, nothing was observed before the first block: returns the context as it is.
        """
        if self.prefix in (0, self.block_size):
            return context
        size = self.predicted(context)
        return context[:, self.most_recent_keys(torch.arange(size, device=context.device))]

    def most_recent_keys(self, positions: Tensor) -> Tensor:
        """Return where in the context the tokens of `most_recent` stand, for any positions."""
        return (positions + (self.prefix - self.block_size)).clamp(min=0)

    def seen(self, positions: Tensor) -> Tensor:
        """Return how many tokens of the context candidates at these positions see: those before their block."""
        return self.prefix + positions // self.block_size * self.block_size

    def places(self, positions: Tensor) -> Tensor:
        """Return the rotary positions of tokens: the number of their block, after that of a prefix."""
        return (self.prefix > 0) + positions // self.block_size

    def per_token(self, of_blocks: Tensor) -> Tensor:
        """Return numbers of blocks [..., c] for each of their tokens [..., C]."""
        return of_blocks if self.block_size == 1 else of_blocks.repeat_interleave(self.block_size, -1)

    @property
    def unplaced(self) -> int:
        """Tokens of the prefix that have no position within a block."""
        return self.prefix % self.block_size

    def mean(self, of_tokens: Tensor) -> Tensor:
        """Return the means [..., c] of numbers of tokens [..., C] over their blocks."""
        return of_tokens if self.block_size == 1 else of_tokens.unflatten(-1, (-1, self.block_size)).mean(-1)

    def context_positions(self, length: int, device: torch.device) -> Tensor:
        """Return the positions [T] of the tokens of a context of `length` T."""
        return torch.arange(-self.prefix, length - self.prefix, device=device)

    def mask(self, positions: Tensor, time_tokens: int) -> Tensor | None:
        """Return which keys [T, T] each token of a context sees, after as many time tokens; None is a causal mask."""
        if self.block_size == 1:
            return None
        own = time_tokens + self.seen(positions) + self.block_size
        visible = torch.cat((torch.arange(1, time_tokens + 1, device=positions.device), own))
        return visible[:, None] > torch.arange(len(visible), device=positions.device)


TOKENS = BlockLayout()
"""Each token is predicted from all before it, and the first is observed only."""


class BlockPositions(nn.Module):
    """Learned positions within a block: an embedding for each axis of its shape, added up."""

    def __init__(self, shape: list[int], dim: int):
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(sum(shape), dim).normal_(std=len(shape) ** -0.5))

    def forward(self, x: Tensor, before: int = 0) -> Tensor:
        """Add their positions to the tokens `x` [B, C, D] of whole blocks, after those `before`, which have none."""
        total, *rest = self.weight.split(self.shape)
        for axis in rest:
            total = (total[:, None] + axis).flatten(0, 1)
        placed = (x[:, before:].unflatten(1, (-1, len(total))) + total).flatten(1, 2)
        return torch.cat((x[:, :before], placed), 1) if before else placed
