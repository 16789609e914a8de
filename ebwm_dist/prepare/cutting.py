"""Cut videos into clips: find the files, assign clips to splits, read their frames.

A clip is F frames `frame_interval` seconds apart; clips of a video start `stride` seconds apart and may overlap. Held
out are whole videos, or the last part of every video. A gap before that part is in neither split, because neighbouring
frames are nearly equal.

Shapes: C clips, F frames of a clip, U different frames, H x W pixels.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.documents import is_held_out
from ebwm_dist.prepare.listing import InputFile, list_named_inputs
from ebwm_dist.prepare.video_files import VideoInfo, frames_at, probe

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")

_DIGITS = 6  # times are rounded to microseconds, so that clips which share a frame have an equal time


@dataclass(frozen=True)
class Cut:
    """How videos are cut into clips, and which of them are held out."""

    frames: int
    frame_interval: float
    stride: float
    height: int
    width: int
    crop: str = "center"
    min_length: float = 0.0
    holdout: tuple[str, ...] = ()
    holdout_fraction: float = 0.0
    holdout_last: float = 0.0
    gap: float = 1.0

    @property
    def span(self) -> float:
        """Return the seconds from the first to the last frame of a clip."""
        return (self.frames - 1) * self.frame_interval


@dataclass(frozen=True)
class Video(InputFile):
    """A video file, its SHA-256 and its length."""

    sha256: str
    info: VideoInfo


@dataclass(frozen=True)
class Clip:
    """A clip of a video, from `start` seconds after its first frame on."""

    video: Video
    start: float


@dataclass(frozen=True)
class Reject:
    """A video that cannot be read, or some clips of it: all of a shard."""

    file: str
    clips: int | None
    reason: str


@dataclass
class Rejects:
    """Lists videos that cannot be read if `on_error` is "skip"; else the first is a DataError."""

    on_error: str
    listed: list[Reject] = field(default_factory=list)

    def add(self, error: DataError, file: str, clips: int | None = None) -> None:
        """List a video, or a number of its clips."""
        if self.on_error == "fail":
            raise DataError(f"{error}; replace it, or leave it out with --on-error skip") from None
        self.listed.append(Reject(file, clips, str(error)))


def find_videos(inputs: Sequence[str | Path], outputs: Sequence[Path], cut: Cut) -> list[InputFile]:
    """List the videos among `inputs`, files or folders; names must differ. The tool writes `outputs`."""
    found = list_named_inputs(inputs, SUFFIXES, outputs)
    names = [file.name for file in found]
    if missing := sorted(set(cut.holdout) - set(names)):
        raise UserError(f"held-out video {missing[0]!r} is not in the input; its videos are {', '.join(names[:8])}")
    return found


def probe_videos(files: Iterable[InputFile], hashes: Iterable[str], rejects: Rejects) -> list[Video]:
    """Return those videos that can be read, with their lengths."""
    videos = []
    for file, sha256 in zip(files, hashes, strict=True):
        try:
            videos.append(Video(file.name, file.path, sha256, probe(file.path)))
        except DataError as error:
            rejects.add(error, file.name)
    return videos


def plan_clips(videos: Iterable[Video], cut: Cut) -> tuple[dict[str, list[Clip]], list[str]]:
    """Return the clips of each split, in the order of the videos, and the names of videos that are too short."""
    clips: dict[str, list[Clip]] = {"train": [], "val": []}
    short = []
    for video in videos:
        last = video.info.last
        if is_held_out(video.name, frozenset(cut.holdout), cut.holdout_fraction):
            parts = {"val": (0.0, last)}
        elif cut.holdout_last > 0:
            border = last - cut.holdout_last
            parts = {"train": (0.0, border - cut.gap), "val": (max(border, 0.0), last)}
        else:
            parts = {"train": (0.0, last)}
        made = 0
        for split, (start, end) in parts.items() if last >= cut.min_length else ():
            starts = _starts(start, end, cut)
            clips[split] += [Clip(video, start) for start in starts]
            made += len(starts)
        if not made:
            short.append(video.name)
    for split in clips:
        if not clips[split]:
            raise UserError(
                f"no clip of {cut.span:.2f} s is left for the {split} split: change --holdout, --holdout-fraction or "
                "--holdout-last, take fewer --frames or a smaller --frame-interval"
            )
    return clips, short


def _starts(start: float, end: float, cut: Cut) -> list[float]:
    """Return where the clips start that lie within `start` and `end`, `stride` apart."""
    count = int((end - start - cut.span) / cut.stride + 1e-6) + 1 if end - start >= cut.span - 1e-6 else 0
    return [round(start + number * cut.stride, _DIGITS) for number in range(count)]


def read_frames(video: Video, starts: Sequence[float], cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Read the clips of a video that begin at the ascending `starts`, each frame once.

    Returns the different frames `[U, H, W, 3]`, and for each clip which of them are its own, `[C, F]`.
    """
    times = np.round(np.asarray(starts)[:, None] + np.arange(cut.frames) * cut.frame_interval, _DIGITS)
    different, index = np.unique(times, return_inverse=True)
    read = frames_at(video.path, different.tolist(), video.info)
    return np.stack([resize(frame, cut.height, cut.width, cut.crop) for frame in read]), index.reshape(times.shape)


def resize(frame: np.ndarray, height: int, width: int, crop: str) -> np.ndarray:
    """Return a frame `[H', W', 3]` at `height` x `width`: the largest `center` part of that shape, or all of it."""
    rows, columns = frame.shape[:2]
    box = (0.0, 0.0, float(columns), float(rows))
    if crop == "center":
        scale = min(rows / height, columns / width)
        down, across = (rows - scale * height) / 2, (columns - scale * width) / 2
        box = (across, down, columns - across, rows - down)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


def size_argument(text: str) -> tuple[int, int]:
    """Parse `64` or `96x128` as height and width, for a tool."""
    match = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 64 or 96x128 (height x width)")
    return int(match[1]), int(match[2] or match[1])
