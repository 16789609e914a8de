"""What is encoded comes back, files are read at the times asked for, and damage is named."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from ebwm_dist.data.format import video_codec as decode
from ebwm_dist.data.format.video_codec import decode_clip, decode_jpegs, encode_clip, encode_jpeg, frames_at, probe
from ebwm_dist.errors import DataError, UserError

RATE = 25


def gradient(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return smooth frames `[F, H, W, 3]`, whose red channel is lighter by 8 in each frame."""
    x, y = np.meshgrid(np.linspace(0, 100, width), np.linspace(0, 100, height))
    return np.stack([np.stack([x * 0 + 8 * i, x + 50, y + 50], axis=-1) for i in range(frames)]).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """Return which frame of `gradient` this is."""
    return round(frame[..., 0].mean() / 8)


@pytest.fixture(scope="module", params=["mp4", "ts"])
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 25 frames, 1 s, with reordered frames, several key frames and a start time that is not 0.

    Files of transport streams have no index, so a seek can go too far.
    """
    path = tmp_path_factory.mktemp("video") / f"gradient.{request.param}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": "6", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, picture in enumerate(gradient(RATE)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + 50
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("backend", ["pyav", "torchcodec", "auto"])
def test_a_clip_comes_back_in_the_same_bytes_each_time(backend: str) -> None:
    if backend == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=Exception)
    frames = gradient(9)
    data = encode_clip(frames, 0.12)
    assert data == encode_clip(frames, 0.12)
    decoded = decode_clip(data, "clip", backend)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - frames).mean() < 2
    with av.open(io.BytesIO(data)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(1 / 0.12)


@pytest.mark.parametrize("library", ["simplejpeg", "PIL"])
def test_jpegs_come_back_through_either_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decode, "_optional", lambda name: None)
    frames = gradient(3)
    images = [encode_jpeg(frame) for frame in frames]
    assert np.abs(decode_jpegs(images, "clip").astype(int) - frames).max() <= 6
    for damaged in (b"", b"not an image", images[0][: len(images[0]) // 2]):
        with pytest.raises(DataError, match="key 7: unreadable JPEG image 1 "):
            decode_jpegs([images[0], damaged], "key 7")
    with pytest.raises(DataError, match="image 1 is not of the size"):
        decode_jpegs([images[0], encode_jpeg(frames[0, :24])], "key 7")


def test_damaged_clips_are_named() -> None:
    data = encode_clip(gradient(9), 0.12)
    payload = data.index(b"mdat") + 4
    flipped = bytearray(data)
    flipped[data.index(b"moov") - 60] ^= 0xFF  # in a late frame: FFmpeg alone would fill it in and say nothing
    for damaged in (b"", b"no video at all", data[: len(data) // 2], data[:payload], bytes(flipped)):
        with pytest.raises(DataError, match="train-0, key 5: unreadable video"):
            decode_clip(damaged, "train-0, key 5", "pyav")


def test_frames_are_those_shown_at_the_times(video: Path) -> None:
    info = probe(video)
    assert (info.height, info.width, info.frames) == (48, 64, RATE)
    assert info.last == pytest.approx((RATE - 1) / RATE)
    for times in ([0.0, 0.038, 0.04, 0.041, 0.5, 0.5, info.last], [0.04], [0.7, 0.74], [info.last]):
        found = [number_of(frame) for frame in frames_at(video, times)]
        assert found == [int(time * RATE + 0.01) for time in times]
    with pytest.raises(DataError, match=r"no frame at 1.100 s, the last one is before 0.962 s"):
        list(frames_at(video, [0.0, 1.1]))


def test_a_damaged_frame_is_refused_where_it_is_wanted(video: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    data = bytearray(video.read_bytes())
    end = data.find(b"moov") % len(data)
    for offset in range(end * 3 // 4, end - 8, 16):
        data[offset] ^= 0xFF
    damaged.write_bytes(data)
    assert [number_of(frame) for frame in frames_at(damaged, [0.0, 0.2])] == [0, 5]
    with pytest.raises(DataError, match="damaged: (damaged|unreadable) video"):
        list(frames_at(damaged, np.arange(0, 0.96, 0.04).tolist()))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(encode_clip(gradient(9), 0.04)[:-500])
    for name in ("gone.mp4", "empty.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(DataError, match=f"{name}: unreadable video"):
            probe(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: unreadable video"):
            list(frames_at(tmp_path / name, [0.0]))


def test_odd_sizes_and_missing_backends_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="47 x 64 cannot be stored as mp4"):
        encode_clip(gradient(2)[:, :47], 0.1)
    monkeypatch.setattr(decode, "_optional", lambda name: None)
    with pytest.raises(UserError, match="torchcodec cannot be imported"):
        decode_clip(b"", "clip", "torchcodec")
