"""Damage to manifests, indexes and npy headers is detected, and the message names it; see test_faults for the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import verify
from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.index import read_index
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.loading.stream import SampleStream
from ebwm_dist.errors import DataError

SHARD = 3  # damaged in all tests
NAME = "train-000003.tar"


def read_all(manifest: Manifest) -> None:
    for _ in ShardReader(manifest).blocks():
        pass


def patch(manifest: Manifest, member: int, position: int, data: bytes) -> str:
    """Overwrite bytes of a member's payload; returns the member's key."""
    entry = read_index(manifest, manifest.train.shards[SHARD]).records[member]
    with open(manifest.folder / NAME, "r+b") as file:
        file.seek(entry.members[0].offset + position)
        file.write(data)
    return entry.key


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(content: Any) -> Any:
    return content["splits"]["train"]["shards"][0]


def problems(manifest: Manifest, deep: bool) -> list[str]:
    return verify.find_problems(manifest, deep)


def test_intact_data_has_no_problems(tiny: Manifest) -> None:
    assert problems(tiny, deep=True) == []


def test_missing_index(copied: Manifest) -> None:
    (copied.folder / "train-000003.index.json").unlink()
    with pytest.raises(DataError, match=r"missing file: .*train-000003\.index\.json"):
        copied.check_files()
    with pytest.raises(DataError, match=r"missing file: .*train-000003\.index\.json"):
        read_all(copied)


def test_a_training_stream_refuses_a_truncated_shard_at_once(copied: Manifest) -> None:
    with open(copied.folder / NAME, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=f"disagrees with its manifest: .*{NAME}"):
        SampleStream(
            DataConfig(sequence_length=16),
            copied,
            seed=0,
            global_batch_size=4,
            micro_batch_size=4,
            dp_rank=0,
            dp_world_size=1,
        )


def test_wrong_count_in_the_manifest(copied: Manifest) -> None:
    def change(content: Any) -> None:
        first_shard(content)["samples"] = 31

    edit(copied.folder / "manifest.json", change)
    damaged = Manifest.load(copied.folder)
    with pytest.raises(DataError, match=r"train-000000.tar lists 32 samples, the manifest says 31"):
        read_all(damaged)
    assert len(problems(damaged, deep=False)) == 1


def test_bad_npy_header(copied: Manifest) -> None:
    key = patch(copied, 2, 0, b"garbage!")
    with pytest.raises(DataError, match=f"{NAME}, key {key}: no valid npy header"):
        read_all(copied)
    assert problems(copied, deep=False) == []
    found = problems(copied, deep=True)
    assert len(found) == 2 and "SHA-256" in found[0] and key in found[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"<u2", b"<i2", "it holds int16"),
        (b"(8, 17)", b"(4, 34)", r"it holds uint16 \(4, 34\)"),
        (b"False", b"True ", "it holds uint16"),
        (b"'<u2'", b"'|O' ", "it holds object"),
    ],
)
def test_wrong_dtype_or_shape(copied: Manifest, old: bytes, new: bytes, message: str) -> None:
    raw = (copied.folder / NAME).read_bytes()
    assert raw.count(old) == 4
    (copied.folder / NAME).write_bytes(raw.replace(old, new, 1))
    with pytest.raises(DataError, match=f"{NAME}, key 00000012: {message}"):
        read_all(copied)


def test_lost_tokens_are_counted(copied: Manifest) -> None:
    edit(copied.folder / "manifest.json", lambda content: content["splits"]["val"]["totals"].update(tokens=7))
    (problem,) = problems(Manifest.load(copied.folder), deep=True)
    assert "the val split holds" in problem and "says 7" in problem


def test_an_index_that_points_at_another_member(copied: Manifest) -> None:
    def swap(content: Any) -> None:
        first, second = content["records"][:2]
        first["members"], second["members"] = second["members"], first["members"]

    edit(copied.folder / "train-000003.index.json", swap)
    with pytest.raises(DataError, match=f"{NAME}, key 00000012: .* has '00000013.npy' instead"):
        read_all(copied)
    found = problems(copied, deep=True)
    assert len(found) == 3 and "are not the 4 of its index, from '00000012.npy' on" in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (10**9, f"{NAME}, key 00000012: .*outside the shard"),
        (-200, f"{NAME}, key 00000012: .*outside"),
        (-600, "is not a count"),
    ],
)
def test_an_index_that_points_outside(copied: Manifest, change: int, message: str) -> None:
    def move(content: Any) -> None:
        content["records"][0]["members"][0][1] += change

    edit(copied.folder / "train-000003.index.json", move)
    with pytest.raises(DataError, match=message):
        read_all(copied)


def test_damaged_index(copied: Manifest) -> None:
    (copied.folder / "train-000003.index.json").write_text('{"members": [{"key": "0')
    with pytest.raises(DataError, match=r"index .*train-000003.index.json is damaged"):
        read_all(copied)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/train-000000.tar", "a/../../b.tar", "", "..\\x.tar"])
@pytest.mark.parametrize("where", ["shard", "tokenizer"])
def test_paths_that_leave_the_folder_are_refused(copied: Manifest, path: str, where: str) -> None:
    def change(content: Any) -> None:
        if where == "shard":
            first_shard(content)["path"] = path
        else:
            content["content"]["tokenizer"] = path

    edit(copied.folder / "manifest.json", change)
    with pytest.raises(DataError, match="not a path inside its folder"):
        Manifest.load(copied.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=1), "has version 1, this program reads version 2"),
        (lambda c: c.update(format="other"), "not a manifest of shards"),
        (lambda c: c.pop("splits"), "incomplete or damaged"),
        (lambda c: c["splits"].pop("val"), "incomplete or damaged"),
        (lambda c: first_shard(c).update(samples=-1), "-1 is not a count"),
        (lambda c: first_shard(c).update(bytes="9"), "'9' is not a count"),
        (lambda c: c["content"].update(dtype="object"), "is not uint16 or uint32"),
        (lambda c: c["content"].update(kind="pickles"), "'pickles' is not tokens or latents or clips"),
        (lambda c: c["content"].update(vocab_size=-3), "vocab_size = -3 is negative"),
        (lambda c: c["content"].update(pad_id="0"), "pad_id = '0' is not a value of type int"),
        (lambda c: c["content"].update(frames=3), "unexpected keyword argument 'frames'"),
    ],
)
def test_damaged_manifests(copied: Manifest, change: Callable[[Any], object], message: str) -> None:
    edit(copied.folder / "manifest.json", change)
    with pytest.raises(DataError, match=message):
        Manifest.load(copied.folder)


def test_missing_folder_manifest_and_broken_json_say_what_to_do(tmp_path: Path) -> None:
    for message in ("does not exist", "has no manifest.json", "is not valid JSON"):
        with pytest.raises(DataError, match=f"{message}.*tokenize_text.py") as raised:
            Manifest.load(tmp_path / "text")
        assert "\n" not in str(raised.value)
        (tmp_path / "text").mkdir(exist_ok=True)
        if message == "has no manifest.json":
            (tmp_path / "text" / "manifest.json").write_text("{")


def test_the_fingerprint_follows_content_not_place(copied: Manifest, tmp_path: Path) -> None:
    moved = shutil.copytree(copied.folder, tmp_path / "elsewhere")
    assert Manifest.load(moved).fingerprint == copied.fingerprint

    def change(content: Any) -> None:
        first_shard(content)["sha256"] = "0" * 64

    edit(moved / "manifest.json", change)
    assert Manifest.load(moved).fingerprint != copied.fingerprint


def test_reading_with_few_open_files_and_after_pickling(tiny: Manifest) -> None:
    import pickle

    expected = np.concatenate(list(ShardReader(tiny).blocks()))
    starts = np.cumsum([0, *tiny.train.counts])
    places = np.random.default_rng(0).permutation(len(expected))
    shards = np.searchsorted(starts, places, side="right") - 1
    reader = ShardReader(tiny, max_open=2)
    reader.read(shards[:9], (places - starts[shards])[:9])
    rows, keys = pickle.loads(pickle.dumps(reader)).read(shards, places - starts[shards])
    assert np.array_equal(rows, expected[places]) and len(set(keys)) == len(expected)
    with pytest.raises(IndexError):
        reader.read(np.array([0]), np.array([32]))
