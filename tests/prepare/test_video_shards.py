"""Shards of video: the right frames, the same bytes from every executor, continued after a stop."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_tools import cut_clips as cut_tool
from data_tools import encode_frames as encode_tool
from data_tools import stats, verify
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import LatentFormat
from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg
from ebwm_dist.encoders import build_encoder
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare import latent_shards
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.cutting import Cut, Video, read_frames
from ebwm_dist.prepare.latent_shards import Encoding, LatentStore, encode_clips
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.prepare.video_files import probe
from ebwm_dist.prepare.video_shards import cut_clips
from ebwm_dist.workers.executors import Work
from tests.videos import contents

ROOT = Path(__file__).parents[2]
CUT = Cut(frames=3, frame_interval=0.08, stride=0.04, height=16, width=24, holdout_last=0.4, gap=0.1)
PIXELS = Encoding("pixels:4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two videos of two seconds."""
    made = tmp_path_factory.mktemp("videos")
    for seed in range(2):
        (made / f"{seed}.mp4").write_bytes(encode_clip(moving_shapes(seed, 50, 32, 48), 0.04))
    return made


def make(folder: Path, out: Path, **changes: object) -> Report:
    return cut_clips([folder], out, CUT, clips_per_shard=20, **changes)  # type: ignore[arg-type]


def frames_of(path: Path, starts: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return read_frames(Video(path.name, path, "", probe(path)), starts, CUT)


def all_samples(manifest: Manifest, split: str) -> np.ndarray:
    counts = manifest.splits[split].counts
    places = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    return ShardReader(manifest, split).read(*map(np.array, zip(*places, strict=True)))[0]


@pytest.mark.parametrize("storage", ["mp4", "jpeg"])
def test_shards_hold_the_clips_that_were_planned(folder: Path, tmp_path: Path, storage: str) -> None:
    manifest = make(folder, tmp_path / "out", storage=storage).manifest
    # Frames at 0, 0.04 ... 1.96 s: training clips end by 1.46 s, held-out ones start at 1.56 s.
    assert manifest.train.samples == 2 * 33 and manifest.val.samples == 2 * 7
    assert manifest.train.counts == (20, 20, 20, 6)
    assert manifest.train.totals == {"videos": 2, "frames": 66 * 3}
    starts = [round(i * 0.04, 6) for i in range(33)]
    frames, index = frames_of(folder / "0.mp4", starts)
    found = all_samples(manifest, "train")
    assert np.abs(found[:33].astype(int) - frames[index]).mean() < 8
    assert np.abs(found[33:].astype(int) - frames[index]).mean() > 20  # those of the other video

    shards = [str(tmp_path / "out" / shard.path) for shard in manifest.train.shards]
    plain = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in plain[:21:20]] == ["00000000", "00000020"]
    info = json.loads(plain[34]["json"])
    assert info == {"video": "1.mp4", "start": 0.04, "frame_interval": 0.08}
    media = plain[34]["mp4"] if storage == "mp4" else plain[34]["001.jpg"]
    if storage == "jpeg":
        assert np.asarray(Image.open(io.BytesIO(media))).shape == (16, 24, 3)
        assert media == encode_jpeg(frames_of(folder / "1.mp4", [0.04])[0][1])
    else:
        assert media == encode_clip(frames_of(folder / "1.mp4", [0.04])[0], 0.08)
    assert verify.main([str(tmp_path / "out"), "--deep"]) == 0


