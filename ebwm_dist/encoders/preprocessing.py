"""Preprocess a batch: move it to the device, crop and encode frames, normalise.

Shapes: B batch, S+1 tokens, F = S+1 frames of H x W pixels, E width of the embeddings.
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
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, SampleFormat, TokenFormat, split_labels
from ebwm_dist.data.loading.damage import intact_parts
from ebwm_dist.data.loading.mixture import Mixture, pooled
from ebwm_dist.encoders import Encoder, build_encoder
from ebwm_dist.errors import ConfigError, DataError, UserError
from ebwm_dist.files import write_json
from ebwm_dist.mcmc.noise import mix_seed

STATISTICS_FILE = "embedding_statistics.json"
STATISTICS_CLIPS = 256
"""Clips of each data set, spread evenly over its training split, whose embeddings are measured."""
_CLIPS_AT_ONCE = 16
_CROP = 0xC409  # keeps the seeds of crops apart from those of a model's noise


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Mean and standard deviation of the embeddings of training frames, and the encoder that made them."""

    encoder: str | None
    sha256: str | None
    """Of the encoder; None where it is not recorded."""
    mean: float
    std: float

    def check(self, encoder: Encoder, run_dir: Path) -> None:
        """Raise a UserError if `encoder` is not the one of the training."""
        if self.sha256 is not None and self.sha256 != encoder.sha256:
            raise UserError(
                f"{run_dir} was trained with the encoder {self.encoder} (sha256 {self.sha256[:12]}), now it is "
                f"{encoder.spec} ({encoder.sha256[:12]}): set data.encoder and data.encoder_weights to what they were, "
                "or start a new run_dir"
            )


