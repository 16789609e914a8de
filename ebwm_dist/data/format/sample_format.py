"""The formats of samples: rows of tokens, latents of video frames, and clips of frames.

A format describes the shape and dtype of a sample, its valid values, the members of its record in a shard, and the
tool that makes it. It is the part of the manifest that is not about files. An image is a clip of one frame, which may
have a class.

Shapes: S+1 tokens or F = S+1 frames of a sample, E the width of a frame's latent, H and W the size of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ebwm_dist.errors import DataError

CONTEXT, TARGET, FIRST_DIFFICULTY = 0, 1, 2
"""Labels of tokens: not a target, a target, and from the last on targets of difficulty 0, 1, ..."""
MAX_DIFFICULTY = 65_000
"""Its label fits into 16 bits."""
IMAGES = "data_tools/pack_images.py"
"""The tool that makes clips of one frame."""


class _Arrays:
    """Samples that are stored as rows of npy arrays of `dtype`."""

    extensions: ClassVar[tuple[str, ...]] = ("npy",)
    dtype: str

    @property
    def array_dtype(self) -> np.dtype:
        """Return the dtype of the stored arrays, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")


class _Video:
    """Samples of `frames` frames, each sample with a class where there are `classes`."""

    frames: int
    classes: tuple[str, ...]

    @property
    def sequence_length(self) -> int:
        """Return S, the number of frames that are predicted: all but the first, or the one frame of an image."""
        return max(1, self.frames - 1)

    @property
    def totals(self) -> tuple[str, ...]:
        """Return the names of the totals of a split."""
        return ("videos", "frames") if self.frames > 1 else ("images",)

    @property
    def unit(self) -> str:
        """Return what a sample consists of: frames, or one image."""
        return self.totals[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a sample: that of its values, or none where it is a record of values and label."""
        return () if self.classes else self.value_shape

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Return the shape of the frames or latents of a sample."""
        raise NotImplementedError

    def count(self, samples: np.ndarray) -> dict[str, int]:
        """Return those totals of a split that can be counted in its samples."""
        return {self.unit: len(samples) * self.frames}

    def labelled(self, values: np.ndarray, labels: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Return samples of values `[n, ...]`, and of their labels `[n]` where there are classes.

        Raises ValueError where a label is that of no class.
        """
        if not self.classes:
            return values
        assert labels is not None
        samples = np.empty(len(values), _with_label(values.dtype, values.shape[1:]))
        samples["values"], samples["label"] = values, labels
        if len(samples) and not 0 <= samples["label"].min() <= samples["label"].max() < len(self.classes):
            raise ValueError(f"a label is not one of the {len(self.classes)} classes, numbered from 0")
        return samples

    def _check_video(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames = {self.frames}: a sample needs at least 1")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")


def _with_label(dtype: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("values", dtype, shape), ("label", "<i4")])


def split_labels(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the values of samples `[n, ...]` and their labels `[n]` int32, if they have any."""
    if samples.dtype.names is None:
        return samples, None
    return np.ascontiguousarray(samples["values"]), np.ascontiguousarray(samples["label"])


@dataclass(frozen=True)
class TokenFormat(_Arrays):
    """Rows of `sequence_length` + 1 tokens, packed so that every token is predicted once.

    With `labels` a sample is `[2, S+1]`: tokens of whole documents, of which only completions and the end token after
    them are targets, and a label for every token. `tokenizer` is a file in the folder, used with the ids and
    `allow_special` that stand here.
    """

    kind: ClassVar[str] = "tokens"
    tool: ClassVar[str] = "data_tools/tokenize_text.py"
    totals: ClassVar[tuple[str, ...]] = ("documents", "tokens", "text_bytes")
    unit: ClassVar[str] = "tokens"

    sequence_length: int
    dtype: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    tokenizer: str
    tokenizer_sha256: str
    labels: bool = False
    allow_special: bool = False

    def __post_init__(self) -> None:
        _check_fields(self, may_be_negative=("bos_id",))
        _check_choice("dtype", self.dtype, "uint16", "uint32")
        check_relative(self.tokenizer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a sample, `[S+1]`, or `[2, S+1]` with labels."""
        return (2, self.sequence_length + 1) if self.labels else (self.sequence_length + 1,)

    @property
    def sample_dtype(self) -> np.dtype:
        """Return the dtype of a sample as readers return it."""
        return self.array_dtype

    def validate(self, rows: np.ndarray) -> np.ndarray:
        """Return stored rows as readers return them; raises ValueError where a value is invalid."""
        tokens = rows[:, 0] if self.labels else rows
        if tokens.size and (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(f"token id {largest} is beyond the vocabulary of {self.vocab_size}")
        if self.labels and rows.size:
            if (label := int(rows[:, 1].max())) > FIRST_DIFFICULTY + MAX_DIFFICULTY:
                raise ValueError(f"a completion has difficulty {label - FIRST_DIFFICULTY}, more than {MAX_DIFFICULTY}")
            if (rows[:, 1] > CONTEXT)[tokens == self.pad_id].any() or (rows[:, 1, 0] > CONTEXT).any():
                raise ValueError("padding or the first token of a row is labelled as a target")
        return rows

    def targets(self, samples: np.ndarray) -> np.ndarray:
        """Return the true next tokens `[n, S]` of samples, the pad token where there is no target."""
        if not self.labels:
            return samples[:, 1:]
        return np.where(samples[:, 1, 1:] > CONTEXT, samples[:, 0, 1:], samples.dtype.type(self.pad_id))

    def count(self, samples: np.ndarray) -> dict[str, int]:
        """Return those totals of a split that can be counted in its samples: the tokens that are predicted."""
        return {"tokens": int(np.count_nonzero(self.targets(samples) != self.pad_id))}


@dataclass(frozen=True)
class LatentFormat(_Arrays, _Video):
    """Frames encoded by a frozen encoder, `frame_interval` seconds apart, each `[E]`.

    `height` and `width` are those of the frames that were encoded. `mean` and `std` are taken over the training split;
    readers return `(x - mean) / std`.
    """

    kind: ClassVar[str] = "latents"
    tool: ClassVar[str] = "data_tools/encode_frames.py"

    frames: int
    embedding_dim: int
    dtype: str
    frame_interval: float
    encoder: str
    encoder_sha256: str
    height: int
    width: int
    mean: float
    std: float
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self, may_be_negative=("mean",))
        _check_choice("dtype", self.dtype, "float16", "float32")
        self._check_video()
        if not self.std > 0:
            raise ValueError(f"std = {self.std} is not positive")

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample's latents, `[F, E]`."""
        return (self.frames, self.embedding_dim)

    @property
    def array_dtype(self) -> np.dtype:
        """Return the dtype of the stored arrays, little-endian on every machine."""
        dtype = super().array_dtype
        return _with_label(dtype, self.value_shape) if self.classes else dtype

    @property
    def sample_dtype(self) -> np.dtype:
        """Return the dtype of a sample as readers return it."""
        dtype = np.dtype(np.float32)
        return _with_label(dtype, self.value_shape) if self.classes else dtype

    def validate(self, rows: np.ndarray) -> np.ndarray:
        """Return stored rows normalised; raises ValueError where a value is invalid."""
        values, labels = split_labels(rows)
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("a latent is not finite")
        values -= np.float32(self.mean)
        values /= np.float32(self.std)
        return self.labelled(values, labels)


@dataclass(frozen=True)
class ClipFormat(_Video):
    """Clips of `frames` frames `[H, W, 3]`, `frame_interval` seconds apart, stored as one mp4, or as jpegs or pngs."""

    kind: ClassVar[str] = "clips"
    tool: ClassVar[str] = "data_tools/cut_clips.py"

    frames: int
    frame_interval: float
    height: int
    width: int
    storage: str
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_choice("storage", self.storage, "mp4", "jpeg", "png")
        self._check_video()

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample's frames, `[F, H, W, 3]`."""
        return (self.frames, self.height, self.width, 3)

    @property
    def sample_dtype(self) -> np.dtype:
        """Return the dtype of a sample as readers return it."""
        dtype = np.dtype(np.uint8)
        return _with_label(dtype, self.value_shape) if self.classes else dtype

    @property
    def media(self) -> tuple[str, ...]:
        """Return the extensions of the members that hold the frames, in the order of the frames."""
        suffix = {"mp4": "mp4", "jpeg": "jpg", "png": "png"}[self.storage]
        if self.storage == "mp4" or self.frames == 1:
            return (suffix,)
        digits = max(3, len(str(self.frames - 1)))
        return tuple(f"{number:0{digits}d}.{suffix}" for number in range(self.frames))

    @property
    def extensions(self) -> tuple[str, ...]:
        """Return the extensions of the members of a record, in the order of the tar."""
        return tuple(sorted((*self.media, "json", *(("cls",) if self.classes else ()))))


SampleFormat = TokenFormat | LatentFormat | ClipFormat
KINDS: dict[str, type[SampleFormat]] = {format_.kind: format_ for format_ in (TokenFormat, LatentFormat, ClipFormat)}


def describe_format(sample_format: SampleFormat) -> dict[str, Any]:
    """Return a format as it stands in a manifest, for `parse_format`."""
    described = {"kind": sample_format.kind, **asdict(sample_format)}
    # Manifests and fingerprints without what these fields allow stay what they were before there were these fields.
    optional = ("labels", "allow_special", "classes")
    return {key: value for key, value in described.items() if value or key not in optional}


def parse_format(description: dict[str, Any]) -> SampleFormat:
    """Return the format that a manifest describes; raises ValueError, TypeError or KeyError where it is wrong."""
    kind = description["kind"]
    _check_choice("kind", kind, *KINDS)
    values: dict[str, Any] = {key: value for key, value in description.items() if key != "kind"}
    if "classes" in values:
        values["classes"] = tuple(values["classes"])
    return KINDS[kind](**values)


def check_relative(path: str) -> str:
    """Return `path` if it stays in its folder, else raise DataError: a manifest must not lead to other files."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path or not parts.parts:
        raise DataError(f"the manifest names {path!r}, which is not a path inside its folder")
    return path


def check_count(value: Any) -> int:
    """Return `value` if it is a whole number from 0 on, else raise ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _check_fields(description: SampleFormat, may_be_negative: tuple[str, ...] = ()) -> None:
    """Check every field against its type; numbers are finite, and none is negative unless it is listed."""
    for field in fields(description):
        value = getattr(description, field.name)
        if field.name == "classes":
            if not all(isinstance(name, str) for name in value):
                raise ValueError(f"classes = {value!r} are not names")
            continue
        allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[str(field.type)]
        if not isinstance(value, allowed) or isinstance(value, bool) is not (field.type == "bool"):
            raise ValueError(f"{field.name} = {value!r} is not a value of type {field.type}")
        if not isinstance(value, str) and field.name not in may_be_negative and value < 0:
            raise ValueError(f"{field.name} = {value!r} is negative")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} = {value!r} is not finite")


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not {' or '.join(choices)}")
