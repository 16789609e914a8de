"""Videos are read as a player shows them, whatever program wrote them, and damage is named."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.video_files import VideoInfo, frames_at, probe
from tests.videos import RATE, copied, displayed, gradient, make_video, number_of, with_cover


def numbers_at(path: Path, times: list[float]) -> list[int]:
    """Return which frames of `gradient` are found at the times."""
    return [number_of(frame) for frame in frames_at(path, times, probe(path))]


# Transport streams have no index, so a seek can go too far; AVI stores no presentation times.
@pytest.mark.parametrize(
    ("suffix", "codec", "b_frames"),
    [
        ("mp4", "libx264", 2),
        ("ts", "libx264", 2),
        ("mpg", "mpeg2video", 2),
        ("webm", "libvpx", 0),
        ("avi", "libx264", 2),
        ("avi", "libx264", 0),
        ("avi", "mpeg4", 2),
        ("avi", "mpeg4", 0),
        ("h264", "libx264", 2),
    ],
)
def test_frames_are_those_shown_at_the_times(tmp_path: Path, suffix: str, codec: str, b_frames: int) -> None:
    video = make_video(tmp_path / f"video.{suffix}", codec, b_frames)
    info = probe(video)
    assert info.frames == RATE and info.last == pytest.approx((RATE - 1) / RATE)
    assert numbers_at(video, [i / RATE for i in range(RATE)]) == list(range(RATE))
    for times in ([0.0, 0.038, 0.04, 0.041, 0.5, 0.5, 0.96], [0.04], [0.7, 0.74], [0.96]):
        assert numbers_at(video, times) == [int(time * RATE + 0.01) for time in times]
    with pytest.raises(DataError, match=r"no frame at 1.100 s, the video ends at 1.000 s"):
        numbers_at(video, [0.0, 1.1])


def test_times_copied_from_avi_into_another_container_are_not_believed(tmp_path: Path) -> None:
    avi = make_video(tmp_path / "video.avi")
    video = copied(avi, tmp_path / "video.mp4")
    assert numbers_at(video, [i / RATE for i in range(RATE)]) == list(range(RATE))


@pytest.mark.parametrize(
    ("suffix", "codec", "b_frames"),
    [("mp4", "libx264", 2), *(("avi", codec, b_frames) for codec in ("libx264", "mpeg4") for b_frames in (0, 2))],
)
def test_times_of_a_variable_rate_are_kept(tmp_path: Path, suffix: str, codec: str, b_frames: int) -> None:
    at = [0, 1, 2, 6, 7, 8, 9, 15, 16, 21, 22, 23]
    video = make_video(tmp_path / f"screen.{suffix}", codec, b_frames, at=at)
    assert probe(video).last == pytest.approx(23 / RATE)
    assert numbers_at(video, [number / RATE for number in at]) == list(range(len(at)))
    assert numbers_at(video, [0.23, 0.24, 0.59, 0.83]) == [2, 3, 6, 8]


def test_two_frames_far_apart_keep_their_times(tmp_path: Path) -> None:
    """Too short for a frame in between, so that nothing tells whether the decoder reorders."""
    video = make_video(tmp_path / "screen.mp4", at=[0, 20])
    assert probe(video).last == pytest.approx(0.8)
    assert numbers_at(video, [0.0, 0.79, 0.8, 1.5]) == [0, 0, 1, 1]


@pytest.mark.parametrize("skip", [0.08, 0.32, 0.6])
def test_a_trimmed_video_starts_where_it_is_shown_to_start(tmp_path: Path, skip: float) -> None:
    """Cut between key frames, without encoding again: the packets before are there, to be decoded but not shown."""
    video = copied(make_video(tmp_path / "whole.mp4"), tmp_path / "trimmed.mp4", skip)
    first = round(skip * RATE)
    assert probe(video).last == pytest.approx((RATE - 1 - first) / RATE)
    assert numbers_at(video, [i / RATE for i in range(RATE - first)]) == list(range(first, RATE))
    assert numbers_at(video, [0.24]) == [first + 6]


def test_a_video_ends_where_its_edit_list_ends(tmp_path: Path) -> None:
    video = make_video(tmp_path / "video.mp4")
    data = bytearray(video.read_bytes())
    duration = data.index(b"elst") + 24  # of the second edit, in milliseconds; the first is the empty start
    data[duration : duration + 4] = struct.pack(">I", 600)
    video.write_bytes(data)
    assert probe(video).last == pytest.approx(14 / RATE)
    assert numbers_at(video, [0.0, 0.2, 14 / RATE]) == [0, 5, 14]


def test_a_recording_starts_at_the_first_frame_that_can_be_decoded(tmp_path: Path) -> None:
    video = make_video(tmp_path / "video.ts")
    video.write_bytes(video.read_bytes()[12 * 188 :])  # past the first key frame
    info = probe(video)
    assert (info.frames, info.last) == (RATE - 6, pytest.approx(18 / RATE))
    assert numbers_at(video, [0.0, 0.4, 18 / RATE]) == [6, 16, 24]


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    video = make_video(tmp_path / "video.mp4")
    video.write_bytes(with_cover(video.read_bytes(), encode_jpeg(gradient(9)[8])))
    with av.open(str(video)) as container:
        assert [stream.frames for stream in container.streams.video] == [0, RATE]
    assert numbers_at(video, [0.0, 0.5]) == [0, 12]
    assert probe(video).last == pytest.approx(0.96)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # as phones held upright write
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    ],
)
def test_frames_are_turned_as_they_are_displayed(tmp_path: Path, matrix: tuple, shown) -> None:  # type: ignore[type-arg, no-untyped-def]
    plain = make_video(tmp_path / "plain.mp4")
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(displayed(plain.read_bytes(), *matrix))
    (expected,) = frames_at(plain, [0.4], probe(plain))
    (found,) = frames_at(turned, [0.4], probe(turned))
    assert (found == shown(expected)).all() and number_of(found) == 10


@pytest.mark.parametrize(("aspect", "shape"), [(Fraction(2), (48, 128, 3)), (Fraction(3, 4), (64, 64, 3))])
def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, aspect: Fraction, shape: tuple[int, ...]) -> None:
    video = make_video(tmp_path / "video.mp4", pixel_aspect=aspect)
    (frame,) = frames_at(video, [0.4], probe(video))
    assert frame.shape == shape and number_of(frame) == 10
    corners = frame[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert np.abs(corners - gradient(11)[10][[0, 0, -1, -1], [0, -1, 0, -1]]).max() <= 8
    video.write_bytes(displayed(video.read_bytes(), 0, 1, -1, 0))
    (frame,) = frames_at(video, [0.4], probe(video))
    assert frame.shape == (shape[1], shape[0], 3)


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_damaged_frame_is_refused_where_it_is_wanted(tmp_path: Path, suffix: str) -> None:
    video = make_video(tmp_path / f"damaged.{suffix}")
    info = probe(video)
    data = bytearray(video.read_bytes())
    end = data.find(b"moov") % len(data)
    for offset in range(end * 3 // 4, end - 8, 16):
        data[offset] ^= 0xFF
    video.write_bytes(data)
    assert [number_of(frame) for frame in frames_at(video, [0.0, 0.2], info)] == [0, 5]
    with pytest.raises(DataError, match=r"damaged\.\w+: (damaged|unreadable) video"):
        list(frames_at(video, np.arange(0, 0.96, 0.04).tolist(), info))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(encode_clip(gradient(9), 0.04)[:-500])
    for name in ("gone.mp4", "empty.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(DataError, match=f"{name}: unreadable video"):
            probe(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: unreadable video"):
            list(frames_at(tmp_path / name, [0.0], VideoInfo(9, 0.32)))
    latin = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    latin.write_bytes(encode_clip(gradient(9), 0.04))
    assert probe(latin).frames == 9
    latin.write_text("no video")
    with pytest.raises(DataError, match=r"caf\\xe9.mp4: unreadable video"):
        probe(latin)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        aac = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(aac.encode(silence))
        container.mux(aac.encode())
    sound = (tmp_path / "sound.mp4").read_bytes()
    for content in (sound, with_cover(sound, encode_jpeg(gradient(1)[0]))):
        (tmp_path / "sound.mp4").write_bytes(content)
        with pytest.raises(DataError, match=r"sound.mp4: unreadable video \(no video stream\)"):
            probe(tmp_path / "sound.mp4")
