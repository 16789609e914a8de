"""How far predicted frames are from the true ones, as embeddings and as pictures, beside a copy of the last frame.

Shapes: K MCMC steps, B clips, S predicted frames of each, E width of an embedding, N frames of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.evaluation.video import clip_errors
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

WINDOW = 7
"""Pixels along an edge of the windows that SSIM compares."""


@dataclass(frozen=True)
class ClipErrors:
    """The errors of clips, a mean over its frames for each."""

    columns: dict[tuple[str, str], Tensor]
    """Name of the prediction and of the error -> errors [B], float64 on the CPU."""
    counted: Tensor
    """Clips [B] that do not only fill a batch up."""

    @classmethod
    def joined(cls, parts: Sequence[ClipErrors]) -> ClipErrors:
        """Return the errors of the clips of all parts."""
        columns = {key: torch.cat([part.columns[key] for part in parts]) for key in parts[0].columns}
        return cls(columns, torch.cat([part.counted for part in parts]))

    def means(self) -> dict[str, dict[str, float]]:
        """Return the means: of `copy`, and of the prediction after each MCMC step by number."""
        result: dict[str, dict[str, float]] = {}
        for (name, error), values in self.columns.items():
            # Summed in an order that does not depend on which rank has had which clip.
            value = values[self.counted].sort().values.mean().item()
            if error == "pixel_mse":
                error, value = "psnr", 10 * math.log10(255**2 / max(value, 1e-9))
            result.setdefault(name, {})[error] = value
        return result


def frame_errors(
    model: Model, batches: Iterable[Batch], num_steps: int, observer: FramePreprocessor, world: World
) -> dict[str, dict[str, float]]:
    """Return the mean errors over the clips of all ranks."""
    own = errors_of_clips(model, batches, num_steps, observer)
    columns = {key: world.gather_rows(values) for key, values in own.columns.items()}
    return ClipErrors(columns, world.gather_rows(own.counted)).means()


@torch.no_grad()
def errors_of_clips(model: Model, batches: Iterable[Batch], num_steps: int, observer: FramePreprocessor) -> ClipErrors:
    """Return the errors of `copy`, and of the prediction after each MCMC step.

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
    return ClipErrors({key: torch.cat(parts) for key, parts in columns.items()}, torch.cat(kept))


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
