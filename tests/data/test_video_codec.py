"""What is encoded comes back, clips of other programs are decoded as they are shown, and damage is named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from ebwm_dist.data.format import video_codec
from ebwm_dist.data.format.video_codec import decode_clip, decode_images, encode_clip, encode_jpeg
from ebwm_dist.errors import DataError, UserError
from tests.videos import copied, displayed, gradient, make_video, number_of, with_cover

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["pyav", "torchcodec"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that can be imported."""
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=Exception)
    return request.param


def test_a_clip_comes_back_in_the_same_bytes_each_time(backend: str) -> None:
    frames = gradient(9)
    data = encode_clip(frames, 0.12)
    assert data == encode_clip(frames, 0.12)
    decoded = decode_clip(data, "clip", backend)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - frames).mean() < 2
    with av.open(io.BytesIO(data)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(1 / 0.12)


_ENCODE = """
import hashlib
from ebwm_dist.data.format.video_codec import encode_clip
from ebwm_dist.prepare.moving_shapes import moving_shapes
print([hashlib.sha256(encode_clip(moving_shapes(seed, 8, 224, 224), 0.08)).hexdigest() for seed in (0, 1)])
"""


def test_bytes_do_not_depend_on_what_was_in_memory() -> None:
    """MALLOC_PERTURB_ fills new memory; x264's macroblock tree is sensitive to it."""
    found = set()
    for fill in ("0", "1"):
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        command = [sys.executable, "-c", _ENCODE]
        found.add(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True, text=True).stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    "name", ["video.mp4", "xvid.avi", "h264.avi", "trimmed.mp4", "upright.mp4", "mirrored.mp4", "cover.mp4"]
)
def test_clips_of_other_programs_are_decoded_as_they_are_shown(tmp_path: Path, backend: str, name: str) -> None:
    clip, plain = tmp_path / name, make_video(tmp_path / "plain.mp4")
    expected = decode_clip(plain.read_bytes(), "plain", "pyav")
    if name == "trimmed.mp4":
        copied(plain, clip, skip=0.32)
        expected = expected[8:]
    elif name == "upright.mp4":
        clip.write_bytes(displayed(plain.read_bytes(), 0, 1, -1, 0))
        expected = np.rot90(expected, -1, axes=(1, 2))
    elif name == "mirrored.mp4":
        clip.write_bytes(displayed(plain.read_bytes(), -1, 0, 0, 1))
        expected = expected[:, :, ::-1]
    elif name == "cover.mp4":
        clip.write_bytes(with_cover(plain.read_bytes(), encode_jpeg(gradient(9)[8])))
    else:
        make_video(clip, "mpeg4" if name == "xvid.avi" else "libx264")
    found = decode_clip(clip.read_bytes(), name, backend)
    assert found.shape == expected.shape
    assert [number_of(frame) for frame in found] == [number_of(frame) for frame in expected]
    assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("library", ["simplejpeg", "PIL"])
def test_jpegs_come_back_through_either_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(video_codec, "_optional", lambda name: None)
    frames = gradient(3)
    images = [encode_jpeg(frame) for frame in frames]
    assert np.abs(decode_images(images, "clip").astype(int) - frames).max() <= 6
    for damaged in (b"", b"not an image", images[0][: len(images[0]) // 2]):
        with pytest.raises(DataError, match="key 7: unreadable JPEG or PNG image 1 "):
            decode_images([images[0], damaged], "key 7")
    with pytest.raises(DataError, match="image 1 is not of the size"):
        decode_images([images[0], encode_jpeg(frames[0, :24])], "key 7")


def test_damaged_clips_are_named(backend: str) -> None:
    data = encode_clip(gradient(9), 0.12)
    payload = data.index(b"mdat") + 4
    flipped = bytearray(data)
    flipped[data.index(b"moov") - 60] ^= 0xFF  # in a late frame: FFmpeg alone fills it in silently, so does torchcodec
    more = [bytes(flipped)] if backend == "pyav" else []
    for damaged in (b"", b"no video at all", data[: len(data) // 2], data[:payload], *more):
        with pytest.raises(DataError, match="train-0, key 5: unreadable video"):
            decode_clip(damaged, "train-0, key 5", backend)


def test_odd_sizes_and_missing_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="47 x 64 cannot be stored as mp4"):
        encode_clip(gradient(2)[:, :47], 0.1)
    monkeypatch.setattr(video_codec, "_optional", lambda name: None)
    with pytest.raises(UserError, match="torchcodec cannot be imported"):
        decode_clip(b"", "clip", "torchcodec")
