"""How far predicted frames are from the true ones, as embeddings and as pictures, beside a copy of the last frame.

Shapes: K MCMC steps, B clips, S predicted frames of each, E width of an embedding, N frames of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.data.stream import Batch
from ebwm_dist.evaluation.ranks import Ranks
from ebwm_dist.evaluation.video import clip_errors
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.observation import Observer
from ebwm_dist.registry import Model

WINDOW = 7
"""Pixels along an edge of the windows that SSIM compares."""


@torch.no_grad()
def frame_errors(
    model: Model, batches: Iterable[Batch], num_steps: int, observer: Observer, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """Return the mean errors over the clips of all ranks: of `copy`, and of the prediction after each step by number.

    An autoregressive model has one prediction, `1`. Where embeddings can be decoded there are `psnr` and `ssim` too.
    """
    columns: dict[tuple[str, str], list[Tensor]] = {}
    kept = []
    for batch in batches:
        observed = observer(batch.observed)
        context, truth = observed[:, :-1], observed[:, 1:]
        predictions = {"copy": context.float()}
        if isinstance(model, EnergyBasedTransformer):
            start = model.space.start(batch.sample_ids, model.seed, 0, context.shape[1], context)
            for step, (_, state) in enumerate(model.refine(context, start, num_steps, batch.sample_ids)):
                if step:
                    predictions[str(step)] = state
        else:
            predictions["1"] = model.predict(context).float()
        for name, predicted in predictions.items():
            every = torch.ones(truth.shape[:2], device=truth.device)
            errors = {
                name: sums / every.shape[1] for name, sums in clip_errors(observer, predicted, truth, every).items()
            }
            if observer.decodable:
                found = similarity(observer.decode(predicted).flatten(0, 1), observer.decode(truth).flatten(0, 1))
                errors["ssim"] = found.view(truth.shape[:2]).mean(-1)
            for error, values in errors.items():
                columns.setdefault((name, error), []).append(values.double().cpu())
        kept.append(batch.counted)
    counted = ranks.gather(torch.cat(kept))
    result: dict[str, dict[str, float]] = {}
    for (name, error), parts in columns.items():
        # Summed in an order that does not depend on which rank has which clip.
        value = ranks.gather(torch.cat(parts))[counted].sort().values.mean().item()
        if error == "pixel_mse":
            error, value = "psnr", 10 * math.log10(255**2 / max(value, 1e-9))
        result.setdefault(name, {})[error] = value
    return result


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity [N] (SSIM) of frames [N, H, W, 3] uint8: 1 where they are the same.

    Means, variances and the covariance are those of uniform windows, with the constants of the original definition.
    """
    x, y = (frames.movedim(-1, 1).double() for frames in (a, b))
    window = min(WINDOW, *x.shape[-2:])

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    small, large = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    structure = (2 * covariance + large) / (variances + large)
    return (luminance * structure).mean((1, 2, 3))
