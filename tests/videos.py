"""Video files of 25 frames that differ, 1 s, in the forms that cameras and programs write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 25


def gradient(frames: int = RATE, height: int = 48, width: int = 64) -> np.ndarray:
    """Return smooth frames `[F, H, W, 3]`: red grows by 8 with each frame, green to the right, blue downwards."""
    x, y = np.meshgrid(np.linspace(0, 100, width), np.linspace(0, 100, height))
    return np.stack([np.stack([x * 0 + 8 * i, x + 50, y + 50], axis=-1) for i in range(frames)]).astype(np.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def number_of(frame: np.ndarray) -> int:
    """Return which frame of `gradient` this is."""
    return round(frame[..., 0].mean() / 8)


def make_video(
    path: Path,
    codec: str = "libx264",
    b_frames: int = 2,
    pixel_aspect: Fraction | None = None,
    at: Sequence[int] = range(RATE),
) -> Path:
    """Write frames of `gradient` to a file with a key frame in every 6 frames and a start time that is not 0.

    They are shown `at` these 25ths of a second.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": "6", "bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, picture in zip(at, gradient(len(at)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + (0 if path.suffix == ".avi" else 50)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copied(source: Path, target: Path, skip: float = 0.0) -> Path:
    """Copy the packets of a video, as a program does that trims it without encoding: an edit list skips its start."""
    with av.open(str(source)) as given, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as copy:
        stream = given.streams.video[0]
        to = copy.add_stream_from_template(stream)
        start = int(skip / stream.time_base) + stream.start_time
        for packet in given.demux(stream):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, to
                copy.mux(packet)
    return target


def displayed(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Return an mp4 file whose pixels (x, y) are displayed at (a x + c y, b x + d y), up to a shift."""
    start = mp4.index(b"tkhd") + 44
    parts = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    return mp4[:start] + struct.pack(">9i", *parts) + mp4[start + 36 :]


def with_cover(mp4: bytes, jpeg: bytes) -> bytes:
    """Return an mp4 file with a cover picture as its first stream."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content) + 8) + kind + content

    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    covers = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + jpeg)))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + covers))
    moov, track = mp4.index(b"moov") - 4, mp4.index(b"trak") - 4
    size = struct.unpack(">I", mp4[moov : moov + 4])[0] + len(tags)
    assert mp4.index(b"mdat") < moov  # so that no frame moves
    return mp4[:moov] + struct.pack(">I", size) + mp4[moov + 4 : track] + tags + mp4[track:]
