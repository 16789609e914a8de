"""A run over damaged shards: the same samples take the place of the same others, whatever ranks, workers and stops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ebwm_dist.data.format.index import read_index
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.order import EpochOrder
from ebwm_dist.encoders import build_encoder
from ebwm_dist.encoders.preprocessing import FramePreprocessor, embedding_statistics
from ebwm_dist.errors import DataError
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn
from tests.tiny_shards import make_tiny_clips, tiny_frames

STEPS, BATCH, WINDOW = 14, 12, 2


def test_a_run_that_skips_counts_each_damaged_sample_once_an_epoch(
    tiny_data: Path, tiny_config: Path, tmp_path: Path
) -> None:
    manifest = Manifest.load(shutil.copytree(tiny_data, tmp_path / "text"))
    (manifest.folder / "train-000002.tar").unlink()
    place = read_index(manifest, manifest.train.shards[3]).records[0].members[0].offset + 128 + 5 * 2 * 17
    with open(manifest.folder / "train-000003.tar", "r+b") as file:
        file.seek(place)
        file.write(b"\xff\xff")
    common = [
        f"data.path={manifest.folder}",
        "data.on_error=skip",
        f"training.max_steps={STEPS}",
        f"training.global_batch_size={BATCH}",
    ]
    whole = [*common, f"run_dir={tmp_path / 'whole'}"]
    parts = [*common, f"run_dir={tmp_path / 'parts'}", "data.num_workers=1"]
    run_distributed_test(train_in_turn, 2, tiny_config, [whole, [*parts, "training.stop_after=5"], parts], timeout=240)

    per_epoch = manifest.train.samples // BATCH * BATCH
    expected, skipped = [], 0
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, per_epoch)
        shards, rows = EpochOrder(manifest.train.counts, 0, epoch, WINDOW)[position : position + BATCH]
        skipped += int(((shards == 2) | ((shards == 3) & (rows == 5))).sum())
        expected.append(skipped)
    for name in ("whole", "parts"):
        assert [record["skipped_samples"] for record in metrics(tmp_path / name)] == expected
        assert [r["loss"] for r in metrics(tmp_path / name)] == [r["loss"] for r in metrics(tmp_path / "whole")]
    assert expected[-1] > expected[0] and expected[-1] > manifest.train.shards[2].samples
    log = (tmp_path / "whole" / "logs" / "rank_00000.log").read_text()
    assert log.count("WARNING") == 2
    assert "missing file: " in log and "train-000003.tar, key 00000012: its bytes are not those that were" in log


def test_statistics_of_embeddings_leave_damaged_clips_out(tmp_path: Path) -> None:
    manifest = make_tiny_clips(tmp_path / "clips", "jpeg")
    (manifest.folder / "train-000001.tar").unlink()  # clips 3, 4 and 5
    mixture = Mixture.of({"clips": manifest}, {"clips": 1.0})
    encoder = build_encoder("pixels:2")
    preprocess = FramePreprocessor(torch.device("cpu"), encoder)
    with pytest.raises(DataError, match=r"missing file: .*train-000001\.tar"):
        embedding_statistics(preprocess, mixture, tmp_path / "run")
    mean, std = embedding_statistics(preprocess, mixture, tmp_path / "run", skip=True)
    frames = torch.from_numpy(tiny_frames("train"))
    intact = encoder.encode(torch.cat([frames[:3], frames[6:]]).flatten(0, 1)).double()
    assert abs(mean - intact.mean()) < 0.01 and abs(std - intact.std()) < 0.01
