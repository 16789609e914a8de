"""How often the true next frame has a lower energy than frames that do not follow.

Shapes: N clips, B of a batch, S predicted frames of each, E width of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.evaluation.predictions import Batches
from ebwm_dist.evaluation.uncertainty import mean_and_error
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer


def true_frame_is_lower(
    model: EnergyBasedTransformer, batches: Batches, preprocess: FramePreprocessor, world: World
) -> dict[str, tuple[float, float]]:
    """Return for each kind of wrong frame the share of positions, a mean over all clips and its standard error."""
    own = [(preprocess(batch.observed), batch.sample_ids, batch.sample_mask) for batch in batches()]
    gathered = world.gather_objects([(clips.cpu()[sample_mask], ids[sample_mask]) for clips, ids, sample_mask in own])
    clips, ids = (torch.cat(parts) for parts in zip(*(part for of_rank in gathered for part in of_rank), strict=True))
    order = ids.argsort()
    clips, ids = clips[order], ids[order]
    lower: dict[str, list[Tensor]] = {}
    for observed, own_ids, sample_mask in own:
        # Half of all clips away: of another video, or at least of another moment.
        elsewhere = clips[(torch.searchsorted(ids, own_ids) + len(clips) // 2) % len(clips)].to(observed.device)
        true = energies_of(model, observed, observed[:, 2:])
        for name, candidates in wrong_frames(observed, elsewhere).items():
            share = (true < energies_of(model, observed, candidates)).double().mean(-1)
            lower.setdefault(name, []).append(share.cpu()[sample_mask])
    of_ranks = world.gather_objects({name: torch.cat(shares) for name, shares in lower.items()})
    # Sorted, for sums that do not depend on which rank has had which clip.
    return {name: mean_and_error(torch.cat([found[name] for found in of_ranks]).sort().values) for name in lower}


def wrong_frames(observed: Tensor, elsewhere: Tensor) -> dict[str, Tensor]:
    """Return frames [B, S-1, E] that do not follow, for each position of `observed` [B, S+1, E] but the first.

    `elsewhere` [B, S+1, E] holds other clips.
    """
    truth, length = observed[:, 2:], observed.shape[1] - 2
    shift = max(2, length // 2)
    return {
        "the last frame again": observed[:, 1:-1],
        "reversed: the frame before the last": observed[:, :-2],
        "shuffled: another frame of the clip": truth.roll(shift, 1),
        "a frame of another clip": elsewhere[:, 2:],
    }


@torch.no_grad()
def energies_of(model: EnergyBasedTransformer, observed: Tensor, candidates: Tensor) -> Tensor:
    """Return the energies [B, S-1] of candidates [B, S-1, E] for all predicted positions but the first."""
    landscape = model.transformer.num_landscapes - 1
    context = model.context_stream(observed[:, :-1], landscape)
    return model.transformer.energy(model.space.embed_next(candidates), context, landscape, 1)
