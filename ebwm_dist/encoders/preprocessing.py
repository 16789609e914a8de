"""From the samples of a batch to what a model observes, on its device: there clips are encoded by a frozen encoder.

Shapes: B batch, F = S+1 frames of H x W pixels, E width of the embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, SampleFormat, TokenFormat
from ebwm_dist.data.loading.damage import intact_parts
from ebwm_dist.data.loading.mixture import Mixture, pooled
from ebwm_dist.encoders import Encoder, build_encoder
from ebwm_dist.errors import ConfigError, DataError, UserError
from ebwm_dist.files import write_json
from ebwm_dist.mcmc.noise import mix_seed

STATISTICS_FILE = "embedding_statistics.json"
STATISTICS_CLIPS = 256
"""Clips of each data set, spread over its training split, that mean and deviation of embeddings are taken from."""
_CLIPS_AT_ONCE = 16
CROP = 0xC409
"""Keeps the seeds of crops apart from those of a model's noise."""


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Mean and standard deviation of the embeddings of training frames, and the encoder that made them."""

    encoder: str | None
    sha256: str | None
    """Of the encoder; None where it is not recorded."""
    mean: float
    std: float

    def check(self, encoder: Encoder, run_dir: Path) -> None:
        """Refuse an encoder that is another one than in training."""
        if self.sha256 is not None and self.sha256 != encoder.sha256:
            raise UserError(
                f"{run_dir} was trained with the encoder {self.encoder} (sha256 {self.sha256[:12]}), now it is "
                f"{encoder.spec} ({encoder.sha256[:12]}): set data.encoder and data.encoder_weights to what they were, "
                "or start a new run_dir"
            )


class FramePreprocessor:
    """Hands samples to a model as they are, or, with an encoder, as normalised embeddings of their frames."""

    def __init__(self, device: torch.device, encoder: Encoder | None = None, mean: float = 0.0, std: float = 1.0):
        self.device, self.encoder = device, None if encoder is None else encoder.to(device)
        self.mean, self.std = mean, std

    def __call__(self, samples: Tensor) -> Tensor:
        """Return tokens [B, S+1] and latents [B, S+1, E] on the device, and frames [B, F, H, W, 3] as latents."""
        samples = samples.to(self.device, non_blocking=True)
        if self.encoder is None or samples.dtype != torch.uint8:
            return samples
        return (self.encode(samples) - self.mean) / self.std

    def augmented(self, samples: Tensor, sample_ids: Tensor, seed: int, min_crop_scale: float) -> Tensor:
        """Return the same of a part of each clip, chosen by its id, another one in every epoch, and the run's seed."""
        if min_crop_scale < 1 and samples.dtype == torch.uint8:
            draws = [mix_seed(seed, CROP, sample_id) for sample_id in sample_ids.tolist()]
            clips = zip(samples.to(self.device), draws, strict=True)
            samples = torch.stack([_cropped(clip, draw, min_crop_scale) for clip, draw in clips])
        return self(samples)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the embeddings [B, F, E] of frames [B, F, H, W, 3] as the encoder makes them."""
        assert self.encoder is not None
        return self.encoder.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @property
    def decodable(self) -> bool:
        """Return whether embeddings can be shown."""
        return self.encoder is not None and self.encoder.decodable

    def decode(self, embeddings: Tensor) -> Tensor:
        """Return the frames [..., H, W, 3] uint8 that normalised embeddings [..., E] stand for."""
        assert self.encoder is not None
        frames = self.encoder.decode(embeddings.flatten(0, -2).float() * self.std + self.mean)
        return frames.unflatten(0, embeddings.shape[:-1])


def _cropped(clip: Tensor, seed: int, smallest: float) -> Tensor:
    """Return a random square of a clip [F, H, W, 3], the same of every frame, at the size of the whole."""
    height, width = clip.shape[1:3]
    drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    side = max(1, round(min(height, width) * (smallest + (1 - smallest) * drawn[0])))
    top, left = int(drawn[1] * (height - side + 1)), int(drawn[2] * (width - side + 1))
    part = clip[:, top : top + side, left : left + side].movedim(-1, 1).float()
    if drawn[3] < 0.5:
        part = part.flip(-1)
    part = interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
    return part.round().to(torch.uint8).movedim(1, -1)


def check_format(config: Config, sample_format: SampleFormat) -> None:
    """Refuse data that the configured model cannot be trained on, naming both sides."""
    model, data, where = (
        config.model,
        config.data,
        f"the {sample_format.kind} in {' and '.join(config.data.mixture) or config.data.path}",
    )
    wanted: list[tuple[str, int | None, int]] = [
        ("data.sequence_length", data.sequence_length, sample_format.sequence_length)
    ]
    if isinstance(sample_format, TokenFormat):
        if model.embedding_dim is not None:
            raise ConfigError(
                f"model.embedding_dim is {model.embedding_dim}, but {where} are text: set it to null, or data.path to "
                "a folder of latents or clips"
            )
        wanted.append(("model.vocab_size", model.vocab_size, sample_format.vocab_size))
    elif model.embedding_dim is None:
        width = f" of width {sample_format.embedding_dim}" if isinstance(sample_format, LatentFormat) else ""
        raise ConfigError(
            f"model.embedding_dim is null, but {where} are video{width}: set it to the width of the embeddings"
        )
    if isinstance(sample_format, LatentFormat):
        wanted.append(("model.embedding_dim", model.embedding_dim, sample_format.embedding_dim))
        if data.encoder not in (None, sample_format.encoder):
            raise ConfigError(
                f"data.encoder is {data.encoder!r}, but {where} were made with {sample_format.encoder!r}: set "
                "data.encoder=null, or data.path to a folder of clips"
            )
    if isinstance(sample_format, ClipFormat) and data.encoder is None:
        raise ConfigError(
            f"data.encoder is null, but {where} have to be encoded: set data.encoder=pixels:16, or another"
        )
    for key, here, there in wanted:
        if here != there:
            raise ConfigError(f"{key} is {here}, but {where} were made with {there}: set {key}={there}")


def build_preprocessor(config: Config, sample_format: SampleFormat, device: torch.device) -> FramePreprocessor:
    """Return the preprocessor of such samples for the configured model; that of clips has no statistics yet.

    Latents have an encoder where it can be built from its name alone; it only serves to decode them.
    """
    if isinstance(sample_format, LatentFormat):
        encoder = None
        if sample_format.encoder.startswith("pixels"):
            encoder = build_encoder(sample_format.encoder, None, sample_format.height, sample_format.width)
        return FramePreprocessor(device, encoder, sample_format.mean, sample_format.std)
    if not isinstance(sample_format, ClipFormat):
        return FramePreprocessor(device)
    data, width = config.data, config.model.embedding_dim
    assert data.encoder is not None
    encoder = build_encoder(
        data.encoder, data.encoder_weights, sample_format.height, sample_format.width, config.training.precision
    )
    if encoder.embedding_dim != width:
        raise ConfigError(
            f"model.embedding_dim is {width}, but data.encoder = {data.encoder!r} makes embeddings of "
            f"{encoder.embedding_dim} from the frames in {data.path}: set model.embedding_dim={encoder.embedding_dim}"
        )
    return FramePreprocessor(device, encoder)


def embedding_statistics(
    observer: FramePreprocessor, mixture: Mixture, run_dir: Path, skip: bool = False
) -> tuple[float, float]:
    """Return mean and standard deviation of the embeddings of training clips, without damaged ones if `skip`.

    Data sets count by their shares. The figures are computed at the first start of a run, kept in its folder, and the
    same ever after.
    """
    encoder, file = observer.encoder, run_dir / STATISTICS_FILE
    assert encoder is not None
    if file.is_file():
        statistics = read_statistics(file)
        statistics.check(encoder, run_dir)
        return statistics.mean, statistics.std
    mean, std = pooled(mixture.sources, [_moments(observer, source.manifest, skip) for source in mixture.sources])
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, {"encoder": encoder.spec, "sha256": encoder.sha256, "mean": mean, "std": std})
    return mean, std


def _moments(observer: FramePreprocessor, manifest: Manifest, skip: bool) -> tuple[float, float]:
    """Return the means of embeddings and of their squares over training clips of one data set."""
    counts = np.cumsum([0, *manifest.train.counts])
    chosen = min(STATISTICS_CLIPS, manifest.train.samples)
    numbers = np.arange(chosen) * manifest.train.samples // chosen
    shards = np.searchsorted(counts, numbers, side="right") - 1
    reader = ShardReader(manifest, "train", max_open=4)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, chosen, _CLIPS_AT_ONCE):
        part = slice(start, start + _CLIPS_AT_ONCE)
        place = shards[part], (numbers - counts[shards])[part]
        for frames in intact_parts(reader.read, place) if skip else (reader.read(*place)[0],):
            embeddings = observer.encode(torch.from_numpy(frames).to(observer.device)).double()
            count += embeddings.numel()
            total += embeddings.sum().item()
            squares += embeddings.square().sum().item()
    reader.close()
    if not count:
        raise DataError(f"none of the {chosen} clips of {manifest.name} tried is intact; see verify.py --deep")
    return total / count, squares / count


def read_statistics(file: Path) -> EmbeddingStatistics:
    """Read the statistics that a run on clips has kept."""
    try:
        content = json.loads(file.read_text("utf-8"))
        return EmbeddingStatistics(content["encoder"], content["sha256"], float(content["mean"]), float(content["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore it, or start a new run_dir") from None
