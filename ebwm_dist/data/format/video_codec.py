"""Decode the clips of shards, and video files at given times; encode clips so that equal frames give equal bytes.

All frames are 8-bit RGB. F: frames of a clip; H, W: height and width. Whole clips are decoded: seeking inside a video
costs more than all the rest, so it is done once, when clips are cut (`cutting.py`). What cannot be decoded raises a
DataError that begins with the name the caller gave.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from ebwm_dist.errors import DataError, UserError

BACKENDS = ("auto", "pyav", "torchcodec")

_TOLERANCE = 1e-3  # seconds by which a wanted time may lie before the frame that is meant
_QUALITY = 90  # of JPEG
_X264 = {"crf": "18", "preset": "medium", "x264-params": "threads=1:bframes=0:keyint=infinite:scenecut=0"}


@dataclass(frozen=True)
class VideoInfo:
    """What the packets of a video file say: size in pixels, number of frames, and seconds until its last one."""

    height: int
    width: int
    frames: int
    last: float


def decode_clip(data: bytes, name: str, backend: str = "auto") -> np.ndarray:
    """Return all frames `[F, H, W, 3]` of an encoded clip; `auto` is torchcodec where it can be imported."""
    decoder = _torchcodec() if backend == "torchcodec" or (backend == "auto" and _has_torchcodec()) else None
    try:
        if decoder is not None:
            frames = list(decoder(data, dimension_order="NHWC", num_ffmpeg_threads=1))
            return np.stack([frame.numpy() for frame in frames])
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a clip is too short to share; loaders have processes instead
            decoded = list(container.decode(stream))
        if any(frame.is_corrupt for frame in decoded):  # FFmpeg fills damaged parts in with their surroundings
            raise ValueError("a damaged frame")
        return np.stack([_rgb(frame) for frame in decoded])
    except (FFmpegError, RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{name}: unreadable video ({_one_line(error)})") from None


def decode_jpegs(images: Sequence[bytes], name: str) -> np.ndarray:
    """Return JPEG images of one size as frames `[F, H, W, 3]`."""
    frames = []
    for number, image in enumerate(images):
        try:
            frames.append(_decode_jpeg(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name}: unreadable JPEG image {number} ({_one_line(error)})") from None
        if frames[-1].shape != frames[0].shape:
            raise DataError(f"{name}: image {number} is not of the size of the first")
    return np.stack(frames)


def encode_clip(frames: np.ndarray, frame_interval: float) -> bytes:
    """Return frames `[F, H, W, 3]` as an H.264 mp4 file, the same bytes each time: one thread, no dates, no tags."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"clips of {height} x {width} cannot be stored as mp4: height and width must be even; use jpeg")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        rate = 1 / Fraction(frame_interval).limit_denominator(10_000)
        stream = container.add_stream("libx264", rate=rate, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Return one frame `[H, W, 3]` as a JPEG image, by the one encoder that is always there."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def probe(path: Path) -> VideoInfo:
    """Read size and length of a video file from its packets, which needs no decoding and trusts no header."""
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            last = float((max(times) - min(times)) * stream.time_base)
            return VideoInfo(stream.codec_context.height, stream.codec_context.width, len(times), last)
    except (FFmpegError, OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: unreadable video ({_one_line(error)})") from None


def frames_at(path: Path, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield the frame `[H, W, 3]` that is shown at each of the ascending `times`, in seconds from the first frame.

    The file is read once, from the last key frame before the first time on.
    """
    try:
        yield from _pick(path, _spans(path, times[0] if times else 0.0), times)
    except DataError:
        raise
    except (FFmpegError, OSError, IndexError, ValueError) as error:
        raise DataError(f"{path}: unreadable video ({_one_line(error)})") from None


def _pick(path: Path, spans: Iterator[tuple[av.VideoFrame, float]], times: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield a picture for each time: that of the frame whose span it lies in."""
    wanted = iter(times)
    time = next(wanted, None)
    until = -1.0
    for frame, until in spans:
        picture: np.ndarray | None = None
        while time is not None and time + _TOLERANCE < until:
            if frame.is_corrupt:
                raise DataError(f"{path}: damaged video, the frame at {time:.3f} s is corrupt")
            picture = _rgb(frame) if picture is None else picture
            yield picture
            time = next(wanted, None)
        if time is None:
            return
    if time is not None:
        raise DataError(f"{path}: no frame at {time:.3f} s, the last one is before {max(until, 0.0):.3f} s")


def _spans(path: Path, start: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield the frames, from that at `start` or an earlier one on, each with the time of the next in seconds."""
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type = "AUTO"
        if start > 0:
            container.seek(int((start + _TOLERANCE) / stream.time_base) + (stream.start_time or 0), stream=stream)
        shown = None
        for frame in container.decode(stream):
            time = _seconds(frame, stream)
            if shown is not None:
                yield shown, time
            elif 0 < start < time - _TOLERANCE:
                break  # too far: some files have no index to seek by
            shown = frame
        if shown is not None:
            yield shown, _seconds(shown, stream) + 2 * _TOLERANCE
            return
    if start > 0:
        yield from _spans(path, 0.0)


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    array: np.ndarray = frame.to_ndarray(format="rgb24")
    return array


def _seconds(frame: av.VideoFrame, stream: Any) -> float:
    """Return when a frame is shown, in seconds from the first."""
    if frame.pts is None:
        raise ValueError("a frame without a time")
    return float((frame.pts - (stream.start_time or 0)) * stream.time_base)


def _decode_jpeg(image: bytes) -> np.ndarray:
    if (simplejpeg := _optional("simplejpeg")) is not None:
        array: np.ndarray = simplejpeg.decode_jpeg(image, colorspace="RGB")
        return array
    from PIL import Image

    with Image.open(io.BytesIO(image), formats=["JPEG"]) as opened:
        return np.asarray(opened.convert("RGB"))


@lru_cache
def _optional(name: str) -> Any:
    """Import a library that may be missing, or unable to load beside this system's FFmpeg: then None."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def _has_torchcodec() -> bool:
    return _optional("torchcodec.decoders") is not None


def _torchcodec() -> Any:
    if not _has_torchcodec():
        raise UserError("torchcodec cannot be imported (it needs FFmpeg's libraries); use pyav, which needs nothing")
    return _optional("torchcodec.decoders").VideoDecoder


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
