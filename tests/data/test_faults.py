"""Each kind of damage to each kind of shards is detected and named, and `data.on_error=skip` replaces what is lost.

A fault damages one shard and returns the samples that are lost by it. Each of them must be refused when it is read,
with shard and key, and no other.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_tools import verify
from ebwm_dist.data.format.index import TAR_BLOCK
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.loading.damage import read_intact
from ebwm_dist.data.loading.order import EpochOrder
from ebwm_dist.errors import DataError
from tests.data.faults import CASES, CLIPS, RECORD, SHARD, Fault, Victim, bad_json, missing_shard
from tests.tiny_shards import make_tiny


@pytest.fixture(scope="module")
def folders(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Return an intact folder of each kind."""
    root = tmp_path_factory.mktemp("intact")
    return {"tokens": tiny, **{kind: make_tiny(kind, root / kind) for kind in ("latents", *CLIPS)}}


def copy(manifest: Manifest, folder: Path) -> Manifest:
    return Manifest.load(shutil.copytree(manifest.folder, folder))


@pytest.mark.parametrize("kind", ["latents", *CLIPS])
def test_intact_folders_have_no_problems(folders: dict[str, Manifest], kind: str) -> None:
    assert verify.find_problems(folders[kind], deep=True) == []


def test_processes_find_what_one_finds(folders: dict[str, Manifest], tmp_path: Path) -> None:
    manifest = copy(folders["mp4"], tmp_path / "mp4")
    victim = Victim(manifest)
    bad_json(victim)
    (manifest.folder / manifest.val.shards[1].path).unlink()
    problems = verify.find_problems(manifest, deep=True, workers=2)
    assert problems == verify.find_problems(manifest, deep=True) and len(problems) == 3


@pytest.mark.parametrize(("fault", "kind"), CASES)
def test_faults_are_found_and_named_and_skipping_loses_nothing_else(
    folders: dict[str, Manifest], tmp_path: Path, fault: Fault, kind: str
) -> None:
    intact, manifest = folders[kind], copy(folders[kind], tmp_path / kind)
    victim = Victim(manifest)
    lost = fault.do(victim)
    assert 0 < len(lost) <= victim.shard.samples

    _, keys = ShardReader(intact).read(np.full(victim.shard.samples, SHARD), np.arange(victim.shard.samples))
    for row, key in enumerate(keys):
        if row not in lost:
            ShardReader(manifest).read(np.array([SHARD]), np.array([row]))
            continue
        with pytest.raises(DataError, match=fault.message) as raised:
            ShardReader(manifest).read(np.array([SHARD]), np.array([row]))
        record = key.partition("/")[2].partition("#")[0]
        assert victim.shard.path in str(raised.value) and "\n" not in str(raised.value)
        assert f"key {record}: " in str(raised.value) or fault.do is missing_shard

    problems = verify.find_problems(manifest, deep=True)
    assert any(fault.message in problem for problem in problems)
    assert all(victim.shard.name in problem for problem in problems)
    size = victim.path.stat().st_size if victim.path.exists() else -1
    assert bool(verify.find_problems(manifest, deep=False)) == (size != victim.shard.bytes)

    order = EpochOrder(manifest.train.counts, seed=3, epoch=0, window=2)
    places = list(zip(*(part.tolist() for part in order[:]), strict=True))
    gone = [shard == SHARD and row in lost for shard, row in places]
    wanted = []
    for position in range(len(places)):
        following = (position + i for i in range(len(places)))
        wanted.append(next(p % len(places) for p in following if not gone[p % len(places)]))
    samples, names = ShardReader(intact).read(*order[np.array(wanted)])
    for batch in (len(places), 4):  # what a reader has met before makes no difference
        reader = ShardReader(manifest, max_open=2)
        parts = [
            read_intact(reader.read, order, np.arange(start, min(start + batch, len(places))))
            for start in reversed(range(0, len(places), batch))
        ][::-1]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), samples)
        assert [key for part in parts for key in part[1]] == names
        reasons = [reason for part in parts for reason in part[2]]
        assert len(reasons) == len(lost) and all(fault.message in r and victim.shard.path in r for r in reasons)


@pytest.mark.parametrize("kind", ["tokens", "latents", "mp4"])
def test_the_manifest_of_another_data_set_is_refused(folders: dict[str, Manifest], tmp_path: Path, kind: str) -> None:
    manifest = copy(folders[kind], tmp_path / kind)
    if kind == "tokens":  # the same shards in another order
        file = manifest.folder / "manifest.json"
        content = json.loads(file.read_text())
        shards = content["splits"]["train"]["shards"]
        shards[0]["sha256"], shards[1]["sha256"] = shards[1]["sha256"], shards[0]["sha256"]
        file.write_text(json.dumps(content))
    else:
        shutil.copy(make_tiny(kind, tmp_path / "other", seed=1).folder / "manifest.json", manifest.folder)
    manifest = Manifest.load(manifest.folder)
    with pytest.raises(DataError, match=r"train-000000\.tar .*from another data set"):
        ShardReader(manifest).read(np.array([0]), np.array([0]))
    problems = verify.find_problems(manifest, deep=False)
    assert any("train-000000.tar" in problem and "another data set" in problem for problem in problems)
    if kind != "tokens":
        with pytest.raises(DataError, match=r"no sample is intact.*another data set"):
            read_intact(ShardReader(manifest).read, EpochOrder(manifest.train.counts, 0, 0, 2), np.arange(4))


def test_clips_of_another_size_are_refused(folders: dict[str, Manifest], tmp_path: Path) -> None:
    manifest = copy(folders["mp4"], tmp_path / "mp4")
    file = manifest.folder / "manifest.json"
    file.write_text(file.read_text().replace('"height": 16', '"height": 32'))
    with pytest.raises(DataError, match="key 00000000: its frames are 3 x 16 x 16, the manifest says 3 x 32 x 16"):
        ShardReader(Manifest.load(manifest.folder)).read(np.array([0]), np.array([0]))


def test_nothing_is_ever_unpickled(folders: dict[str, Manifest], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()] * 2, dtype=object), allow_pickle=True)
    pickle.loads(pickle.dumps(Bomb()))
    (tmp_path / "ran").unlink()  # the bomb works
    for kind in ("tokens", "latents"):
        manifest = copy(folders[kind], tmp_path / kind)
        Victim(manifest).put("npy", 0, buffer.getvalue())
        with pytest.raises(DataError, match="it holds object"):
            list(ShardReader(manifest).blocks([SHARD]))
        assert any("it holds object" in problem for problem in verify.find_problems(manifest, deep=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["tokens", "mp4"])
def test_names_in_a_tar_cannot_escape(folders: dict[str, Manifest], tmp_path: Path, kind: str) -> None:
    manifest = copy(folders[kind], tmp_path / kind)
    victim = Victim(manifest)
    member = victim.records[RECORD].members[0]
    name = f"../../escaped.{member.extension}"
    header = tarfile.TarInfo(name)
    header.size = member.size
    victim.put(member.extension, -TAR_BLOCK, header.tobuf())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=f"key {victim.records[RECORD].key}: .* has '../../escaped"):
        list(ShardReader(manifest).blocks([SHARD]))
    index = manifest.folder / victim.shard.index_path
    index.write_text(index.read_text().replace(victim.records[RECORD].key, "../../escaped"))
    with pytest.raises(DataError, match="key ../../escaped: its key is not a plain name"):
        list(ShardReader(manifest).blocks([SHARD]))
    assert any("not a plain name" in problem for problem in verify.find_problems(manifest, deep=True))
    assert sorted(tmp_path.rglob("*")) == before