class FramePreprocessor:
    """Moves samples to a device; with an encoder, frames become normalised embeddings."""

    def __init__(self, device: torch.device, encoder: Encoder | None = None, mean: float = 0.0, std: float = 1.0):
        self.device, self.encoder = device, None if encoder is None else encoder.to(device)
        self.mean, self.std = mean, std

    def __call__(self, samples: Tensor) -> Tensor:
        """Return tokens `[B, S+1]` or embeddings `[B, F, E]`, which frames `[B, F, H, W, 3]` are encoded to."""
        samples = samples.to(self.device, non_blocking=True)
        if self.encoder is None or samples.dtype != torch.uint8:
            return samples
        return (self.encode(samples) - self.mean) / self.std

    def augment(self, samples: Tensor, sample_ids: Tensor, seed: int, min_crop_scale: float) -> Tensor:
        """Preprocess a random square of each clip; `sample_ids` differ between epochs, so crops do too.

        Args:
            samples: any samples; those that are not frames are not cropped.
            sample_ids: `[B]`, which decide on the crops, together with the run's `seed`.
            min_crop_scale: smallest side of a crop, as a fraction of the shorter side of the frames; 1 for no crops.
        """
        if min_crop_scale < 1 and samples.dtype == torch.uint8:
            draws = [mix_seed(seed, _CROP, sample_id) for sample_id in sample_ids.tolist()]
            clips = zip(samples.to(self.device), draws, strict=True)
            samples = torch.stack([_random_crop(clip, draw, min_crop_scale) for clip, draw in clips])
        return self(samples)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames `[B, F, H, W, 3]` to embeddings `[B, F, E]` that are not normalised."""
        assert self.encoder is not None
        return self.encoder.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @property
    def decodable(self) -> bool:
        """Whether embeddings can be decoded to frames."""
        return self.encoder is not None and self.encoder.decodable

    def decode(self, embeddings: Tensor) -> Tensor:
        """Decode normalised embeddings `[..., E]` to frames `[..., H, W, 3]` uint8."""
        assert self.encoder is not None
        frames = self.encoder.decode(embeddings.flatten(0, -2).float() * self.std + self.mean)
        return frames.unflatten(0, embeddings.shape[:-1])


def _random_crop(clip: Tensor, seed: int, min_scale: float) -> Tensor:
    """Return a random square, mirrored or not, of a clip `[F, H, W, 3]`, the same in every frame, resized to H x W."""
    height, width = clip.shape[1:3]
    scale, down, across, mirrored = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    side = max(1, round(min(height, width) * (min_scale + (1 - min_scale) * scale)))
    top, left = int(down * (height - side + 1)), int(across * (width - side + 1))
    crop = clip[:, top : top + side, left : left + side].movedim(-1, 1).float()
    crop = interpolate(
        crop.flip(-1) if mirrored < 0.5 else crop, size=(height, width), mode="bilinear", align_corners=False
    )
    return crop.round().to(torch.uint8).movedim(1, -1)


def check_format(config: Config, sample_format: SampleFormat) -> None:
    """Raise a ConfigError that names both sides if the configured model cannot be trained on such samples."""
    model, data = config.model, config.data
    where = f"the {sample_format.kind} in {' and '.join(data.mixture) or data.path}"
    predicted = sample_format.sequence_length + 1 - model.prefix_length
    required: dict[str, tuple[int | None, int]] = {"data.sequence_length": (data.sequence_length, predicted)}
    if isinstance(sample_format, TokenFormat):
        if model.embedding_dim is not None:
            raise ConfigError(
                f"model.embedding_dim is {model.embedding_dim}, but {where} are text: set it to null, or data.path to "
                "a folder of latents or clips"
            )
        if sample_format.labels and model.prefix == "none":
            raise ConfigError(
                f"model.prefix is 'none', but {where} have no label for their first token: set it to 'token'"
            )
        required["model.vocab_size"] = model.vocab_size, sample_format.vocab_size
    elif model.embedding_dim is None:
        width = f" of width {sample_format.embedding_dim}" if isinstance(sample_format, LatentFormat) else ""
        raise ConfigError(
            f"model.embedding_dim is null, but {where} are video{width}: set it to the width of the embeddings"
        )
    elif sample_format.frames == 1:
        raise ConfigError(f"model.kind is {model.kind!r}, but {where} are single images, which nothing comes before")
    if isinstance(sample_format, LatentFormat):
        required["model.embedding_dim"] = model.embedding_dim, sample_format.embedding_dim
        if data.encoder not in (None, sample_format.encoder):
            raise ConfigError(
                f"data.encoder is {data.encoder!r}, but {where} were made with {sample_format.encoder!r}: set "
                "data.encoder=null, or data.path to a folder of clips"
            )
    if isinstance(sample_format, ClipFormat) and data.encoder is None:
        raise ConfigError(
            f"data.encoder is null, but {where} have to be encoded: set data.encoder=pixels:16, or another"
        )
    for key, (value, needed) in required.items():
        if value != needed:
            raise ConfigError(f"{key} is {value}, but {where} were made with {needed}: set {key}={needed}")


def build_preprocessor(config: Config, sample_format: SampleFormat, device: torch.device) -> FramePreprocessor:
    """Return the preprocessor of such samples for the configured model; for clips, mean and std are still to be set.

    For latents it has an encoder if that needs no weights; it serves to decode them.
    """
    if isinstance(sample_format, LatentFormat):
        encoder = None
        if sample_format.encoder.startswith(("pixels:", "grey:")):
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
    preprocess: FramePreprocessor, mixture: Mixture, run_dir: Path, skip: bool = False
) -> tuple[float, float]:
    """Return mean and standard deviation of the embeddings of training clips; damaged ones are left out if `skip`.

    They are computed when a run first starts, with data sets weighted by their shares, and stored in its folder.
    """
    encoder, file = preprocess.encoder, run_dir / STATISTICS_FILE
    assert encoder is not None
    if file.is_file():
        statistics = read_statistics(file)
        statistics.check(encoder, run_dir)
        return statistics.mean, statistics.std
    mean, std = pooled(mixture.sources, [_moments(preprocess, source.manifest, skip) for source in mixture.sources])
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, {"encoder": encoder.spec, "sha256": encoder.sha256, "mean": mean, "std": std})
    return mean, std


def _moments(preprocess: FramePreprocessor, manifest: Manifest, skip: bool) -> tuple[float, float]:
    """Return the mean of the embeddings of one data set, and the mean of their squares."""
    counts = np.cumsum([0, *manifest.train.counts])
    chosen = min(STATISTICS_CLIPS, manifest.train.samples)
    numbers = np.arange(chosen) * manifest.train.samples // chosen
    shards = np.searchsorted(counts, numbers, side="right") - 1
    reader = ShardReader(manifest, "train", max_open=4)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, chosen, _CLIPS_AT_ONCE):
        part = slice(start, start + _CLIPS_AT_ONCE)
        place = shards[part], (numbers - counts[shards])[part]
        for samples in intact_parts(reader.read, place) if skip else (reader.read(*place)[0],):
            frames, _ = split_labels(samples)
            embeddings = preprocess.encode(torch.from_numpy(frames).to(preprocess.device)).double()
            count += embeddings.numel()
            total += embeddings.sum().item()
            squares += embeddings.square().sum().item()
    reader.close()
    if not count:
        raise DataError(f"none of the {chosen} clips of {manifest.name} tried is intact; see verify.py --deep")
    return total / count, squares / count


def read_statistics(file: Path) -> EmbeddingStatistics:
    """Read the statistics that a run on clips has stored."""
    try:
        content = json.loads(file.read_text("utf-8"))
        return EmbeddingStatistics(content["encoder"], content["sha256"], float(content["mean"]), float(content["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore it, or start a new run_dir") from None
