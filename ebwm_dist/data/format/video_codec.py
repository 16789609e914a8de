"""Decode the clips of shards; encode clips so that equal frames give equal bytes.

All frames are 8-bit RGB. F: frames of a clip; H, W: height and width. Clips are decoded whole: seeking in a video costs
more than all the rest, so it is done once, when clips are cut. What cannot be decoded raises a DataError that begins
with the name the caller gave.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from ebwm_dist.errors import DataError, UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_QUALITY = 90  # of JPEG
_PNG = b"\x89PNG"
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# One thread and no macroblock tree, which reads memory that it has not set: the bytes would change between calls.
_X264_PARAMS = "threads=1:mbtree=0:bframes=0:keyint=infinite:scenecut=0"
_X264 = {"crf": "18", "preset": "medium", "x264-params": _X264_PARAMS}


def decode_clip(data: bytes, name: str, backend: str = "auto") -> np.ndarray:
    """Return all frames `[F, H, W, 3]` of an encoded clip; `auto` is torchcodec where it can be imported."""
    torchcodec = None if backend == "pyav" else _optional("torchcodec.decoders")
    if torchcodec is None and backend == "torchcodec":
        raise UserError("torchcodec cannot be imported (it needs FFmpeg's libraries); use pyav, which needs nothing")
    if torchcodec is not None and not data.startswith(b"RIFF"):  # AVI, which it sorts by times that are not reliable
        with suppress(RuntimeError, ValueError, IndexError):  # of a trimmed clip, or a damaged one, which PyAV names
            decoder = torchcodec.VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
            if not decoder.metadata.rotation:  # which does not tell turned frames from mirrored ones
                return np.stack([frame.numpy() for frame in decoder])
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1  # a clip is too short to share; loaders have processes instead
            decoded = list(container.decode(stream))
        if any(frame.is_corrupt for frame in decoded):  # FFmpeg fills damaged parts in with their surroundings
            raise ValueError("a damaged frame")
        return np.stack([to_rgb(frame) for frame in decoded])
    except (FFmpegError, RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{name}: unreadable video ({one_line(error)})") from None


def decode_images(images: Sequence[bytes], name: str) -> np.ndarray:
    """Return JPEG or PNG images of one size as frames `[F, H, W, 3]`."""
    frames = []
    for number, image in enumerate(images):
        try:
            frames.append(_decode_image(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name}: unreadable JPEG or PNG image {number} ({one_line(error)})") from None
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
    return _encode_image(frame, "JPEG", quality=_QUALITY)


def encode_png(frame: np.ndarray) -> bytes:
    """Return one frame `[H, W, 3]` as a PNG image, without loss."""
    return _encode_image(frame, "PNG")


def _encode_image(frame: np.ndarray, file_format: str, **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, file_format, **options)
    return buffer.getvalue()


def video_stream(container: InputContainer) -> VideoStream:
    """Return the video stream that a player would show, never a cover picture or thumbnails."""
    streams = [s for s in container.streams.video if not s.disposition & _PICTURES]
    if not streams:
        raise ValueError("no video stream")
    best = container.streams.best("video")
    return next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])


def to_rgb(frame: av.VideoFrame, pixel_aspect: float = 1.0) -> np.ndarray:
    """Return a frame `[H, W, 3]` turned and mirrored as its display matrix says.

    `pixel_aspect` is width / height of its pixels; the shorter side is stretched until they are square.
    """
    size: dict[str, Any] = {}
    if pixel_aspect != 1:
        width, height = round(frame.width * max(pixel_aspect, 1.0)), round(frame.height / min(pixel_aspect, 1.0))
        size = {"width": width, "height": height, "interpolation": "BICUBIC"}
    array: np.ndarray = frame.to_ndarray(format="rgb24", **size)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # A stored pixel (x, y) is displayed at (a x + c y, b x + d y), up to a shift.
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
        turned = abs(a) < abs(b)
        across, down = (c, b) if turned else (a, d)
        array = array.swapaxes(0, 1) if turned else array
        array = array[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
    return np.ascontiguousarray(array)


def _decode_image(image: bytes) -> np.ndarray:
    if not image.startswith(_PNG) and (simplejpeg := _optional("simplejpeg")) is not None:
        array: np.ndarray = simplejpeg.decode_jpeg(image, colorspace="RGB")
        return array
    from PIL import Image

    with Image.open(io.BytesIO(image), formats=["JPEG", "PNG"]) as opened:
        return np.asarray(opened.convert("RGB"))


@lru_cache
def _optional(name: str) -> Any:
    """Import a library that may be missing, or unable to load beside this system's FFmpeg: then None."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def one_line(error: Exception) -> str:
    """Return the message of an error, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
