"""Preprocess a batch: move it to the device, crop and encode frames, normalise, cut them into tokens.

Shapes: B batch, L tokens of a sample, F frames of H x W pixels, each of P tokens of width E: one, or where states are
blocks of tokens, the patches of a frame.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ebwm_dist.config.schema import Config, DataConfig, ModelConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, SampleFormat, TokenFormat, split_labels
from ebwm_dist.data.loading.damage import intact_parts
from ebwm_dist.data.loading.mixture import Mixture, pooled
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.encoders import Encoder, build_encoder
from ebwm_dist.errors import ConfigError, DataError, UserError
from ebwm_dist.files import write_json
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.models.class_tokens import class_token

STATISTICS_FILE = "embedding_statistics.json"
STATISTICS_CLIPS = 256
"""Clips of each data set, spread evenly over its training split, whose embeddings are measured."""
_CLIPS_AT_ONCE = 16
_CROP = 0xC409  # keeps the seeds of crops apart from those of a model's noise,
_CLASS = 0xC1A5  # and those of hidden classes


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
    """Moves samples to a device; with an encoder, frames become normalised embeddings.

    Args:
        device: where to.
        encoder: of the frames.
        mean: of the embeddings of training frames.
        std: standard deviation of these.
        frame_tokens: tokens that a frame is cut into.
        num_classes: classes of which samples begin with one, or none.
    """

    def __init__(
        self,
        device: torch.device,
        encoder: Encoder | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        frame_tokens: int = 1,
        num_classes: int = 0,
    ):
        self.device, self.encoder = device, None if encoder is None else encoder.to(device)
        self.mean, self.std = mean, std
        self.frame_tokens, self.num_classes = frame_tokens, num_classes

    def __call__(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return tokens `[B, L]` or embeddings `[B, L, E]`, which frames `[B, F, H, W, 3]` are encoded to.

        For a model that knows classes, the first token is that of `labels` `[B]`, or of none.
        """
        samples = samples.to(self.device, non_blocking=True)
        if self.encoder is not None and samples.dtype == torch.uint8:
            samples = (self.encode(samples) - self.mean) / self.std
        if self.frame_tokens > 1:
            samples = samples.unflatten(2, (self.frame_tokens, -1)).flatten(1, 2)
        if self.num_classes:
            labels = torch.full((len(samples),), self.num_classes) if labels is None else labels
            samples = torch.cat((class_token(labels, samples), samples), 1)
        return samples

    def augment(self, batch: Batch, seed: int, data: DataConfig) -> Tensor:
        """Preprocess a random square of each clip, and hide the class of some; `sample_ids` differ between epochs.

        Args:
            batch: any samples; those that are not frames are not cropped.
            seed: of the run, which decides together with the ids.
            data: the smallest side of a crop, as a fraction of the shorter side of the frames, and the share of hidden
                classes.
        """
        samples, labels, ids = batch.observed, batch.labels, batch.sample_ids.tolist()
        if data.min_crop_scale < 1 and samples.dtype == torch.uint8:
            draws = [mix_seed(seed, _CROP, sample_id) for sample_id in ids]
            clips = zip(samples.to(self.device), draws, strict=True)
            samples = torch.stack([_random_crop(clip, draw, data.min_crop_scale) for clip, draw in clips])
        if self.num_classes and labels is not None:
            hidden = [mix_seed(seed, _CLASS, sample_id) < data.class_dropout * 2**63 for sample_id in ids]
            labels = labels.masked_fill(torch.tensor(hidden), self.num_classes)
        return self(samples, labels)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames `[B, F, H, W, 3]` to embeddings `[B, F, E]` that are not normalised."""
        assert self.encoder is not None
        return self.encoder.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def frames_are_states(self, model: ModelConfig) -> bool:
        """Return whether a model predicts whole frames, each as one state, after a first one that is only observed."""
        sizes = {self.frame_tokens, model.block_size, model.prefix_length}
        return model.embedding_dim is not None and not model.num_classes and len(sizes) == 1

    @property
    def decodable(self) -> bool:
        """Whether embeddings can be decoded to frames."""
        return self.encoder is not None and self.encoder.decodable

    def decode(self, embeddings: Tensor) -> Tensor:
        """Decode normalised embeddings `[..., F P, E]` to frames `[..., F, H, W, 3]` uint8."""
        assert self.encoder is not None
        if self.frame_tokens > 1:
            embeddings = embeddings.unflatten(-2, (-1, self.frame_tokens)).flatten(-2)
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
    """Raise a ConfigError that names both sides if the configured model cannot be trained on such samples.

    How long clips are in tokens is known, and checked, when there is their encoder (`build_preprocessor`).
    """
    model, data, where = config.model, config.data, _described(config, sample_format)
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
        if model.vocab_size != (needed := sample_format.vocab_size):
            raise _not_made_with("model.vocab_size", model.vocab_size, where, needed)
        _check_length(config, sample_format.sequence_length + 1, where)
        return
    if model.embedding_dim is None:
        width = f" of width {sample_format.embedding_dim}" if isinstance(sample_format, LatentFormat) else ""
        what = "video" if sample_format.frames > 1 else "images"
        raise ConfigError(
            f"model.embedding_dim is null, but {where} are {what}{width}: set it to the width of the embeddings"
        )
    if model.num_classes and model.num_classes != (classes := len(sample_format.classes)):
        raise ConfigError(f"model.num_classes is {model.num_classes}, but {where} have {classes} classes")
    if sample_format.frames == 1 and model.prefix != "none" and not model.num_classes:
        raise ConfigError(
            f"model.prefix is {model.prefix!r}, but {where} are single images, before which nothing is observed: set "
            "model.prefix=none"
        )
    if isinstance(sample_format, LatentFormat):
        if data.encoder not in (None, sample_format.encoder):
            raise ConfigError(
                f"data.encoder is {data.encoder!r}, but {where} were made with {sample_format.encoder!r}: set "
                "data.encoder=null, or data.path to a folder of clips"
            )
        _frame_tokens(config, sample_format, sample_format.embedding_dim)
    elif data.encoder is None:
        raise ConfigError(
            f"data.encoder is null, but {where} have to be encoded: set data.encoder=pixels:16, or another"
        )


def _described(config: Config, sample_format: SampleFormat) -> str:
    return f"the {sample_format.kind} in {' and '.join(config.data.mixture) or config.data.path}"


def _not_made_with(key: str, value: int | None, where: str, needed: int) -> ConfigError:
    return ConfigError(f"{key} is {value}, but {where} were made with {needed}: set {key}={needed}")


def _check_length(config: Config, tokens: int, where: str) -> None:
    """Refuse samples of `tokens` tokens, of which another number is predicted than is configured."""
    if config.data.sequence_length != (needed := tokens - config.model.prefix_length):
        raise _not_made_with("data.sequence_length", config.data.sequence_length, where, needed)


def _frame_tokens(config: Config, sample_format: LatentFormat | ClipFormat, width: int) -> int:
    """Return how many tokens of the model a frame of `width` numbers is cut into, or raise a ConfigError."""
    model, where = config.model, _described(config, sample_format)
    assert model.embedding_dim is not None
    if width % model.embedding_dim:
        if isinstance(sample_format, LatentFormat):
            raise _not_made_with("model.embedding_dim", model.embedding_dim, where, width)
        raise ConfigError(
            f"model.embedding_dim is {model.embedding_dim}, but data.encoder = {config.data.encoder!r} makes "
            f"embeddings of {width} from the frames in {config.data.path}: set model.embedding_dim={width}, or for "
            "patches of frames to a part of it"
        )
    tokens = width // model.embedding_dim
    _check_length(config, sample_format.frames * tokens + (1 if model.num_classes else 0), where)
    return tokens


def build_preprocessor(config: Config, sample_format: SampleFormat, device: torch.device) -> FramePreprocessor:
    """Return the preprocessor of such samples for the configured model; for clips, mean and std are still to be set.

    For latents it has an encoder if that needs no weights; it serves to decode them.
    """
    if isinstance(sample_format, TokenFormat):
        return FramePreprocessor(device)
    encoder, mean, std = None, 0.0, 1.0
    if isinstance(sample_format, LatentFormat):
        mean, std, width = sample_format.mean, sample_format.std, sample_format.embedding_dim
        if sample_format.encoder.startswith(("pixels:", "grey:")):
            encoder = build_encoder(sample_format.encoder, None, sample_format.height, sample_format.width)
    else:
        data = config.data
        assert data.encoder is not None
        height, across = sample_format.height, sample_format.width
        encoder = build_encoder(data.encoder, data.encoder_weights, height, across, config.training.precision)
        width = encoder.embedding_dim
    tokens = _frame_tokens(config, sample_format, width)
    return FramePreprocessor(device, encoder, mean, std, tokens, config.model.num_classes)


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
