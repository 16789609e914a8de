"""How far predicted frames are from the true ones, as embeddings and as pictures, beside a copy of the last frame.

A frame that starts another scene cannot be foreseen and does not count.

A frame is a state of P tokens, one or the patches of a picture; its errors are means over them.

Shapes: K MCMC steps, B clips of F frames, S = F - 1 predicted, E width of a token, N frames of H x W pixels. Frames
[B, S P, E] are those of all tokens, one frame after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.evaluation.uncertainty import mean_and_error
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.diffusion import SAMPLING_PASSES, DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.slices import Slice

WINDOW = 7
"""Pixels along an edge of the windows that SSIM compares."""
SCENE_CHANGE = 40.0
"""Mean difference of two frames, of 255, from which on the second is taken for the start of another scene."""
PASSES = (3, 10, SAMPLING_PASSES)
"""Numbers of passes in which a diffusion model predicts."""


@dataclass(frozen=True)
class FrameErrors:
    """The errors of clips, which those of other clips can be joined to; all on the CPU."""

    sums: dict[tuple[str, str], Tensor]
    """Name of the prediction and of the error -> sums [B] over the frames of a clip that count, in float64."""
    frames: Tensor
    """Number of these frames [B]; 0 of a clip that only fills a batch up."""
    scene_changes: Tensor
    """Number of the other frames [B]; 0 of a clip that only fills a batch up."""

    @classmethod
    def joined(cls, parts: Sequence[FrameErrors]) -> FrameErrors:
        """Return the errors of the clips of all parts."""
        sums = {key: torch.cat([part.sums[key] for part in parts]) for key in parts[0].sums}
        frames, changes = (torch.cat(x) for x in zip(*((p.frames, p.scene_changes) for p in parts), strict=True))
        return cls(sums, frames, changes)

    def figures(self) -> dict[str, Any]:
        """Return `frames`, the mean errors of each prediction by name, and `scene_changes`.

        `mse_minus_copy` is a mean over clips and its standard error.
        """
        some = self.frames > 0
        frames = self.frames[some]
        result: dict[str, dict[str, Any]] = {}
        for (name, error), sums in self.sums.items():
            # Summed in an order that does not depend on which rank has had which clip.
            value = (sums[some].sort().values.sum() / frames.sum()).item()
            if error == "pixel_mse":
                error, value = "psnr", 10 * math.log10(255**2 / max(value, 1e-9))
            result.setdefault(name, {})[error] = value
        for name, errors in result.items():
            change = self.sums[name, "mse"] - self.sums["copy", "mse"]
            errors["mse_minus_copy"] = mean_and_error((change[some] / frames).sort().values)
        return {"frames": result, "scene_changes": int(self.scene_changes.sum())}


def frame_errors(model: Model, batches: Iterable[Batch], num_steps: int, preprocess: FramePreprocessor) -> FrameErrors:
    """Return the errors of all that `predictions` yields, with PSNR and SSIM where embeddings can be decoded."""
    return FrameErrors.joined([_errors(model, batch, num_steps, preprocess) for batch in batches])


@torch.no_grad()
def _errors(model: Model, batch: Batch, num_steps: int, preprocess: FramePreprocessor) -> FrameErrors:
    observed, mean = preprocess(batch.observed), model.layout.mean
    truth, sample_mask = model.layout.targets(observed), batch.sample_mask.to(observed.device)[:, None]
    kept = ~scene_changes(preprocess, observed)
    pictures = preprocess.decode(truth).float() if preprocess.decodable else None
    sums = {}
    for name, predicted, _ in predictions(model, observed, batch.sample_ids, num_steps):
        errors = {
            "mse": mean((predicted - truth).square().mean(2)),
            "smooth_l1": mean(F.smooth_l1_loss(predicted, truth, reduction="none").mean(2)),
        }
        if pictures is not None:
            decoded = preprocess.decode(predicted).float()
            errors["pixel_mse"] = (decoded - pictures).square().mean((2, 3, 4))
            errors["ssim"] = similarity(decoded.flatten(0, 1), pictures.flatten(0, 1)).view(kept.shape)
        for error, values in errors.items():
            sums[name, error] = (values.double() * (kept & sample_mask)).sum(-1).cpu()
    return FrameErrors(sums, (kept & sample_mask).sum(-1).cpu(), (~kept & sample_mask).sum(-1).cpu())


@torch.no_grad()
def predictions(
    model: Model, observed: Tensor, sample_ids: Tensor, num_steps: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, prediction [B, S P, E] and energy [B, S] of the frames after the first of `observed` [B, F P, E].

    The names are `copy`, and numbers: of an energy-based model of MCMC steps, `0` for the initial state; of a diffusion
    model of passes, those of `PASSES`; an autoregressive model has one prediction, `1`.
    """
    context = model.layout.context(observed)
    recent = model.layout.most_recent(context)
    yield "copy", recent.float(), None
    if isinstance(model, EnergyBasedTransformer):
        start = model.space.initial_state(sample_ids, model.seed, Slice(0, recent.shape[1]), recent)
        for step, (energy, state) in enumerate(model.refine(context, start, num_steps, sample_ids)):
            yield str(step), state, model.layout.mean(energy)
    elif isinstance(model, DiffusionModel):
        for passes in PASSES:
            yield str(passes), model.sample(context, sample_ids, model.seed, passes), None
    else:
        yield "1", model.predict(context).float(), None


def scene_changes(preprocess: FramePreprocessor, observed: Tensor) -> Tensor:
    """Return which of the frames but the first start another scene [B, S]; without pictures, none."""
    if not preprocess.decodable:
        frames = observed.shape[1] // preprocess.frame_tokens
        return torch.zeros(len(observed), frames - 1, dtype=torch.bool, device=observed.device)
    return preprocess.decode(observed).float().diff(dim=1).abs().mean((2, 3, 4)) > SCENE_CHANGE


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity [N] (SSIM) of frames [N, H, W, 3] from 0 to 255: 1 where they are the same.

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
