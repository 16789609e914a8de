"""Evaluation of models of video, and the summary that `make train-video` ends with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ebwm_dist.config.services import EvaluationConfig
from ebwm_dist.data.format.manifest import Manifest, Split
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.data.format.video_codec import encode_jpeg
from ebwm_dist.data.format.writer import ClipWriter
from ebwm_dist.distributed import join
from ebwm_dist.evaluation.errors_by_step import evaluate_shard, merge
from ebwm_dist.evaluation.evaluate import evaluate_runs, measure_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.evaluation.predictions import tabulate
from ebwm_dist.evaluation.suite import calibration
from ebwm_dist.evaluation.true_frames import energies_of, wrong_frames
from ebwm_dist.evaluation.uncertainty import spearman
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from ebwm_dist.run import Run
from launchers.evaluate import SUMMARY_BATCH_SIZE, main
from tests.made_runs import finished_run

FRAMES, CLIPS = 5, {"train": 8, "val": SUMMARY_BATCH_SIZE + 3}
CONFIG = """
model: {variant: time_embed, num_landscapes: 2, embedding_dim: 12, dim: 16, num_layers: 1, num_heads: 2}
mcmc: {num_steps: 2, step_size: 1.0, initial_state: most_recent_embedding}
optimizer: {lr: 3.0e-3, warmup_steps: 1}
training: {max_steps: 3, global_batch_size: 4, micro_batch_size: 4}
data: {sequence_length: 4, encoder: "pixels:2"}
"""
PATCHES = [
    *("model.embedding_dim=3", "model.block_size=4", "model.block_shape=[2,2]", "model.prefix=block"),
    *("data.sequence_length=16", "model.variant=default", "model.num_landscapes=1"),
]


def make_clips(folder: Path, seed: int) -> Manifest:
    """Make clips whose colours drift; one of those held out has a scene change."""
    content = ClipFormat(frames=FRAMES, frame_interval=0.1, height=16, width=16, storage="jpeg")
    generator, splits = np.random.default_rng(seed), {}
    folder.mkdir()
    for split, count in CLIPS.items():
        writer = ClipWriter(folder, split, content, 16)
        for number in range(count):
            first, drift = generator.integers(60, 120, 3), generator.integers(-9, 9, 3)
            colours = first + drift * np.arange(FRAMES)[:, None]
            colours[-1] += 120 * (split == "val" and number == 0)
            frames = np.broadcast_to(colours[:, None, None], (FRAMES, 16, 16, 3)).astype(np.uint8)
            writer.write([encode_jpeg(frame) for frame in frames], {"video": "a"})
        writer.close()
        splits[split] = Split(tuple(writer.shards), 1, {"videos": 1, "frames": count * FRAMES})
    manifest = Manifest(folder, content, splits, ())
    manifest.save()
    return manifest


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `ebwm` and `ar`, `mixed` on two data sets, and of frames of patches all kinds."""
    folder = tmp_path_factory.mktemp("runs")
    config, clips = folder / "tiny.yaml", make_clips(folder / "clips", 0)
    config.write_text(CONFIG)
    finished_run(config, clips, folder / "ebwm")
    finished_run(config, clips, folder / "ar", ["model.kind=ar"])
    other = make_clips(folder / "other", 1)
    weights = f"data.mixture={{{clips.folder}: 1, {other.folder}: 3}}"
    finished_run(config, clips, folder / "mixed", [weights])
    for kind in ("ebt", "ar", "dit"):
        finished_run(config, clips, folder / f"patches_{kind}", [*PATCHES, f"model.kind={kind}"])
    return folder


