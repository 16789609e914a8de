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
        stored: list[tuple[int | None, int | None]] = []
        first, needed = None, 0
        for packet in container.demux(stream):
            # Packets are marked to be discarded where a file was trimmed between two key frames.
            if packet.size and not packet.is_discard:
                stored.append((packet.pts, packet.dts))
            if first is None:
                first, needed = next(iter(packet.decode()), None), len(stored)
        if first is None:
            raise ValueError("no frame can be decoded")
        if first.pts is None or any(pts is None for pts, _ in stored):
            times = [float(number / stream.guessed_rate) for number in range(len(stored))]
            return VideoInfo(len(times), times[-1], times=tuple(times))
        kept: list[Any] = [(pts, dts) for pts, dts in stored if pts is not None and pts >= first.pts]
        shown = [pts for pts, _ in kept]
        # Some programs keep times of AVI in other containers: then they ascend although the decoder reorders.
        avi = container.format.name == "avi"
        reordered = stream.codec_context.has_b_frames and (avi or shown == sorted(shown))
        own = [float((pts - first.pts) * stream.time_base) for pts in sorted(shown)]
        times = own
        if avi:
            ticks = _shown_in_avi([dts for _, dts in kept], max(0, needed - 1 - (len(stored) - len(kept))))
            times = [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
        # In MPEG program streams frames get wrong times after a seek.
        if reordered or times != own or container.format.name == "mpeg":
            return VideoInfo(len(times), times[-1], times=tuple(times))
        return VideoInfo(len(times), times[-1], float(first.pts * stream.time_base))


def _shown_in_avi(decoded: Sequence[int], delay: int) -> list[int]:
    """Return when frames are shown that are decoded at `decoded`, the only times that AVI stores.

    With B-frames the decoder returns its first frame after `delay` more packets, and all others as late. When the last
    ones are shown is not stored: they follow at once.
    """
    return [*decoded[delay:], *range(decoded[-1] + 1, decoded[-1] + 1 + delay)]


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