def test_latents_are_those_of_the_frames_normalised_over_the_training_split(folder: Path, tmp_path: Path) -> None:
    direct = make(folder, tmp_path / "direct", encoding=PIXELS).manifest
    assert isinstance(direct.sample_format, LatentFormat) and direct.sample_format.embedding_dim == 48
    encoder = build_encoder("pixels:4", height=16, width=24)
    frames, index = frames_of(folder / "0.mp4", [round(i * 0.04, 6) for i in range(33)])
    expected = encoder.encode(torch.from_numpy(frames)).numpy()[index]
    mean, std = direct.sample_format.mean, direct.sample_format.std
    train, val = (all_samples(direct, split) for split in ("train", "val"))
    assert np.allclose(train[:33] * std + mean, expected, atol=1e-3)
    assert abs(train.mean()) < 1e-3 and train.std() == pytest.approx(1, abs=1e-3)
    assert abs(val.mean()) > 1e-3  # the held-out split is not normalised by itself
    assert (direct.sample_format.encoder, direct.sample_format.encoder_sha256) == ("pixels:4", encoder.sha256)
    assert verify.main([str(tmp_path / "direct"), "--deep"]) == 0

    clips = make(folder, tmp_path / "clips").manifest
    later = encode_clips(clips.folder, tmp_path / "later", PIXELS).manifest
    assert later.train.counts == clips.train.counts and later.train.totals == clips.train.totals
    shown = all_samples(clips, "train").reshape(-1, 16, 24, 3)
    expected = encoder.encode(torch.from_numpy(shown)).numpy().reshape(66, 3, 48)
    assert isinstance(later.sample_format, LatentFormat)
    found = all_samples(later, "train") * later.sample_format.std + later.sample_format.mean
    assert np.allclose(found, expected, atol=1e-3)
    assert verify.main([str(later.folder), "--deep"]) == 0


def test_processes_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "local", encoding=PIXELS)
    make(folder, tmp_path / "process", encoding=PIXELS, work=Work("process", 2))
    assert contents(tmp_path / "local") == contents(tmp_path / "process")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["process", "ray"])
def test_every_executor_writes_the_same_bytes(folder: Path, tmp_path: Path, executor: str) -> None:
    work = Work(executor, 2)
    make(folder, tmp_path / "clips")
    encode_clips(tmp_path / "clips", tmp_path / "latents", PIXELS)
    make(folder, tmp_path / "clips2", work=work)
    encode_clips(tmp_path / "clips2", tmp_path / "latents2", PIXELS, work=work)
    assert contents(tmp_path / "clips") == contents(tmp_path / "clips2")
    assert contents(tmp_path / "latents") == contents(tmp_path / "latents2")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "0.mp4").write_bytes((folder / "0.mp4").read_bytes())
    whole = (folder / "1.mp4").read_bytes()
    middle = whole.index(b"moov") // 2
    (damaged / "1.mp4").write_bytes(whole[:middle] + bytes(400) + whole[middle + 400 :])
    with pytest.raises(DataError, match="1.mp4: (damaged|unreadable) video"):  # as it was raised, from a worker too
        make(damaged, tmp_path / "out", work=work)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_interrupted_run_is_continued_and_other_settings_start_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, tmp_path / "whole", encoding=PIXELS)
    out, calls = tmp_path / "out", []
    write = LatentStore.write

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LatentStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, encoding=PIXELS)
    with pytest.raises(DataError, match="unfinished"):
        Manifest.load(out)
    (out / ".train-000002.tar.123.tmp").touch()  # of a killed process
    made = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    report = make(folder, out, encoding=PIXELS)
    assert len(made) == 2 and len(calls) == 3 + 3 and not report.up_to_date
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert contents(out) == contents(tmp_path / "whole")
    assert make(folder, out, encoding=PIXELS).up_to_date and len(calls) == 6

    other = make(folder, out, encoding=Encoding("pixels:4", dtype="float32")).manifest
    assert len(calls) == 6 + 5 and other.fingerprint != report.manifest.fingerprint
    calls[:] = [(), ()]
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, encoding=PIXELS)
    make(folder, out)
    listed = {
        name
        for split in ("train", "val")
        for s in Manifest.load(out).splits[split].shards
        for name in (s.path, s.index_path)
    }
    assert set(contents(out)) == listed | {"manifest.json"}