def all_clips(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings [N, S+1, E] of the held-out clips, and their ids."""
    data = run.validation_data()
    (batch,) = data.batches(CLIPS["val"], CLIPS["val"])
    return data.preprocess(batch.observed), batch.sample_ids


def test_candidates_that_are_all_the_same_are_left_out(runs: Path, tmp_path: Path) -> None:
    file, page = evaluate_runs(runs / "ebwm", runs / "ar", None, tmp_path, Options(batch_size=4), join())
    found = json.loads(file.read_text())
    assert [way["candidates"] for way in found["model"]["thinking"]] == [1] * 6
    assert found["model"]["by_steps"]["copy_loss"] > 0 and found["model"]["by_steps"]["scene_changes"] == 1
    assert set(found["model"]["by_steps"]["frames"]) == {"copy", *map(str, range(9))}
    assert set(found["baseline"]["by_steps"]["frames"]) == {"copy", "1"}
    assert "1 frames that start another scene" in page.read_text() and "a frame of another clip" in page.read_text()


@pytest.mark.parametrize("kind", ["ebwm", "ar"])
def test_how_far_a_frame_moves_and_its_energy_falls(runs: Path, kind: str) -> None:
    """Against the model's own evaluation, which takes the same steps from a copy of the last frame."""
    run = Run(runs / kind)
    data = run.validation_data()
    table = tabulate(run.model, data.batches(7, CLIPS["val"]), Thinking(), join(), data.preprocess)
    observed, ids = all_clips(run)
    assert table.entropies is None and table.moved is not None
    if isinstance(run.model, AutoregressiveTransformer):
        predicted = run.model.predict(observed[:, :-1])
        assert table.energy_drops is None
    else:
        start, *_, (energy, predicted) = run.model.refine(observed[:, :-1], observed[:, :-1], 2, ids)
        assert table.energy_drops is not None
        torch.testing.assert_close(table.energy_drops, (start[0] - energy).double(), rtol=1e-4, atol=1e-5)
    moved = (predicted - observed[:, :-1]).square().mean(-1)
    torch.testing.assert_close(table.moved, moved.double(), rtol=1e-4, atol=1e-7)
    found = calibration(table)
    assert found["change of the frame"]["spearman"] == pytest.approx(
        spearman(table.moved.flatten(), table.losses.flatten())
    )


def test_a_mixture_is_evaluated_in_shares(runs: Path) -> None:
    """A quarter of the clips are of the first data set; shards give the figures of the whole."""
    options = Options(steps=(1,), max_sequences=16, batch_size=4, only_errors=True)
    found = measure_runs([Run(runs / "mixed"), Run(runs / "ebwm")], None, options, join())
    assert found["data"]["sequences"] == 16 and found["data"]["folder"] == f"{runs / 'clips'} and {runs / 'other'}"
    settings = EvaluationConfig(max_mcmc_steps=1, max_sequences=16, batch_size=4)
    (checkpoint,) = (runs / "mixed" / "checkpoints").iterdir()
    merged = merge([evaluate_shard(checkpoint, i, 3, settings, torch.device("cpu")) for i in range(3)])
    for key in ("loss", "energy"):
        assert merged[key] == pytest.approx(found["model"]["by_steps"][key], rel=1e-5)
    assert merged["frames"]["1"]["mse"] == pytest.approx(found["model"]["by_steps"]["frames"]["1"]["mse"], rel=1e-5)


def test_summary(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate.py", "--summary", "--run", str(runs / "ebwm"), "--baseline", str(runs / "ar")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    summary = json.loads((runs / "ebwm" / "summary.json").read_text())
    assert list(summary) == [
        "ebwm", "ar", "copy", "energy_of_the_true_frame_is_lower", "clips", "scene_changes", "training_clips",
        "frames", "seconds",
    ]  # fmt: skip
    ebwm, ar = Run(runs / "ebwm"), Run(runs / "ar")
    model, twin = ebwm.model, ar.model
    assert isinstance(model, EnergyBasedTransformer) and isinstance(twin, AutoregressiveTransformer)
    observed, ids = all_clips(ebwm)
    assert len(observed) == summary["clips"] == CLIPS["val"] and summary["scene_changes"] == 1
    assert summary["training_clips"] == CLIPS["train"] and summary["frames"] == 3 * 4 * 4
    kept = torch.ones(CLIPS["val"], FRAMES - 1, dtype=torch.bool)
    kept[0, -1] = False
    target = observed[:, 1:]
    assert summary["copy"]["mse"] == pytest.approx((observed[:, :-1] - target)[kept].square().mean().item(), rel=1e-5)
    assert summary["copy"]["mse_minus_copy"] == [0, 0]
    predicted = twin.predict(observed[:, :-1]).detach()
    assert summary["ar"]["mse"] == pytest.approx((predicted - target)[kept].square().mean().item(), rel=1e-5)
    by_steps = summary["ebwm"]["by_steps"]
    assert list(by_steps) == ["0", "1", "2", "3", "4"] and summary["ebwm"]["trained_steps"] == 2
    before = dict(by_steps["0"])
    before.pop("energy")
    assert before == summary["copy"]  # where it starts
    start = model.space.initial_state(ids, 0, Slice(0, FRAMES - 1), observed[:, :-1])
    *_, (energy, state) = model.refine(observed[:, :-1], start, 4, ids)
    assert by_steps["4"]["mse"] == pytest.approx((state - target)[kept].square().mean().item(), rel=1e-4)
    assert by_steps["4"]["energy"] == pytest.approx(energy.mean().item(), rel=1e-4)
    decode = ebwm.validation_data().preprocess.decode
    pixels = (decode(observed[:, :-1]).double() - decode(target))[kept].square().mean()
    assert summary["copy"]["psnr"] == pytest.approx(10 * np.log10(255**2 / pixels.item()), rel=1e-5)
    lower = summary["energy_of_the_true_frame_is_lower"]
    true = energies_of(model, observed, target[:, 1:, None])
    share = (true < energies_of(model, observed, observed[:, 1:-1, None])).double()
    assert lower["the last frame again"][0] == pytest.approx(share.mean().item())
    elsewhere = observed.roll(-(CLIPS["val"] // 2), 0)
    share = (true < energies_of(model, observed, elsewhere[:, 2:, None])).double()
    assert lower["a frame of another clip"][0] == pytest.approx(share.mean().item())
    assert (runs / "ebwm" / "video.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "copying the last frame" in printed and "scene" in printed and "twin" in printed


def test_summary_of_patches_beside_both_twins(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines = [part for kind in ("ar", "dit") for part in ("--baseline", str(runs / f"patches_{kind}"))]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--summary", "--run", str(runs / "patches_ebt"), *baselines])
    assert main() == 0
    summary = json.loads((runs / "patches_ebt" / "summary.json").read_text())
    run = Run(runs / "patches_ebt")
    observed, ids = all_clips(run)
    assert observed.shape == (CLIPS["val"], FRAMES * 4, 3) and summary["frames"] == 3 * 4 * 4
    whole = Run(runs / "ebwm").validation_data()
    (batch,) = whole.batches(CLIPS["val"], CLIPS["val"])
    frames = whole.preprocess(batch.observed)
    kept = torch.ones(CLIPS["val"], FRAMES - 1, dtype=torch.bool)
    kept[0, -1] = False
    copied = (frames[:, :-1] - frames[:, 1:])[kept].square().mean().item()
    assert summary["copy"]["mse"] == pytest.approx(copied, rel=1e-5) and summary["scene_changes"] == 1
    assert isinstance(run.model, EnergyBasedTransformer)
    *_, (energy, state) = run.model.refine(observed[:, :-4], observed[:, :-4], 4, ids)
    wrong = (state - observed[:, 4:]).unflatten(1, (-1, 4)).square().mean((2, 3))
    last = summary["ebwm"]["by_steps"]["4"]
    assert last["mse"] == pytest.approx(wrong[kept].mean().item(), rel=1e-4)
    assert last["energy"] == pytest.approx(energy.mean().item(), rel=1e-4)
    assert list(summary["dit"]["by_passes"]) == ["3", "10", "50"]
    assert summary["dit"]["mse"] == summary["dit"]["by_passes"]["50"]["mse"] and "by_passes" not in summary["ar"]
    assert (runs / "patches_ebt" / "video.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "diffusion twin, 50 passes" in printed and "diffusion twin, 3 passes" in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, *baselines[:2]])
    assert main() == 1 and "two twins have the same model.kind" in capsys.readouterr().err


def test_losses_of_noise_are_compared_with_no_others(runs: Path, tmp_path: Path) -> None:
    options = Options(batch_size=8, max_sequences=8, candidates=(1,))
    file, page = evaluate_runs(runs / "patches_ebt", runs / "patches_dit", None, tmp_path, options, join())
    found = json.loads(file.read_text())
    assert "equal_flops" not in found and "At equal training FLOPs" not in page.read_text()
    assert found["model"]["by_steps"]["copy_loss"] > 0 and "copy_loss" not in found["baseline"]["by_steps"]
    assert set(found["baseline"]["by_steps"]["frames"]) == {"copy", "3", "10", "50"}


@pytest.mark.parametrize("name", ["ebwm", "patches_ebt"])
def test_energies_are_those_of_candidates_in_their_place(runs: Path, name: str) -> None:
    run = Run(runs / name)
    assert isinstance(run.model, EnergyBasedTransformer)
    observed, _ = all_clips(run)
    size = run.model.layout.block_size
    frames = observed.unflatten(1, (FRAMES, size))
    true = energies_of(run.model, observed, frames[:, 2:])
    assert torch.allclose(true, run.model.layout.mean(run.model.energies(observed))[:, 1:], atol=1e-5)
    wrong = energies_of(run.model, observed, frames[:, 1:-1])
    changed = torch.cat((frames[:, :3], frames[:, 2:3], frames[:, 4:]), 1).flatten(1, 2)  # the third frame again
    alone = run.model.layout.mean(run.model.energies(changed))
    assert torch.allclose(wrong[:, 1], alone[:, 2], atol=1e-5) and not torch.allclose(wrong, true, atol=1e-5)


def test_a_frame_of_patches_is_one_row(runs: Path) -> None:
    """Its loss and its move are means over the patches, and its energy is that of the state."""
    run = Run(runs / "patches_ebt")
    data = run.validation_data()
    table = tabulate(run.model, data.batches(7, CLIPS["val"]), Thinking(), join(), data.preprocess)
    observed, ids = all_clips(run)
    assert isinstance(run.model, EnergyBasedTransformer) and table.moved is not None and table.energies is not None
    *_, (energy, predicted) = run.model.refine(observed[:, :-4], observed[:, :-4], 2, ids)
    moved = (predicted - observed[:, :-4]).unflatten(1, (-1, 4)).square().mean((2, 3))
    torch.testing.assert_close(table.moved, moved.double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(table.energies, energy[:, ::4].double(), rtol=1e-4, atol=1e-5)
    assert table.target_mask.shape == (CLIPS["val"], FRAMES - 1)


def test_wrong_frames_never_are_the_true_ones() -> None:
    clips = torch.arange(2 * 9).view(2, 9, 1)
    wrong = wrong_frames(clips, clips.flip(0))
    assert len(wrong) == 4
    for candidates in wrong.values():
        assert candidates.shape == (2, 7, 1) and (candidates != clips[:, 2:]).all()
    distance = {name: (candidates - clips[:, 2:]).abs() for name, candidates in wrong.items()}
    assert [int(x.min()) for x in distance.values()] == [1, 2, 3, 9]
