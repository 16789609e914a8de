"""Tokens from logits: greedy, or drawn from the more likely part of the distribution.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebwm_dist.inference.settings import Sampling
from ebwm_dist.mcmc.noise import mix_seed


def probabilities(sampling: Sampling, logits: Tensor) -> Tensor:
    """Return the probabilities [R, V] to draw with, for a temperature above 0."""
    p, order = (logits.double() / sampling.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    if sampling.top_k is not None:
        p[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        p = p / p.sum(-1, keepdim=True)
        p = p.where(p.cumsum(-1) - p < sampling.top_p, 0)
    if sampling.min_p is not None:
        p = p.where(p >= sampling.min_p * p[:, :1], 0)
    return torch.zeros_like(p).scatter_(-1, order, p / p.sum(-1, keepdim=True))


def choose(sampling: Sampling, logits: Tensor, seeds: Sequence[int], position: int) -> Tensor:
    """Return a token [R] for each row of `logits` [R, V]; a draw depends on its seed and position alone."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    generator = torch.Generator()
    draws = [
        torch.rand((), generator=generator.manual_seed(mix_seed(seed, position)), dtype=torch.float64) for seed in seeds
    ]
    cumulative = probabilities(sampling, logits).cumsum(-1)
    drawn = torch.stack(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
