"""Training on video: resumed runs, clips encoded on the fly, and data that does not fit the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.sample_format import TokenFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.encoders import build_encoder
from ebwm_dist.encoders.preprocessing import (
    STATISTICS_FILE,
    FramePreprocessor,
    build_preprocessor,
    check_format,
    embedding_statistics,
)
from ebwm_dist.errors import ConfigError, DataError, UserError
from ebwm_dist.training.train import load_data
from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, train_in_turn
from tests.tiny_shards import DIM, FRAMES, SAMPLES, make_tiny_clips, make_tiny_latents, tiny_frames, tiny_latents

CPU = torch.device("cpu")
CONFIG = f"""
model: {{variant: time_embed, num_landscapes: 2, embedding_dim: {DIM}, dim: 16, num_layers: 2, num_heads: 2}}
mcmc: {{num_steps: 2, step_size: 1.0, initial_state: most_recent_embedding}}
optimizer: {{lr: 3.0e-3, warmup_steps: 2}}
training: {{max_steps: 9, global_batch_size: 4, micro_batch_size: 2, log_interval: 5, step_timeout: 60}}
data: {{sequence_length: {FRAMES - 1}, shuffle_window: 2}}
validation: {{interval: 3, max_sequences: 5}}
checkpoint: {{interval: 100}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `latents` of pixels:1, `clips` and a configuration for the first."""
    folder = tmp_path_factory.mktemp("video")
    make_tiny_latents(folder / "latents")
    make_tiny_clips(folder / "clips", "jpeg")
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


CLIPS = ["data.encoder=pixels:2", "model.embedding_dim=12", "data.min_crop_scale=0.5"]


def overrides(folder: Path, kind: str, run_dir: Path, *more: str) -> list[str]:
    return [f"data.path={folder / kind}", f"run_dir={run_dir}", *(CLIPS if kind == "clips" else []), *more]


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """4 + 5 steps on one rank give everything that 9 give: latents with a replay buffer, clips, and the twin."""
    system_2 = ["model.num_landscapes=1", "mcmc.max_num_steps=3", "mcmc.langevin_noise=0.1", "mcmc.replay_size=4"]
    cases = {"latents": system_2, "clips": [], "ar": ["model.kind=ar"]}
    runs = []
    for name, more in cases.items():
        kind = "clips" if name == "clips" else "latents"
        runs.append(overrides(folder, kind, tmp_path / name / "whole", *more))
        parts = overrides(folder, kind, tmp_path / name / "parts", *more)
        runs += [[*parts, "training.stop_after=4"], parts]
    run_distributed_test(train_in_turn, 1, folder / "tiny.yaml", runs, timeout=240)
    for name in cases:
        assert_equal_runs(tmp_path / name / "parts", tmp_path / name / "whole")
        assert [len(metrics(tmp_path / name / "whole", kind)) for kind in ("train", "val")] == [9, 3]


@pytest.mark.slow
def test_two_ranks_validate_as_one(folder: Path, tmp_path: Path) -> None:
    """5 held-out clips: the last micro-batch is filled up by rows that do not count, in the copy's error as well."""
    runs = {n: overrides(folder, "latents", tmp_path / str(n), "training.max_steps=3") for n in (1, 2)}
    for ranks, run in runs.items():
        run_distributed_test(train_in_turn, ranks, folder / "tiny.yaml", [run], timeout=120)
    (one,), (two,) = (metrics(tmp_path / str(n), "val") for n in (1, 2))
    assert "perplexity" not in one
    observed = torch.from_numpy((tiny_latents("val").astype("float32") - 0.5) / 2)[[0, 1, 2, 3, 4]]
    copied = torch.nn.functional.smooth_l1_loss(observed[:, :-1], observed[:, 1:])
    assert one["copy_loss"] == pytest.approx(copied.item(), rel=1e-5)
    for key in ("copy_loss", "loss_last_step", "energy_first"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_clips_are_encoded_and_normalised(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "tiny.yaml", overrides(folder, "clips", tmp_path / "run"))
    mixture = load_data(config)
    preprocess = build_preprocessor(config, mixture.sample_format, CPU)
    preprocess.mean, preprocess.std = embedding_statistics(preprocess, mixture, tmp_path / "run")
    frames = torch.from_numpy(tiny_frames("train"))
    observed = preprocess(frames)
    assert observed.shape == (SAMPLES["train"], FRAMES, 12)
    assert abs(observed.mean()) < 0.02 and abs(observed.std() - 1) < 0.02  # jpeg changes colours a little
    assert (preprocess.decode(observed).int() - frames[:, :, :2, :2].int()).abs().max() <= 1

    # The same at every later start, whatever the clips are; but never those of another encoder.
    kept = (tmp_path / "run" / STATISTICS_FILE).read_text()
    assert embedding_statistics(preprocess, mixture, tmp_path / "run") == (preprocess.mean, preprocess.std)
    assert (tmp_path / "run" / STATISTICS_FILE).read_text() == kept
    other = FramePreprocessor(CPU, build_encoder("pixels:2/1"))
    with pytest.raises(UserError, match=r"was trained with the encoder pixels:2 .*now it is pixels:2/1 .*new run_dir"):
        embedding_statistics(other, mixture, tmp_path / "run")


def test_data_sets_count_by_their_shares_in_the_statistics(tmp_path: Path) -> None:
    preprocess = FramePreprocessor(CPU, build_encoder("pixels:2"))
    manifests = {str(seed): make_tiny_clips(tmp_path / str(seed), "jpeg", seed) for seed in (1, 2)}
    alone = [
        embedding_statistics(preprocess, Mixture.of({k: m}, {k: 1}), tmp_path / f"run{k}") for k, m in manifests.items()
    ]
    mean, std = embedding_statistics(preprocess, Mixture.of(manifests, {"1": 3, "2": 1}), tmp_path / "run")
    (mean_1, std_1), (mean_2, std_2) = alone
    assert abs(mean_1 - mean_2) > 0.01 and mean == pytest.approx(0.75 * mean_1 + 0.25 * mean_2)
    square = 0.75 * (std_1**2 + mean_1**2) + 0.25 * (std_2**2 + mean_2**2)
    assert std == pytest.approx((square - mean**2) ** 0.5)


def batch_of(frames: torch.Tensor, ids: tuple[int, ...]) -> Batch:
    return Batch(frames, torch.tensor(ids), [], torch.ones(len(ids), dtype=torch.bool))


def test_crops_are_parts_of_their_clips_drawn_anew_for_every_id() -> None:
    """Of frames with a colour for each place and time: crops keep time, and are no larger than asked for."""
    ramp = torch.arange(32, dtype=torch.uint8)
    frames = torch.zeros(3, FRAMES, 32, 32, 3, dtype=torch.uint8)
    frames[..., 0], frames[..., 1] = 7 * ramp[:, None], 7 * ramp
    frames[..., 2] = 50 * torch.arange(FRAMES, dtype=torch.uint8)[:, None, None]
    preprocess = FramePreprocessor(CPU, build_encoder("pixels:32"))

    def cropped(*ids: int, seed: int = 0) -> torch.Tensor:
        data = DataConfig(min_crop_scale=0.5)
        return preprocess.decode(preprocess.augment(batch_of(frames[: len(ids)], ids), seed, data)).int()

    crops = cropped(0, 1, 2)
    assert torch.equal(crops[..., 2], frames[..., 2].int())
    assert torch.equal(crops[:, 0, ..., :2], crops[:, -1, ..., :2])
    heights = crops[:, 0, -1, 0, 0] - crops[:, 0, 0, 0, 0]
    widths = (crops[:, 0, 0, -1, 1] - crops[:, 0, 0, 0, 1]).abs()
    assert (heights >= 7 * 14).all() and (heights <= 7 * 31).all() and len(set(heights.tolist())) == 3
    assert ((heights - widths).abs() <= 1).all()
    assert torch.equal(cropped(2), crops[2:]) and not torch.equal(cropped(2, seed=1), crops[2:])
    assert torch.equal(preprocess.augment(batch_of(frames, (0, 1, 2)), 0, DataConfig()), preprocess(frames))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("latents", ["model.embedding_dim=6"], f"model.embedding_dim is 6, but the latents in .* were made with {DIM}"),
        ("latents", ["data.sequence_length=9"], "data.sequence_length is 9, but the latents in .* were made with 2"),
        ("latents", ["model.embedding_dim=null", "mcmc.initial_state=zeros"], f"null, but .* are video of width {DIM}"),
        ("latents", ["data.encoder=pixels:2"], "data.encoder is 'pixels:2', but .* were made with 'pixels:1'"),
        (
            "clips",
            ["data.encoder=null", "data.min_crop_scale=1"],
            "data.encoder is null, but the clips in .* have to be encoded",
        ),
        (
            "clips",
            ["model.embedding_dim=13"],
            "model.embedding_dim is 13, but data.encoder = 'pixels:2' makes .* of 12",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, kind: str, changes: list[str], message: str
) -> None:
    config = load_config(folder / "tiny.yaml", overrides(folder, kind, tmp_path / "run", *changes))
    with pytest.raises((ConfigError, DataError), match=message):
        build_preprocessor(config, load_data(config).sample_format, CPU)


def test_text_is_refused_by_a_model_of_embeddings(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "tiny.yaml", overrides(folder, "latents", tmp_path / "run"))
    tokens = TokenFormat(2, "uint16", 320, 0, 1, 2, "tokenizer.model", "0" * 64)
    with pytest.raises(
        ConfigError, match=rf"model.embedding_dim is {DIM}, but the tokens in .* are text: set it to null"
    ):
        check_format(config, tokens)
