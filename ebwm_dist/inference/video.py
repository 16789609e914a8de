"""Roll-outs of video: how held-out samples go on, what the model makes of them, and both as pictures.

Shapes: B samples, F frames of H x W pixels, n observed frames, N new ones, E width of the embeddings.
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
from ebwm_dist.inference.generate import RollOut
from ebwm_dist.inference.thinking import Thinking
from ebwm_dist.run import Run

SHORTEST_SIDE = 64
"""Pixels that small frames are enlarged to, so that they can be seen."""


@dataclass(frozen=True)
class Film:
    """Held-out samples and what the model rolls out from their first frames."""

    keys: list[str]
    """The samples."""
    observed: int
    """Number n of frames that the model has seen of each."""
    truth: Tensor
    """Normalised embeddings [B, n + N, E] of what there is."""
    frame_interval: float
    """Seconds between two of them."""
    rolled: RollOut
    """What the model goes on with, N of each."""

    def records(self) -> list[dict[str, Any]]:
        """Return, for each sample, the error, the energies and the steps of every new frame."""
        errors = (self.rolled.states - self.truth[:, self.observed :]).square().mean(-1)
        records = []
        for row, key in enumerate(self.keys):
            record: dict[str, Any] = {"sample": key, "squared_errors": errors[row].tolist()}
            if self.rolled.energies is not None and self.rolled.steps is not None:
                steps = self.rolled.steps[row].tolist()
                pairs = zip(self.rolled.energies[row].tolist(), steps, strict=True)
                record |= {"energies": [energies[: taken + 1] for energies, taken in pairs], "steps": steps}
            records.append(record)
        return records


def roll_out_held_out(
    run: Run,
    folder: str | None = None,
    *,
    samples: int,
    observed: int,
    thinking: Thinking = AS_TRAINED,
    seed: int = 0,
) -> tuple[Film, FramePreprocessor]:
    """Roll out held-out samples of a run's data to their full length.

    Args:
        run: a run on video.
        folder: data to take them from; None: the data that it was trained on.
        samples: how many, spread over the split.
        observed: frames of each that the model sees.
        thinking: how it thinks about each new frame.
        seed: of the noise of the first sample; each further one has the next.
    """
    data = run.validation_data(folder)
    content = data.mixture.sample_format
    assert not isinstance(content, TokenFormat)
    frames = content.sequence_length + 1
    if not 1 <= observed < frames:
        raise UserError(
            f"{observed} observed frames: the samples have {frames}, so at least 1 and at most {frames - 1}"
        )
    (batch,) = data.batches(sum(data.counts(samples)), samples)
    truth = data.preprocess(batch.observed)
    rolled = Predictor(run.model, run.config, None).roll_out(
        list(truth[:, :observed]),
        frames - observed,
        thinking=thinking,
        seeds=[seed + row for row in range(len(truth))],
    )
    return Film(batch.keys, observed, truth, content.frame_interval, rolled), data.preprocess


def write_pictures(film: Film, preprocess: FramePreprocessor, folder: Path) -> list[Path]:
    """Write what was to come above what the model rolled out: strips of all frames as PNG, and moving as GIF."""
    if not preprocess.decodable:
        raise UserError("the encoder of this model cannot decode embeddings, so there are no pictures: leave out --out")
    guess = torch.cat((film.truth[:, : film.observed], film.rolled.states.to(film.truth.dtype)), 1)
    frames = torch.stack([preprocess.decode(clips) for clips in (film.truth, guess)], 1).cpu().numpy()  # [B, 2, F, ...]
    larger = -(-SHORTEST_SIDE // min(frames.shape[3:5]))
    frames = frames.repeat(larger, 3).repeat(larger, 4)
    frames[:, 1, film.observed :, :2], frames[:, 1, film.observed :, -2:] = (255, 140, 0), (255, 140, 0)  # new ones
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pair in enumerate(frames):
        strip, moving = folder / f"sample-{number}.png", folder / f"sample-{number}.gif"
        Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in pair], 0)).save(strip)
        first, *rest = (Image.fromarray(np.concatenate([above, below], 0)) for above, below in zip(*pair, strict=True))
        first.save(moving, save_all=True, append_images=rest, duration=round(1000 * film.frame_interval), loop=0)
        paths += [strip, moving]
    return paths
