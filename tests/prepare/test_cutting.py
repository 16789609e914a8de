"""Which clips a video yields, where they go, and that their frames are the video's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ebwm_dist.data.format.video_codec import encode_clip
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.cutting import Cut, Rejects, Video, find_videos, plan_clips, probe_videos, read_frames, resize
from ebwm_dist.prepare.listing import InputFile
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.prepare.video_files import VideoInfo, frames_at, probe


def cut(**changes: object) -> Cut:
    settings = {"frames": 3, "frame_interval": 0.1, "stride": 0.1, "height": 16, "width": 16, **changes}
    return Cut(**settings)  # type: ignore[arg-type]


def videos(*lengths: float) -> list[Video]:
    """Return videos that last as long."""
    return [Video(f"v{i}.mp4", Path(f"v{i}.mp4"), "", VideoInfo(10, last)) for i, last in enumerate(lengths)]


def test_clips_of_a_video_are_a_stride_apart_and_end_within_it() -> None:
    clips, short = plan_clips(videos(0.5, 1.0, 0.15), cut(holdout=("v0.mp4",), stride=0.3))
    assert [(c.video.name, c.start) for c in clips["train"]] == [("v1.mp4", 0.0), ("v1.mp4", 0.3), ("v1.mp4", 0.6)]
    assert [(c.video.name, c.start) for c in clips["val"]] == [("v0.mp4", 0.0), ("v0.mp4", 0.3)]
    assert short == ["v2.mp4"]
    clips, short = plan_clips(videos(0.5, 1.0, 0.8), cut(holdout=("v1.mp4",), min_length=0.7))
    assert {c.video.name for c in clips["train"]} == {"v2.mp4"} and short == ["v0.mp4"]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.floats(0.1, 20), min_size=1, max_size=4),
    interval=st.floats(0.01, 1),
    stride=st.floats(0.02, 2),
    last=st.floats(0.5, 5),
    gap=st.floats(0, 2),
)
def test_held_out_ends_are_a_gap_away_from_all_that_is_trained_on(
    lengths: list[float], interval: float, stride: float, last: float, gap: float
) -> None:
    chosen = cut(frame_interval=interval, stride=stride, holdout_last=last, gap=gap)
    given_videos = videos(*lengths, 30.0)
    try:
        clips, short = plan_clips(given_videos, chosen)
    except UserError:
        assume(False)
    for video in given_videos:
        starts = {split: [c.start for c in clips[split] if c.video.name == video.name] for split in clips}
        ends = [start + chosen.span for start in [*starts["train"], *starts["val"]]]
        assert all(0 <= end <= video.info.last + 1e-5 for end in ends)
        assert (not ends) == (video.name in short)
        if starts["train"] and starts["val"]:
            assert min(starts["val"]) - max(starts["train"]) - chosen.span >= gap - 1e-5
        if starts["val"]:
            assert min(starts["val"]) >= video.info.last - last - 1e-5


def test_impossible_splits_are_refused() -> None:
    for wrong, message in (
        (cut(holdout=("v0.mp4", "v1.mp4")), "no clip of 0.20 s is left for the train split"),
        (cut(), "left for the val split"),
        (cut(holdout_last=0.5, gap=5.0), "left for the train split"),
    ):
        with pytest.raises(UserError, match=message):
            plan_clips(videos(1.0, 1.0), wrong)


def test_frames_are_those_of_the_file_each_read_once(tmp_path: Path) -> None:
    path = tmp_path / "shapes.mp4"
    path.write_bytes(encode_clip(moving_shapes(0, 25, 48, 64), 0.04))
    settings = cut(frame_interval=0.08, stride=0.04, height=24, width=32)
    starts = [0.2, 0.24, 0.28]
    video = Video(path.name, path, "", probe(path))
    frames, index = read_frames(video, starts, settings)
    assert frames.shape == (7, 24, 32, 3) and index.shape == (3, 3)  # two of the nine are shared
    expected = list(frames_at(path, [i * 0.04 for i in range(25)], video.info))
    for start, chosen in zip(starts, index, strict=True):
        numbers = [round(start / 0.04) + 2 * i for i in range(3)]
        assert (frames[chosen] == [resize(expected[n], 24, 32, "center") for n in numbers]).all()


def test_the_center_keeps_the_shape_and_none_squeezes() -> None:
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, 20:60] = 200  # the middle square
    assert (resize(frame, 20, 20, "center")[:, 2:-2] == 200).all()  # the filter looks beyond the edges
    squeezed = resize(frame, 20, 20, "none")
    assert (squeezed[:, 7:13] == 200).all() and (squeezed[:, :3] == 0).all()
    assert resize(frame, 40, 20, "center").shape == (40, 20, 3)


def test_inputs_are_found_in_order_and_refused_by_name(tmp_path: Path) -> None:
    clip = encode_clip(moving_shapes(0, 5, 16, 16), 0.04)
    for name in ("b/x.mp4", "a.mp4", "b/y.MP4", "other/a.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(clip)
    (tmp_path / "in" / "notes.txt").touch()
    found = find_videos([tmp_path / "in"], (), cut())
    assert [video.name for video in found] == ["a.mp4", "b/x.mp4", "b/y.MP4", "other/a.mp4"]
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        (["gone.mp4"], "gone.mp4 does not exist"),
        ([tmp_path / "empty"], "holds no .mp4, .mkv"),
        ([tmp_path / "in" / "a.mp4", tmp_path / "in" / "other" / "a.mp4"], "have the same name"),
    ):
        with pytest.raises(UserError, match=message):
            find_videos(inputs, (), cut())
    with pytest.raises(UserError, match="'x.mp4' is not in the input; its videos are a.mp4, b/x.mp4"):
        find_videos([tmp_path / "in"], (), cut(holdout=("x.mp4",)))


def test_videos_that_cannot_be_read_are_an_error_or_rejects(tmp_path: Path) -> None:
    clip = encode_clip(moving_shapes(0, 5, 16, 16), 0.04)
    files = []
    for name, content in (("whole.mp4", clip), ("half.mp4", clip[: len(clip) // 2])):
        (tmp_path / name).write_bytes(content)
        files.append(InputFile(name, tmp_path / name))
    with pytest.raises(DataError, match="half.mp4: unreadable video .* or leave it out with --on-error skip"):
        probe_videos(files, ["", ""], Rejects("fail"))
    rejects = Rejects("skip")
    (video,) = probe_videos(files, ["1", "2"], rejects)
    assert (video.name, video.sha256, video.info) == ("whole.mp4", "1", VideoInfo(5, pytest.approx(0.16)))
    assert [(reject.file, reject.clips) for reject in rejects.listed] == [("half.mp4", None)]
    assert "unreadable video" in rejects.listed[0].reason
