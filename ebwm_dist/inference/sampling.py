"""Tokens from logits: greedy, or drawn from the more likely part of the distribution.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.mcmc.noise import mix_seed


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; the limits on the distribution hold one after the other, in this order."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the most likely so many tokens."""
    top_p: float | None = None
    """Only the fewest most likely tokens that have this probability together."""
    min_p: float | None = None
    """Only tokens that are at least this many times as likely as the most likely one."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not self.temperature >= 0:
            raise UserError(f"temperature = {self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value}: must be more than 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities [R, V] to draw with, for a temperature above 0."""
        p, order = (logits.double() / self.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
        if self.top_k is not None:
            p[:, self.top_k :] = 0
        if self.top_p is not None:
            p = p / p.sum(-1, keepdim=True)
            p = p.where(p.cumsum(-1) - p < self.top_p, 0)
        if self.min_p is not None:
            p = p.where(p >= self.min_p * p[:, :1], 0)
        return torch.zeros_like(p).scatter_(-1, order, p / p.sum(-1, keepdim=True))

    def choose(self, logits: Tensor, seeds: Sequence[int], position: int) -> Tensor:
        """Return a token [R] for each row of `logits` [R, V]; a draw depends on its seed and position alone."""
        if self.temperature == 0:
            return logits.argmax(-1)
        generator = torch.Generator()
        draws = [
            torch.rand((), generator=generator.manual_seed(mix_seed(seed, position)), dtype=torch.float64)
            for seed in seeds
        ]
        cumulative = self.probabilities(logits).cumsum(-1)
        drawn = torch.stack(draws).to(logits.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
