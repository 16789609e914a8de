"""Restore images from noise, and make new ones, with an energy model or a diffusion model.

Shapes: B images, P tokens of each, T tokens observed before them (its class, or none), E width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.diffusion import SAMPLING_PASSES, DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.embedding import EmbeddingSpace
from ebwm_dist.models.class_tokens import class_token
from ebwm_dist.run import Run

SHORTEST_SIDE, GAP = 64, 2
"""Pixels that small images are enlarged to, and between two of them."""


def of_images(run: Run) -> bool:
    """Return whether a run was trained on single images."""
    return bool(run.sample_format.get("frames") == 1)


@torch.no_grad()
def restore(
    model: Model, noised: Tensor, level: float, passes: Sequence[int], observed: Tensor, sample_ids: Tensor
) -> dict[int, Tensor]:
    """Return images [B, P, E] restored in each of some numbers of passes.

    An energy model starts at the noised image, is not told the level, and takes a step with each pass: its first
    images are on the way to the others. A diffusion model enters its chain at the timestep of the level.

    Args:
        model: of images.
        noised: images x + level n [B, P, E].
        level: standard deviation of the noise.
        passes: numbers of passes.
        observed: what is observed before them [B, T, E].
        sample_ids: [B] on the CPU, which seed Langevin noise.
    """
    if isinstance(model, DiffusionModel):
        return {number: model.denoise(noised, level, number, observed) for number in passes}
    assert isinstance(model, EnergyBasedTransformer)
    states = enumerate(model.refine(observed, noised, max(passes), sample_ids))
    return {step: state for step, (_, state) in states if step in passes}


@torch.no_grad()
def generate(model: Model, observed: Tensor, sample_ids: Tensor, seed: int, passes: int | None = None) -> Tensor:
    """Return new images [B, P, E], made from noise that `seed` and `sample_ids` [B] determine.

    An energy model that has learned to start at noised images starts at noise of its largest level, of which each pass
    leaves less.

    Args:
        model: of images.
        observed: what is observed before them [B, T, E].
        sample_ids: on the CPU.
        seed: of the noise.
        passes: steps; None: those of training, or `SAMPLING_PASSES` where noise is removed level by level.
    """
    if isinstance(model, DiffusionModel):
        return model.sample(observed, sample_ids, seed, passes or SAMPLING_PASSES)
    assert isinstance(model, EnergyBasedTransformer)
    size, width = model.layout.block_size, observed.shape[2]
    state = noise.normal(seed, sample_ids, noise.INITIAL, 0, size, width, observed.device)
    if model.mcmc.initial_state == "noised":
        return _remove_noise(model, observed, state, sample_ids, passes or SAMPLING_PASSES)
    *_, (_, state) = model.refine(observed, state, passes or model.mcmc.max_mcmc_steps, sample_ids)
    return state


def _remove_noise(
    model: EnergyBasedTransformer, observed: Tensor, state: Tensor, sample_ids: Tensor, passes: int
) -> Tensor:
    """Return images [B, P, E] made of noise [B, P, E], whose level falls evenly from the largest trained one to 0.

    A refinement as in training leads from x + s n to the mean of all x that this may have been. Where noise of a level
    s' is to stay, s' / s of the change is taken back: steps of the probability flow.
    """
    assert isinstance(model.space, EmbeddingSpace) and model.space.noise_config is not None
    high = model.space.noise_config.high
    assert high is not None
    levels = torch.linspace(high, 0, passes + 1).tolist()
    state = high * state
    for level, after in pairwise(levels):
        *_, (_, clean) = model.refine(observed, state, model.mcmc.max_mcmc_steps, sample_ids)
        state = clean + after / level * (state - clean)
    return state


def generate_pictures(
    run: Run, out: Path, count: int, *, class_name: str | None = None, passes: int | None = None, seed: int = 0
) -> Path:
    """Write a picture of new images; a row for each class where the model knows classes and none is named.

    Args:
        run: a run on images.
        out: folder for the picture.
        count: images of a row.
        class_name: the only class, or "none" for images of no class.
        passes: steps of each.
        seed: of the noise.
    """
    data = run.validation_data()
    config, preprocess = run.config.model, data.preprocess
    if not preprocess.decodable:
        raise UserError("the encoder of this model cannot decode embeddings, so there are no pictures")
    if count < 1:
        raise UserError(f"--samples {count}: must be at least 1")
    assert config.embedding_dim is not None
    blank, rows = torch.zeros(count, 0, config.embedding_dim, device=run.device), [torch.zeros(0)]
    if config.num_classes:
        names = [*run.sample_format["classes"], "none"]
        if class_name not in (None, *names):
            raise UserError(f"--class {class_name}: the model knows {', '.join(names)}")
        chosen = [number for number, name in enumerate(names) if class_name in (None, name)]
        rows = [torch.full((count,), number) for number in chosen]
    elif class_name is not None:
        raise UserError(f"--class {class_name}: the model knows no classes (model.num_classes)")
    pictures = []
    for number, labels in enumerate(rows):
        observed = class_token(labels.to(run.device), blank) if config.num_classes else blank
        ids = torch.arange(number * count, (number + 1) * count)
        made = preprocess.decode(generate(run.model, observed, ids, seed, passes))
        pictures.append(list(made[:, 0].cpu().numpy()))
    path = out / "images.png"
    tiled(pictures).save(path)
    return path


def tiled(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Return images [H, W, 3] of one size, row by row, as one image; small ones are enlarged."""
    height, width = rows[0][0].shape[:2]
    larger = -(-SHORTEST_SIDE // min(height, width))
    high, wide = height * larger, width * larger
    sheet = np.full((len(rows) * (high + GAP) - GAP, max(map(len, rows)) * (wide + GAP) - GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, image in enumerate(row):
            top, left = down * (high + GAP), across * (wide + GAP)
            sheet[top : top + high, left : left + wide] = image.repeat(larger, 0).repeat(larger, 1)
    return Image.fromarray(sheet)
