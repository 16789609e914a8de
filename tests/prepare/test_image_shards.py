"""Shards of images: what was packed comes back with its class, from files and arrays, whole or encoded."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_tools import encode_frames, fetch_images, pack_images, stats, verify
from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import split_labels
from ebwm_dist.data.format.video_codec import encode_clip
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import Batch, SampleStream, validation_batches
from ebwm_dist.encoders import build_encoder
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare import image_files
from ebwm_dist.prepare.image_shards import Packing
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.workers.executors import Work
from tests.videos import contents

COUNT = 60


def array(seed: int = 0, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)


def packed(
    inputs: object, out: Path, *, on_error: str = "fail", work: Work | None = None, **changes: object
) -> Manifest:
    settings = Packing(**{"holdout_fraction": 0.2, "images_per_shard": 16, **changes})  # type: ignore[arg-type]
    options = {} if work is None else {"work": work}
    return pack_images.pack_images([inputs], out, settings, on_error=on_error, **options).manifest  # type: ignore


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def everything(manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return values, labels and names of all samples of a split."""
    places = [(n, row) for n, count in enumerate(manifest.splits[split].counts) for row in range(count)]
    samples, _ = ShardReader(manifest, split).read(*map(np.array, zip(*places, strict=True)))
    shards = [str(manifest.folder / shard.path) for shard in manifest.splits[split].shards]
    plain = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    names = [json.loads(sample["json"])["image"] for sample in plain]
    return *split_labels(samples), names


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return images of three classes, with their row in their label and name."""
    folder = tmp_path_factory.mktemp("labelled")
    labels = np.arange(COUNT) % 3
    source = saved(folder / "a.npz", images=array(), labels=labels, classes=np.array(["ox", "ant", "cat"]))
    return packed(source, folder / "out")


def test_arrays_come_back_with_their_classes(labelled: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert labelled.sample_format.classes == ("ant", "cat", "ox")  # type: ignore[union-attr]
    assert labelled.sample_format.sequence_length == 1
    seen = []
    for split in ("train", "val"):
        values, labels, names = everything(labelled, split)
        assert labels is not None
        rows = [int(name.removeprefix("a.npz#")) for name in names]
        np.testing.assert_array_equal(values[:, 0], array()[rows])
        assert [("ant", "cat", "ox")[label] for label in labels] == [("ox", "ant", "cat")[row % 3] for row in rows]
        assert len(set(labels[:8].tolist())) == 3  # in no order of theirs
        seen += rows
    assert sorted(seen) == list(range(COUNT)) and labelled.val.samples > 5
    shard = str(labelled.folder / labelled.train.shards[0].path)
    plain = next(iter(webdataset.WebDataset([shard], shardshuffle=False, empty_check=False)))
    with Image.open(io.BytesIO(plain["png"])) as image:
        assert image.size == (6, 8) and int(plain["cls"]) in range(3)
    assert verify.main([str(labelled.folder), "--deep"]) == 0
    stats.main([str(labelled.folder), "--contact-sheet", str(labelled.folder / "sheet.png")])
    assert "images of 8 x 6, 3 classes (png)" in (output := capsys.readouterr().out) and "images: " in output


def test_shards_do_not_depend_on_the_executor(labelled: Manifest, tmp_path: Path) -> None:
    source = labelled.folder.parent / "a.npz"
    packed(source, tmp_path / "out", work=Work("process", 2))
    written = contents(labelled.folder)
    written.pop("sheet.png", None)
    assert contents(tmp_path / "out") == written


def batches(mixture: Manifest | Mixture, rank: int = 0, world: int = 1, **data: object) -> Iterator[Batch]:
    config = DataConfig(sequence_length=1, shuffle_window=2, **data)  # type: ignore[arg-type]
    return SampleStream(
        config, mixture, seed=3, global_batch_size=8, micro_batch_size=4, dp_rank=rank, dp_world_size=world
    )


def test_labels_follow_images_through_the_stream_and_around_damage(labelled: Manifest, tmp_path: Path) -> None:
    of_image = {}
    for split in ("train", "val"):
        values, labels, _ = everything(labelled, split)
        assert labels is not None
        of_image |= {value.tobytes(): label for value, label in zip(values, labels.tolist(), strict=True)}
    damaged = Manifest.load(shutil.copytree(labelled.folder, tmp_path / "damaged"))
    with open(damaged.folder / damaged.train.shards[0].path, "r+b") as file:
        file.seek(2600)  # in the first image, which its class and description come before
        file.write(b"damage")
    other = saved(tmp_path / "b.npz", images=array(1), labels=np.array(["ox", "ant", "cat"])[np.arange(COUNT) % 3])
    mixed = packed(other, tmp_path / "other")
    values, labels, _ = everything(mixed, "train")
    assert labels is not None
    of_image |= {value.tobytes(): label for value, label in zip(values, labels.tolist(), strict=True)}
    mixture = Mixture.of({"one": labelled, "two": mixed}, {"one": 1.0, "two": 1.0})
    replaced = 0
    for data in (labelled, damaged, mixture):
        for batch in islice(batches(data, on_error="skip"), 12):
            assert batch.labels is not None and batch.labels.dtype == torch.int64
            assert [of_image[image.numpy().tobytes()] for image in batch.observed] == batch.labels.tolist()
            replaced += len(batch.damaged)
            assert all(reason.endswith("run data_tools/pack_images.py again") for reason in batch.damaged)
        for batch in validation_batches(data, batch_size=4, max_sequences=8, dp_rank=0, dp_world_size=1):
            assert batch.labels is not None
    assert replaced >= 1
    two = [next(batches(labelled, rank, 2)).labels for rank in range(2)]
    first = batches(labelled)
    assert torch.equal(torch.cat([x for x in two if x is not None]), torch.cat([next(first).labels for _ in range(2)]))


def test_latents_keep_the_labels(labelled: Manifest, tmp_path: Path) -> None:
    encode_frames.main(
        [str(labelled.folder), "--out", str(tmp_path / "x"), "--encoder", "grey:6/3", "--dtype", "float32"]
    )
    latents = Manifest.load(tmp_path / "x")
    values, labels, _ = everything(labelled, "train")
    found, same, _ = split_labels_of(latents)
    np.testing.assert_array_equal(same, labels)
    expected = build_encoder("grey:6/3", None, 8, 6).encode(torch.from_numpy(values[:, 0])).numpy()
    sample_format = latents.sample_format
    restored = found[:, 0] * sample_format.std + sample_format.mean  # type: ignore[union-attr]
    np.testing.assert_allclose(restored, expected, atol=1e-6)
    assert verify.main([str(latents.folder), "--deep"]) == 0


def split_labels_of(manifest: Manifest) -> tuple[np.ndarray, np.ndarray | None, int]:
    counts = manifest.train.counts
    places = [(n, row) for n, count in enumerate(counts) for row in range(count)]
    samples, _ = ShardReader(manifest, "train").read(*map(np.array, zip(*places, strict=True)))
    return *split_labels(samples), len(places)


def test_folders_of_images(tmp_path: Path) -> None:
    images = array(count=12)
    for number, image in enumerate(images):
        folder = tmp_path / "in" / ("dog", "cat")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.{('png', 'bmp')[number % 3 == 0]}")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right when shown
    Image.fromarray(np.full((6, 8, 3), 99, np.uint8)).save(tmp_path / "in" / "dog" / "turned.png", exif=turned)
    with pytest.raises(UserError, match="--size is needed, as images like"):
        packed(tmp_path / "in", tmp_path / "out")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="notes.txt is no image and no array: --input takes .png, "):
        packed(tmp_path / "notes.txt", tmp_path / "out")
    manifest = packed(tmp_path / "in", tmp_path / "out", size=(8, 6), holdout=("cat/1.png",), holdout_fraction=0.0)
    assert manifest.held_out_groups == ("cat/1.png",) and manifest.train.totals == {"images": 12}
    values, labels, names = everything(manifest, "train")
    assert labels is not None
    for value, label, name in zip(values[:, 0], labels, names, strict=True):
        assert name.startswith(("cat", "dog")[label])
        expected = np.full((8, 6, 3), 99) if "turned" in name else images[int(Path(name).stem)]
        np.testing.assert_array_equal(value, expected)

    (tmp_path / "in" / "dog" / "broken.png").write_bytes(b"\x89PNG nonsense")
    Image.fromarray(np.zeros((8, 6), np.uint16)).save(tmp_path / "in" / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"(broken|deep).png: unreadable image .*--on-error skip"):
        packed(tmp_path / "in", tmp_path / "out", size=(8, 6))
    manifest = packed(tmp_path / "in", tmp_path / "out", size=(8, 6), on_error="skip")
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text()
    assert manifest.source["rejects"] == 2 and "more than 8 bits" in rejects and "broken.png" in rejects
    Image.fromarray(images[0]).save(tmp_path / "in" / "loose.png")
    with pytest.raises(UserError, match="has none: give every image one"):
        packed(tmp_path / "in", tmp_path / "out", size=(8, 6))
    manifest = packed(tmp_path / "in", tmp_path / "out", size=(8, 6), on_error="skip", labels=False)
    assert manifest.sample_format.classes == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4))}, "no array `images`, but pictures"),
        ({"images": np.zeros((2, 4))}, "are not .N, H, W"),
        ({"images": np.full((2, 4, 4), 1.5)}, "must be numbers from 0 to 1"),
        ({"images": np.zeros((2, 4, 4), np.int16)}, "of type int16"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, "labels .3,. of type int64 are not 2"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.array([0, 2]), "classes": np.array(["a", "b"])}, "from 0 to 1"),
    ],
)
def test_wrong_arrays_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        packed(saved(tmp_path / "a.npz", **arrays), tmp_path / "out")


def test_samples_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch_images.main(["--out", str(tmp_path / "digits.npz")])
    digits = image_files.read_arrays(tmp_path / "digits.npz")
    assert digits.images.shape == (1797, 8, 8, 3) and digits.images.max() == 255
    assert digits.labels is not None and digits.labels[:10] == tuple("0123456789")
    videos = tmp_path / "videos"
    videos.mkdir()
    for seed in range(2):
        (videos / f"{seed}.mp4").write_bytes(encode_clip(moving_shapes(seed, 30, 32, 40), 0.04))
    out = tmp_path / "patches.npz"
    fetch_images.main(["--source", "frames", "--videos", str(videos), "--size", "16", "--out", str(out)])
    assert "24 images of 16 x 16" in capsys.readouterr().out  # 2 videos, 3 frames, 2 x 2 patches
    pack_images.main(["--input", str(out), "--out", str(tmp_path / "out"), "--holdout", "1.mp4"])
    assert "train: 12 images, 1 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fetch_images.main(["--source", "frames", "--out", str(out)])
    with pytest.raises(UserError, match="'3.mp4' is not in the input, which has 0.mp4, 1.mp4"):
        pack_images.main(["--input", str(out), "--out", str(tmp_path / "out"), "--holdout", "3.mp4"])
