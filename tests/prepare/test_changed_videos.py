"""Videos that are broken, added or dropped cost no more than the shards that their clips are in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import cut_clips as cut_tool
from data_tools import verify
from ebwm_dist.data.format.video_codec import encode_clip
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.cutting import Cut
from ebwm_dist.prepare.latent_shards import Encoding, encode_clips
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.prepare.video_shards import cut_clips
from tests.videos import contents

CUT = Cut(frames=3, frame_interval=0.08, stride=0.2, height=16, width=24, holdout_last=0.4, gap=0.1)
PER_VIDEO, HELD_OUT = 7, 2  # clips: those for training start at 0, 0.2 ... 1.2 s and end by 1.46 s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of four videos of two seconds."""
    made = tmp_path / "videos"
    made.mkdir()
    for seed in range(4):
        (made / f"{seed}.mp4").write_bytes(encode_clip(moving_shapes(seed, 50, 32, 48), 0.04))
    return made


def make(folder: Path, out: Path, on_error: str = "fail", encoding: Encoding | None = None) -> Report:
    return cut_clips([folder], out, CUT, clips_per_shard=4, on_error=on_error, encoding=encoding)


def damage(video: Path, first: float = 0.3, last: float = 0.6) -> None:
    """Spoil some of the frames of a video, of which its packets show nothing."""
    data = bytearray(video.read_bytes())
    frames = data.index(b"mdat") + 4
    end = data.index(b"moov")
    for offset in range(frames + int((end - frames) * first), frames + int((end - frames) * last)):
        data[offset] ^= 0x55 if offset % 3 else 0
    video.write_bytes(data)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def kept(before: dict[str, int], folder: Path) -> list[str]:
    return sorted(name for name, time in times(folder).items() if before.get(name) == time)


@pytest.mark.parametrize("encoding", [None, Encoding("pixels:4")])
def test_a_broken_video_is_skipped_without_making_finished_shards_again(
    folder: Path, tmp_path: Path, encoding: Encoding | None
) -> None:
    out = tmp_path / "out"
    damage(folder / "2.mp4")
    with pytest.raises(DataError, match=r"2.mp4: (damaged|unreadable) video.* or leave it out with --on-error skip"):
        make(folder, out, encoding=encoding)
    finished = times(out)
    assert len(finished) >= 2 * PER_VIDEO // 4  # those of the videos before
    report = make(folder, out, "skip", encoding)
    assert kept(finished, out) == sorted(finished) and report.kept == len(finished)

    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {reject["file"] for reject in rejects} == {"2.mp4"} and report.rejects == 1
    left = sum(reject["clips"] for reject in rejects)
    assert left > 0 and "2.mp4: " in rejects[0]["reason"]
    manifest = report.manifest
    assert manifest.train.samples + manifest.val.samples == 4 * (PER_VIDEO + HELD_OUT) - left
    assert manifest.train.totals["frames"] == 3 * manifest.train.samples
    assert "1 unreadable videos left out, listed in" in report.describe()
    assert verify.main([str(out), "--deep"]) == 0

    again = make(folder, out, "skip", encoding)
    assert again.up_to_date and again.rejects == 1
    with pytest.raises(DataError, match="2.mp4"):
        make(folder, out, encoding=encoding)
    make(folder, tmp_path / "whole", "skip", encoding)
    make(folder, out, "skip", encoding)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_of_which_nothing_can_be_read_is_left_out(folder: Path, tmp_path: Path) -> None:
    damage(folder / "1.mp4", 0.3, 1.0)
    (folder / "3.mp4").write_text("no video")
    report = cut_clips([folder], tmp_path / "out", CUT, clips_per_shard=1, on_error="skip")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["clips"]) for reject in rejects[:2]] == [("3.mp4", None), ("1.mp4", 1)]
    manifest = report.manifest
    made = [int(shard.path[6:12]) for shard in manifest.train.shards]
    assert made[: PER_VIDEO + 1] == list(range(PER_VIDEO + 1)) and made[-1] == 3 * PER_VIDEO - 1
    missing = 3 * (PER_VIDEO + HELD_OUT) - manifest.train.samples - manifest.val.samples
    assert missing == len(rejects) - 1 > HELD_OUT and report.rejects == 2
    assert (manifest.train.totals["videos"], manifest.val.totals["videos"]) == (3, 2)
    assert verify.main([str(tmp_path / "out"), "--deep"]) == 0
    encode_clips(tmp_path / "out", tmp_path / "latents", Encoding("pixels:4"))
    assert verify.main([str(tmp_path / "latents"), "--deep"]) == 0
    for seed in range(3):
        damage(folder / f"{seed}.mp4", 0.05, 0.3)
    with pytest.raises(UserError, match="no clip .*is left for the train split"):
        make(folder, tmp_path / "none", "skip")
    assert not (tmp_path / "none" / "manifest.json").exists()


@pytest.mark.parametrize("encoding", [None, Encoding("pixels:4")])
def test_videos_added_at_the_end_or_dropped_leave_the_shards_before_them(
    folder: Path, tmp_path: Path, encoding: Encoding | None
) -> None:
    out = tmp_path / "out"
    make(folder, out, encoding=encoding)
    before = times(out)
    assert len(before) == 4 * (PER_VIDEO + HELD_OUT) // 4
    (folder / "4.mp4").write_bytes(encode_clip(moving_shapes(4, 50, 32, 48), 0.04))
    report = make(folder, out, encoding=encoding)
    assert kept(before, out) == sorted(before) and not report.up_to_date  # no shard ended within the last video
    assert f"{len(before)} shards kept" in report.describe()
    make(folder, tmp_path / "five", encoding=encoding)
    assert contents(out) == contents(tmp_path / "five")

    before = times(out)
    (folder / "2.mp4").unlink()
    make(folder, out, encoding=encoding)
    unchanged = {"train": 2 * PER_VIDEO // 4, "val": 2 * HELD_OUT // 4}
    assert kept(before, out) == [f"{split}-{n:06d}.tar" for split, count in unchanged.items() for n in range(count)]
    make(folder, tmp_path / "four", encoding=encoding)
    assert contents(out) == contents(tmp_path / "four")


def test_the_tool_skips_what_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "0.mp4").write_text("no video")
    arguments = ["--input", folder, "--out", tmp_path / "out", "--frames", 3, "--frame-interval", 0.08]
    arguments += ["--size", "16x24", "--holdout-last", 0.4, "--gap", 0.1]
    with pytest.raises(DataError, match="0.mp4: unreadable video"):
        cut_tool.main([*map(str, arguments)])
    cut_tool.main([*map(str, arguments), "--on-error", "skip"])
    assert "of 3 videos" in (output := capsys.readouterr().out) and "1 unreadable videos left out" in output
