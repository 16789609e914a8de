"""Starts of refinements that are no predictions: other states of the sample.

A prediction starts near where it will end, so training sees the energy there alone. Where some refinements start at
states from elsewhere in the sample, with the same target, the energy falls from these to the true state as well.

Shapes: B batch, L tokens of a sample, S predicted ones, P of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_dist.mcmc import noise
from ebwm_dist.models.block_layout import BlockLayout


def with_corrupted(
    recent: Tensor, observed: Tensor, sample_ids: Tensor, seed: int, share: float, layout: BlockLayout
) -> Tensor:
    """Return the starts `recent` [B, S, E], a share of them replaced by other states of the sample.

    Which ones, and by which, the ids of the samples determine. The true state is none of them.

    Args:
        recent: what was observed last before each predicted token.
        observed: samples [B, L, E], which begin with a state.
        sample_ids: ids [B] on the CPU.
        seed: of the run.
        share: of the states that are replaced.
        layout: of the samples.
    """
    states = observed.unflatten(1, (-1, layout.block_size))
    predicted = states.shape[1] - 1
    drawn = noise.uniform(seed, sample_ids, noise.CORRUPTED, 0, predicted, 2, recent.device)
    chosen, place = drawn[..., 0] < share, (drawn[..., 1] * predicted).long().clamp(max=predicted - 1)
    # Places of the states but the true one, which is after its position.
    place = place + (place >= torch.arange(1, predicted + 1, device=place.device))
    others = states[torch.arange(len(states), device=place.device)[:, None], place]
    starts = recent.unflatten(1, (-1, layout.block_size))
    return torch.where(chosen[..., None, None], others, starts).flatten(1, 2)
