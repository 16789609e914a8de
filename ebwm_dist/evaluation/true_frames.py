"""How often the true next frame has a lower energy than frames that do not follow.

Shapes: N clips, B of a batch, F frames of each, P tokens of a frame, E width of a token.
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
        frames, others = (x.unflatten(1, (-1, model.layout.block_size)) for x in (observed, elsewhere))
        true = energies_of(model, observed, frames[:, 2:])
        for name, candidates in wrong_frames(frames, others).items():
            share = (true < energies_of(model, observed, candidates)).double().mean(-1)
            lower.setdefault(name, []).append(share.cpu()[sample_mask])
    of_ranks = world.gather_objects({name: torch.cat(shares) for name, shares in lower.items()})
    # Sorted, for sums that do not depend on which rank has had which clip.
    return {name: mean_and_error(torch.cat([found[name] for found in of_ranks]).sort().values) for name in lower}


def wrong_frames(frames: Tensor, elsewhere: Tensor) -> dict[str, Tensor]:
    """Return frames [B, F-2, ...] that do not follow, for each position of clips `frames` [B, F, ...] but the first.

    `elsewhere` [B, F, ...] holds other clips.
    """
    truth, length = frames[:, 2:], frames.shape[1] - 2
    shift = max(2, length // 2)
    return {
        "the last frame again": frames[:, 1:-1],
        "reversed: the frame before the last": frames[:, :-2],
        "shuffled: another frame of the clip": truth.roll(shift, 1),
        "a frame of another clip": elsewhere[:, 2:],
    }


@torch.no_grad()
def energies_of(model: EnergyBasedTransformer, observed: Tensor, candidates: Tensor) -> Tensor:
    """Return the energies [B, F-2] of frames [B, F-2, P, E] in the places of all but the first two `observed` ones."""
    landscape, size = model.transformer.num_landscapes - 1, model.layout.block_size
    context = model.context_stream(model.layout.context(observed), landscape)
    tokens, parts = candidates.flatten(1, 2), []
    for where in model.slices(tokens.shape[1]):
        candidate = model.space.embed_next(tokens[:, where.start : where.stop])
        parts.append(model.transformer.energy(candidate, context, landscape, where.start + size))
    return torch.cat(parts, 1)
