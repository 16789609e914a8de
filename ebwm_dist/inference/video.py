"""Roll-outs of held-out video, and pictures of them beside the true frames.

Shapes: B samples, F = n + N frames of H x W pixels, n observed ones and N new ones, P tokens of a frame, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebwm_dist.data.format.sample_format import TokenFormat
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.errors import UserError
from ebwm_dist.inference.api import AS_TRAINED, Predictor
from ebwm_dist.inference.continuation import RollOut
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.run import Run

SHORTEST_SIDE = 64
"""Pixels that small frames are enlarged to, so that they can be seen."""
MARK = (255, 140, 0)
"""Colour above and below predicted frames."""


@dataclass(frozen=True)
class HeldOutRollOut:
    """Held-out samples, and roll-outs from their first frames."""

    keys: list[str]
    """The samples."""
    truth: Tensor
    """Their normalised embeddings [B, F, P, E]."""
    rolled: RollOut
    """N new frames of each."""
    preprocess: FramePreprocessor
    frame_interval: float
    """Seconds between two frames."""

    @property
    def observed(self) -> int:
        """Return the number n of observed frames of each sample."""
        return self.truth.shape[1] - self.rolled.states.shape[1]

    @property
    def predicted(self) -> Tensor:
        """Return the new frames [B, N, P, E]."""
        return self.rolled.states.view_as(self.truth[:, self.observed :])

    def records(self) -> list[dict[str, Any]]:
        """Return, for each sample, the error, the energies and the steps of every new frame."""
        errors = (self.predicted - self.truth[:, self.observed :]).square().mean((2, 3))
        records = []
        for row, key in enumerate(self.keys):
            record: dict[str, Any] = {"sample": key, "squared_errors": errors[row].tolist()}
            if self.rolled.energies is not None and self.rolled.steps is not None:
                steps = self.rolled.steps[row].tolist()
                pairs = zip(self.rolled.energies[row].tolist(), steps, strict=True)
                record |= {"energies": [energies[: taken + 1] for energies, taken in pairs], "steps": steps}
            records.append(record)
        return records

    def write_pictures(self, folder: Path) -> list[Path]:
        """Write the true frames above the predicted ones: strips of all frames as PNG, and moving as GIF."""
        predicted = torch.cat((self.truth[:, : self.observed], self.predicted.to(self.truth.dtype)), 1)
        decoded = [self.preprocess.decode(frames.flatten(1, 2)) for frames in (self.truth, predicted)]
        frames = torch.stack(decoded, 1).cpu().numpy()  # [B, 2, F, H, W, 3]
        larger = -(-SHORTEST_SIDE // min(frames.shape[3:5]))
        frames = frames.repeat(larger, 3).repeat(larger, 4)
        frames[:, 1, self.observed :, :2] = frames[:, 1, self.observed :, -2:] = MARK
        paths = []
        for number, pair in enumerate(frames):
            strip, moving = folder / f"sample-{number}.png", folder / f"sample-{number}.gif"
            Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in pair], 0)).save(strip)
            first, *rest = (Image.fromarray(np.concatenate(both, 0)) for both in zip(*pair, strict=True))
            first.save(moving, save_all=True, append_images=rest, duration=round(1000 * self.frame_interval), loop=0)
            paths += [strip, moving]
        return paths


def roll_out_held_out(
    run: Run,
    folder: str | None = None,
    *,
    samples: int,
    observed: int,
    thinking: Thinking = AS_TRAINED,
    seed: int = 0,
    pictures: bool = False,
) -> HeldOutRollOut:
    """Roll out held-out samples to their full length.

    Args:
        run: a run on video.
        folder: data folder or its address; None: the data of the run.
        samples: how many, spread over the split.
        observed: number of observed frames of each.
        thinking: how to predict.
        seed: of the noise of the first sample; each further one has the next.
        pictures: refuse an encoder that cannot decode, before anything is computed.
    """
    data = run.validation_data(folder)
    sample_format = data.mixture.sample_format
    assert not isinstance(sample_format, TokenFormat)
    frames, tokens = sample_format.frames, data.preprocess.frame_tokens
    if not data.preprocess.frames_are_states(run.config.model):
        raise UserError(f"{run.name} predicts no whole frames after a first one (model.block_size, model.prefix)")
    if samples < 1:
        raise UserError(f"{samples} samples: continue at least 1")
    if not 1 <= observed < frames:
        raise UserError(
            f"{observed} observed frames: the samples have {frames}, so at least 1 and at most {frames - 1}"
        )
    if pictures and not data.preprocess.decodable:
        raise UserError("the encoder of this model cannot decode embeddings, so there are no pictures: leave out --out")
    (batch,) = data.batches(sum(data.counts(samples)), samples)
    truth = data.preprocess(batch.observed)
    begun, seeds = list(truth[:, : observed * tokens]), range(seed, seed + len(truth))
    rolled = Predictor(run.model, run.config, None).roll_out(begun, frames - observed, thinking=thinking, seeds=seeds)
    truth = truth.unflatten(1, (frames, tokens))
    return HeldOutRollOut(batch.keys, truth, rolled, data.preprocess, sample_format.frame_interval)