@pytest.mark.slow
def test_a_killed_run_is_continued(folder: Path, tmp_path: Path) -> None:
    arguments = ["--input", folder, "--frames", 3, "--frame-interval", 0.08, "--stride", 0.04, "--size", "16x24"]
    arguments += ["--holdout-last", 0.4, "--gap", 0.1, "--clips-per-shard", 2, "--executor", "process", "--workers", 2]
    command = [sys.executable, ROOT / "data_tools" / "cut_clips.py", *arguments, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*map(str, command), str(tmp_path / "whole")], check=True, env=environment)
    out = tmp_path / "out"
    process = subprocess.Popen([*map(str, command), str(out)], env=environment, start_new_session=True)
    while len(list(out.glob("*.index.json"))) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    subprocess.run([*map(str, command), str(out)], check=True, env=environment)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_cannot_be_encoded_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder, tmp_path / "latents", encoding=PIXELS)
    with pytest.raises(UserError, match="latents is an output of this run"):
        encode_clips(tmp_path / "latents", tmp_path / "latents", PIXELS)
    with pytest.raises(DataError, match="holds latents, not clips"):
        encode_clips(tmp_path / "latents", tmp_path / "out", PIXELS)
    black = tmp_path / "black"
    black.mkdir()
    (black / "0.mp4").write_bytes(encode_clip(np.zeros((50, 16, 16, 3), np.uint8), 0.04))
    with pytest.raises(DataError, match="all latents of the train split are equal"):
        make(black, tmp_path / "out", encoding=PIXELS)
    monkeypatch.setattr(latent_shards, "_load_encoder", lambda *_: lambda frames: np.full((len(frames), 48), 1e6))
    with pytest.raises(DataError, match="not finite or too large for float16"):
        make(folder, tmp_path / "out", encoding=PIXELS)
    with pytest.raises(UserError, match="15 x 24 cannot be stored as mp4"):
        cut_clips([folder], tmp_path / "out", Cut(3, 0.08, 0.04, 15, 24, holdout_last=0.4, gap=0.1))


def test_the_tools(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, latents, sheet = tmp_path / "clips", tmp_path / "latents", tmp_path / "sheet.png"
    arguments = ["--input", folder, "--out", clips, "--frames", 3, "--frame-interval", 0.08, "--stride", 0.2]
    arguments += ["--size", "16x24", "--holdout", "1.mp4"]
    cut_tool.main([*map(str, arguments)])
    output = capsys.readouterr().out
    assert "train: 10 clips of 1 videos, 30 frames, 1 shards" in output and "frames/s" in output
    assert Manifest.load(clips).held_out_groups == ("1.mp4",)
    cut_tool.main([*map(str, arguments)])
    assert "up to date" in capsys.readouterr().out
    encode_tool.main([str(clips), "--out", str(latents), "--encoder", "pixels:8"])
    assert "192 values a frame" in capsys.readouterr().out

    for made, heading in (
        (clips, "clips: 3 frames of 16 x 24, one every 0.08 s (mp4)"),
        (latents, "pixels:8: 192 values"),
    ):
        stats.main([str(made), "--contact-sheet", str(sheet)])
        output = capsys.readouterr().out
        assert heading in output and "frames: 30" in output and "held out: 1.mp4" in output
        with Image.open(sheet) as image:
            wide = 144 if made == clips else 96  # latents of pixels are square
            assert image.size == (3 * wide + 4, 8 * 96 + 14)
    stats.main([str(clips), "--json"])
    figures = json.loads(capsys.readouterr().out)["train"]
    assert figures["samples"] == 10 and figures["seconds"] == pytest.approx(2.4)

    for wrong in (["--size", "16x"], ["--stride", "0"], ["--frames", "1"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            cut_tool.main([*map(str, arguments), *wrong])


def test_stats_of_tokens(tiny: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats.main([str(tiny.folder)])
    output = capsys.readouterr().out
    assert "tokens: 16 a sample, vocabulary of 320" in output and "held out: book 0" in output
    with pytest.raises(UserError, match="only video and images have a contact sheet"):
        stats.main([str(tiny.folder), "--contact-sheet", str(tmp_path / "x.png")])
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(SystemExit):
        stats.main([str(tiny.folder), "--contact-sheet", str(other)])
    assert other.read_text() == "mine" and "must end in .png" in capsys.readouterr().err
