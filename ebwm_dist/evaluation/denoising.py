"""How well models of images remove noise: PSNR by the level of the noise and the number of passes.

Noise and pictures are the same for every model, on any number of ranks. PSNR is of pictures of 8 bits as they are
shown, over all their pixels together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.losses import Sums, accumulate
from ebwm_dist.evaluation.options import Options
from ebwm_dist.inference.images import restore
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.run import Run, ValidationData

SEED = 0xD1E5
"""Of the noise, which no training has seen."""
DIT_PASSES = (1, 3, 10, 30, 100, 300)
"""Numbers of passes of a diffusion model."""
IN_RANGE, BEYOND = (0.25, 0.5, 0.75, 1.0), (1.5, 2.0)
"""Levels that are measured: at these places of the trained range, and at these multiples of its end."""


def levels_of(run: Run) -> list[float]:
    """Return the levels of noise to measure: within the trained range, and to the double of its end if it has one."""
    low, high = run.config.noise.low, run.config.noise.high
    if high is None:
        return []
    return [round(low + share * (high - low), 4) for share in IN_RANGE] + [round(share * high, 4) for share in BEYOND]


def noise_like(states: Tensor, sample_ids: Tensor) -> Tensor:
    """Return the noise of samples [B, P, E] by their ids [B] in the held-out data, the same for every model."""
    _, tokens, width = states.shape
    return noise.normal(SEED, sample_ids, noise.INITIAL, 0, tokens, width).to(states.device)


def psnr_by_passes(
    run: Run,
    data: ValidationData,
    levels: Sequence[float],
    passes: Sequence[int],
    batches: Iterable[Batch],
    world: World,
) -> dict[str, dict[str, float]]:
    """Return the PSNR in decibels by level of noise and number of passes, 0 for the noised images."""
    if not data.preprocess.decodable:
        raise UserError("the encoder of this model cannot decode embeddings, so there is no PSNR")
    errors: dict[tuple[float, int], list[float]] = {}
    for batch in batches:
        for key, found in _squared_errors(run.model, data, levels, passes, batch).items():
            errors.setdefault(key, []).extend(found)
    result: dict[str, dict[str, float]] = {}
    for level in levels:
        for number in (0, *passes):
            of_all = [error for part in world.gather_objects(errors[level, number]) for error in part]
            # Summed in an order that does not depend on which rank has had which image.
            mean = math.fsum(of_all) / len(of_all)
            result.setdefault(f"{level:g}", {})[str(number)] = 10 * math.log10(255**2 / max(mean, 1e-9))
    return result


@torch.no_grad()
def _squared_errors(
    model: Model, data: ValidationData, levels: Sequence[float], passes: Sequence[int], batch: Batch
) -> dict[tuple[float, int], list[float]]:
    preprocess, mask = data.preprocess, batch.sample_mask
    observed = preprocess(batch.observed, batch.labels)
    context, states = model.layout.context(observed), model.layout.targets(observed)
    added, true = noise_like(states, batch.sample_ids), preprocess.decode(states).float()
    errors = {}
    for level in levels:
        noised = states + level * added
        found = {0: noised, **restore(model, noised, level, passes, context, batch.sample_ids)}
        for number, restored in found.items():
            wrong = (preprocess.decode(restored).float() - true).square().mean((1, 2, 3, 4))
            errors[level, number] = wrong.double().cpu()[mask].tolist()
    return errors


def pictures(
    runs: Sequence[tuple[Run, int]], data: ValidationData, level: float, count: int
) -> tuple[list[str], list[list[np.ndarray]]]:
    """Return rows of pictures with their names: some images, the same with noise, and as each run restores them.

    Args:
        runs: each with its number of passes.
        data: whose images are shown.
        level: of the noise.
        count: images of a row.
    """
    (batch,) = data.batches(count, count)
    preprocess, model = data.preprocess, runs[0][0].model
    observed = preprocess(batch.observed, batch.labels)
    context, states = model.layout.context(observed), model.layout.targets(observed)
    noised = states + level * noise_like(states, batch.sample_ids)
    rows = {"clean": states, f"noise {level:g}": noised}
    for run, passes in runs:
        name = f"{run.config.model.kind.upper()}, {passes} passes"
        rows[name] = restore(run.model, noised, level, [passes], context, batch.sample_ids)[passes]
    return list(rows), [list(preprocess.decode(row)[:, 0].cpu().numpy()) for row in rows.values()]


def measure_images(run: Run, data: ValidationData, options: Options, world: World) -> dict[str, Any]:
    """Return loss and energies by steps, and the PSNR of restored images by level and passes, over all ranks."""
    energy = isinstance(run.model, EnergyBasedTransformer)
    passes = sorted({*options.steps, run.trained_steps}) if energy else DIT_PASSES
    batches = partial(data.batches, options.batch_size, options.max_sequences, world.rank, world.world_size)
    sums = accumulate(
        run.model.evaluate, batches(), max(passes) if energy else 1, data.preprocess, layout=run.model.layout
    )
    assert sums is not None
    levels = levels_of(run) if data.preprocess.decodable else []
    return {
        "path": run.source,
        "kind": run.config.model.kind,
        **describe(run),
        "by_steps": reduce(Sums.plus, world.gather_objects(sums)).result().figures(None),
        "psnr": psnr_by_passes(run, data, levels, passes, batches(), world),
    }


def describe(run: Run) -> dict[str, Any]:
    """Return what a summary says of a model beside its PSNR."""
    return {"parameters": sum(p.numel() for p in run.model.parameters()), "steps": run.step}
