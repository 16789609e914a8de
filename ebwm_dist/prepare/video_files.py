"""Read video files: how long they are, and the frames that a player would show at given times.

Times are seconds from the first frame. Frames are as displayed: turned as the file's display matrix says, and with
square pixels (where they are not square, their shorter side is stretched).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from ebwm_dist.data.format.video_codec import one_line, to_rgb, video_stream
from ebwm_dist.errors import DataError
from ebwm_dist.files import printable

_TOLERANCE = 1e-3  # seconds by which a time may lie before the frame that is meant


@dataclass(frozen=True)
class VideoInfo:
    """Length of a video: number of frames, time of the last from the first, and of the first on the stream's clock.

    `times` are those of all frames, from the first on, if the times in the file cannot be relied on.
    """

    frames: int
    last: float
    start: float = 0.0
    times: tuple[float, ...] | None = None

    @property
    def interval(self) -> float:
        """Return the mean time between two frames in seconds."""
        return self.last / max(self.frames - 1, 1)


def probe(path: Path) -> VideoInfo:
    """Read the length of a video file from its packets; only the first frame is decoded."""
    with _named_errors(path), av.open(str(path)) as container:
        stream: Any = video_stream(container)
        stored: list[int | None] = []
        first = None
        for packet in container.demux(stream):
            # Packets are marked to be discarded where a file was trimmed between two key frames.
            if packet.size and not packet.is_discard:
                stored.append(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise ValueError("no frame can be decoded")
        shown = [pts for pts in stored if pts is not None and first.pts is not None and pts >= first.pts]
        # AVI numbers frames in the order of decoding, which differs from that of showing where there are B-frames.
        # Some programs keep these numbers in other containers: then they ascend although the decoder reorders.
        reordered = stream.codec_context.has_b_frames and (container.format.name == "avi" or shown == sorted(shown))
        shown.sort()
        if None in stored or first.pts is None:
            times = [float(number / stream.guessed_rate) for number in range(len(stored))]
        elif reordered or container.format.name == "mpeg":  # in which frames get wrong times after a seek
            times = [float((pts - first.pts) * stream.time_base) for pts in shown]
        else:
            last = float((shown[-1] - first.pts) * stream.time_base)
            return VideoInfo(len(shown), last, float(first.pts * stream.time_base))
        return VideoInfo(len(times), times[-1], times=tuple(times))


def frames_at(path: Path, times: Sequence[float], info: VideoInfo) -> Iterator[np.ndarray]:
    """Yield the frame `[H, W, 3]` that is shown at each of the ascending `times`; `info` is what `probe` returned.

    The file is read once, from the last key frame before the first time on; from its start if `info` lists times.
    """
    wanted = iter(times)
    time = next(wanted, None)
    end = 0.0
    with _named_errors(path):
        for frame, end, pixel_aspect in _spans(path, times[0] if times else 0.0, info):
            picture: np.ndarray | None = None
            while time is not None and time + _TOLERANCE < end:
                if frame.is_corrupt:
                    raise DataError(f"{printable(path)}: damaged video, the frame at {time:.3f} s is corrupt")
                picture = to_rgb(frame, pixel_aspect) if picture is None else picture
                yield picture
                time = next(wanted, None)
            if time is None:
                return
    if time is not None:
        raise DataError(f"{printable(path)}: no frame at {time:.3f} s, the video ends at {end:.3f} s")


def _spans(path: Path, start: float, info: VideoInfo) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Yield frames, from that at `start` or an earlier one on, each with the time of the next and its pixel aspect."""
    with av.open(str(path)) as container:
        stream: Any = video_stream(container)
        stream.thread_type = "AUTO"
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        seeks = start > 0 and info.times is None
        if seeks:
            container.seek(int((info.start + start + _TOLERANCE) / stream.time_base), stream=stream)
        shown, time = None, 0.0
        for number, frame in enumerate(container.decode(stream)):
            time = _time(frame, number, stream, info)
            if shown is not None:
                yield shown, time, pixel_aspect
            elif seeks and start < time - _TOLERANCE:
                break  # too far: some files have no index to seek by
            shown = frame
        if shown is not None:
            yield shown, time + max(info.interval, 2 * _TOLERANCE), pixel_aspect
            return
    if seeks:
        yield from _spans(path, 0.0, info)


def _time(frame: av.VideoFrame, number: int, stream: Any, info: VideoInfo) -> float:
    """Return when a frame is shown; `number` counts the frames from where reading began."""
    if info.times is not None:  # one that is read beyond the packets that were counted follows at once
        return info.times[min(number, len(info.times) - 1)]
    if frame.pts is None:
        raise ValueError("a frame without a time")
    return float(frame.pts * stream.time_base) - info.start


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Raise a DataError that names the file for every error of reading it."""
    try:
        yield
    except DataError:
        raise
    except (FFmpegError, OSError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"{printable(path)}: unreadable video ({one_line(error)})") from None
