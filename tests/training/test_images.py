"""Training on images: energy model and diffusion transformer, resumed, on other ranks, with and without classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.encoders.preprocessing import build_preprocessor, check_format
from ebwm_dist.errors import ConfigError
from ebwm_dist.prepare.image_shards import Packing, pack_images
from ebwm_dist.training.dry_run import describe
from ebwm_dist.training.train import load_data
from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, train_in_turn

CONFIG = """
model:
  {embedding_dim: 4, block_size: 4, block_shape: [2, 2], prefix: none, dim: 16, num_layers: 2, num_heads: 2}
mcmc: {num_steps: 1, max_num_steps: 2, step_size: 3.0, initial_state: noised}
noise: {low: 0.1, high: 1.0}
optimizer: {lr: 3.0e-3, warmup_steps: 2}
training: {max_steps: 9, global_batch_size: 4, micro_batch_size: 2, log_interval: 5, step_timeout: 60}
data: {sequence_length: 4, shuffle_window: 2, encoder: grey:4/2}
validation: {interval: 3, max_sequences: 5}
checkpoint: {interval: 100}
"""
CLASSES = ["model.num_classes=3", "model.prefix=token", "data.class_dropout=0.3"]
DIT = ["model.kind=dit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of three classes, and a configuration."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    np.savez(folder / "a.npz", images=images, labels=np.arange(40) % 3)
    pack_images([folder / "a.npz"], folder / "data", Packing(holdout_fraction=0.2, images_per_shard=16))
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


def overrides(folder: Path, run_dir: Path, *more: str) -> list[str]:
    return [f"data.path={folder / 'data'}", f"run_dir={run_dir}", *more]


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """4 + 5 steps on one rank give everything that 9 give."""
    cases = {"ebt": [], "dit": [*DIT, *CLASSES]}
    runs = []
    for name, more in cases.items():
        runs.append(overrides(folder, tmp_path / name / "whole", *more))
        parts = overrides(folder, tmp_path / name / "parts", *more)
        runs += [[*parts, "training.stop_after=4"], parts]
    run_distributed_test(train_in_turn, 1, folder / "tiny.yaml", runs, timeout=240)
    for name in cases:
        assert_equal_runs(tmp_path / name / "parts", tmp_path / name / "whole")
        record = metrics(tmp_path / name / "whole", "val")[-1]
        assert "perplexity" not in record and "copy_loss" not in record
        assert (record["energy_last"] is None) is (name == "dit")


@pytest.mark.slow
def test_ranks_and_stages_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Two ranks at stage 3, with checkpointed blocks, follow one at stage 0: the noise is that of the sample.

    The number of steps is not drawn, as it would be for each micro-batch.
    """
    for name, more in {"ebt": [*CLASSES, "mcmc.max_num_steps=null"], "dit": [*DIT, *CLASSES]}.items():
        for ranks, extra in ((1, ["zero.stage=0"]), (2, ["zero.stage=3", "training.activation_checkpointing=block"])):
            run = overrides(folder, tmp_path / name / str(ranks), "training.micro_batch_size=1", *more, *extra)
            run_distributed_test(train_in_turn, ranks, folder / "tiny.yaml", [run], timeout=200)
        for kind in ("train", "val"):
            one, two = (metrics(tmp_path / name / str(ranks), kind) for ranks in (1, 2))
            losses = [[record["loss"] for record in records] for records in (one, two)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)
            assert len(set(losses[0])) == len(losses[0])


def test_samples_are_patches_after_a_class(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "tiny.yaml", overrides(folder, tmp_path / "run", *CLASSES))
    mixture = load_data(config)
    preprocess = build_preprocessor(config, mixture.sample_format, torch.device("cpu"))
    images = torch.randint(0, 256, (6, 1, 4, 4, 1), dtype=torch.uint8).expand(-1, -1, -1, -1, 3).contiguous()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    observed = preprocess(images, labels)
    assert observed.shape == (6, 5, 4) and torch.equal(observed[:, 0], labels[:, None].expand(-1, 4).float())
    torch.testing.assert_close(observed[:, 2, :2], images[:, 0, 0, 2:, 0] / 127.5 - 1)  # the patch to the right
    assert torch.equal(preprocess.decode(observed[:, 1:]), images)
    assert (preprocess(images)[:, 0] == 3).all()

    batch = Batch(images, torch.arange(100, 106), [], torch.ones(6, dtype=torch.bool), labels=labels)
    shares = []
    for ids in (batch.sample_ids + 1000 * step for step in range(200)):
        batch.sample_ids = ids
        shares.append((preprocess.augment(batch, 0, DataConfig(class_dropout=0.3))[:, 0, 0] == 3).float().mean())
    assert torch.stack(shares).mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.embedding_dim=5"], "embeddings of 16 .*set model.embedding_dim=16, or for patches"),
        (["data.sequence_length=8"], "data.sequence_length is 8, but .*set data.sequence_length=4"),
        (["model.prefix=block"], "are single images, before which nothing is observed: set model.prefix=none"),
        (["model.num_classes=2", "model.prefix=token"], "model.num_classes is 2, but .* have 3 classes"),
        (["model.num_classes=3"], "model.num_classes = 3: needs .*model.prefix = 'token'"),
        (["noise.high=null"], "noise.high = None: mcmc.initial_state = 'noised' needs"),
        (["noise.low=2.0"], "noise.high = 1.0: must be at least noise.low = 2.0"),
        (["model.kind=dit", "model.embedding_dim=null", "data.encoder=null"], "model.kind = 'dit': a diffusion model"),
        (["model.kind=dit", "model.variant=adaln"], "model.variant = 'adaln': model.kind = 'dit' has adaptive norms"),
        (["model.kind=dit", "training.position_parallel=2"], "must be 1 where model.kind = 'dit'"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = load_config(folder / "tiny.yaml", overrides(folder, tmp_path / "run", *changes))
        data = load_data(config)
        check_format(config, data.sample_format)
        build_preprocessor(config, data.sample_format, torch.device("cpu"))


def test_runs_are_described(folder: Path, tmp_path: Path) -> None:
    for more in ([], [*DIT, *CLASSES]):
        text = describe(load_config(folder / "tiny.yaml", overrides(folder, tmp_path / "run", *more)))
        assert "training FLOPs per token: " in text and "tokens: 16 per step" in text


def test_a_missing_library_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(folder / "tiny.yaml", overrides(folder, tmp_path / "run", *DIT))
    monkeypatch.setattr("ebwm_dist.config.launch.find_spec", lambda name: None)
    for begin in (load_data, describe):
        with pytest.raises(ConfigError, match="^model.kind = 'dit': needs diffusers, .*: pip install .*images"):
            begin(config)
