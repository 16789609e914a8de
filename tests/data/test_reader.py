"""What is written comes back, in the same bytes each time, from whatever process, and anyone can read it."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ebwm_dist.data.format import reader as reader_module
from ebwm_dist.data.format.index import finished_shard
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import LatentFormat
from ebwm_dist.data.format.video_codec import decode_clip, decode_images
from ebwm_dist.data.format.writer import ClipWriter, ShardWriter
from tests.tiny_shards import FRAMES, PER_RECORD, PER_SHARD, SAMPLES, make_tiny, tiny_frames, tiny_latents

KINDS = ("latents", "mp4", "jpeg")


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("shards") / request.param
    return request.param, make_tiny(request.param, folder)


def expected(kind: str, split: str) -> np.ndarray:
    """Return the samples that a reader must find."""
    return (tiny_latents(split).astype(np.float32) - 0.5) / 2 if kind == "latents" else tiny_frames(split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_come_back_in_any_order_with_their_keys(made: tuple[str, Manifest], split: str) -> None:
    kind, manifest = made
    loaded = Manifest.load(manifest.folder)
    assert loaded == manifest and loaded.fingerprint == manifest.fingerprint
    shards = np.repeat(np.arange(len(loaded.splits[split].shards)), loaded.splits[split].counts)
    rows = np.concatenate([np.arange(n) for n in loaded.splits[split].counts])
    order = np.random.default_rng(0).permutation(SAMPLES[split])
    reader = pickle.loads(pickle.dumps(ShardReader(loaded, split, max_open=2)))
    samples, keys = reader.read(shards[order], rows[order])
    assert (
        samples.shape == (SAMPLES[split], *loaded.sample_format.shape)
        and samples.dtype == loaded.sample_format.sample_dtype
    )
    tolerance = {"latents": 1e-6, "mp4": 6, "jpeg": 6}[kind]  # the codecs are lossy
    assert np.abs(samples.astype(float) - expected(kind, split)[order]).max() <= tolerance
    record = (lambda n: f"{n // PER_RECORD:08d}#{n % PER_RECORD}") if kind == "latents" else (lambda n: f"{n:08d}")
    assert keys == [f"{split}-{s:06d}/{record(n)}" for s, n in zip(shards[order], order, strict=True)]
    assert np.array_equal(np.concatenate(list(reader.blocks()))[order], samples)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked by Linux's call")
def test_token_shards_are_read_ahead_whole(tiny: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: asked.append((at, size)))
    monkeypatch.setattr(reader_module, "_READ_AHEAD", 1000)
    ShardReader(tiny).shard(1)
    assert asked[0][0] == 0 and sum(asked[-1]) >= tiny.train.shards[1].bytes
    assert all(sum(first) == second[0] for first, second in pairwise(asked))
    asked.clear()
    ShardReader(make_tiny("latents", tmp_path / "latents")).shard(0)  # its samples are larger than pages
    assert not asked


def test_plain_webdataset_reads_the_same(made: tuple[str, Manifest]) -> None:
    kind, manifest = made
    urls = [str(manifest.folder / shard.path) for shard in manifest.train.shards]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        if kind == "latents":
            found += list((np.load(io.BytesIO(sample["npy"]), allow_pickle=False).astype(np.float32) - 0.5) / 2)
            continue
        assert json.loads(sample["json"])["frame_interval"] == 0.25
        images = [sample[f"{n:03d}.jpg"] for n in range(FRAMES)] if kind == "jpeg" else []
        found.append(decode_images(images, "") if kind == "jpeg" else decode_clip(sample["mp4"], ""))
    assert np.array_equal(np.stack(found), np.concatenate(list(ShardReader(manifest).blocks())))


def test_bytes_depend_on_the_samples_alone(made: tuple[str, Manifest], tmp_path: Path) -> None:
    kind, manifest = made
    again = make_tiny(kind, tmp_path / "again")
    assert again.fingerprint == manifest.fingerprint != make_tiny(kind, tmp_path / "other", seed=1).fingerprint
    for path in manifest.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name
    assert {p.name for p in again.folder.iterdir()} == {p.name for p in manifest.folder.iterdir()}


def test_a_shard_can_be_written_alone_and_is_finished_with_its_index(
    made: tuple[str, Manifest], tmp_path: Path
) -> None:
    kind, manifest = made
    arguments = (tmp_path, "train", manifest.sample_format, PER_SHARD, 1)
    writer = ShardWriter(*arguments) if isinstance(manifest.sample_format, LatentFormat) else ClipWriter(*arguments)
    second = list(webdataset.WebDataset(str(manifest.folder / manifest.train.shards[1].path), shardshuffle=False))
    for number, sample in enumerate(second):
        if isinstance(writer, ShardWriter):
            writer.write(np.load(io.BytesIO(sample["npy"])))
        else:
            names = sorted(name for name in sample if name.endswith(("mp4", "jpg")))
            media = [sample[name] for name in names]
            writer.write(media[0] if kind == "mp4" else media, json.loads(sample["json"]))
        assert (finished_shard(tmp_path, "train-000001.tar") is None) == (number < PER_SHARD - 1)
    assert writer.shards == [manifest.train.shards[1]] == [finished_shard(tmp_path, "train-000001.tar")]
    for name in ("train-000001.tar", "train-000001.index.json"):
        assert (tmp_path / name).read_bytes() == (manifest.folder / name).read_bytes()
    with open(tmp_path / "train-000001.tar", "ab") as file:
        file.write(b"\0")
    assert finished_shard(tmp_path, "train-000001.tar") is None


def test_an_interrupted_shard_takes_nothing_from_the_one_before(tmp_path: Path) -> None:
    manifest = make_tiny("latents", tmp_path / "folder")
    before = (manifest.folder / "train-000000.tar").read_bytes()
    writer = ShardWriter(manifest.folder, "train", manifest.sample_format, PER_SHARD)  # type: ignore[arg-type]
    writer.write(tiny_latents("train")[:PER_RECORD] + 1)
    del writer
    assert (manifest.folder / "train-000000.tar").read_bytes() == before
    assert finished_shard(manifest.folder, "train-000000.tar") == manifest.train.shards[0]
