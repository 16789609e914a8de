"""From two trained runs on clips to the comparison that `make train-video` ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ebwm_dist.data.format.manifest import Manifest, Split
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.data.format.video_codec import encode_jpeg
from ebwm_dist.data.format.writer import ClipWriter
from ebwm_dist.distributed import join
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.run import evaluate_runs
from ebwm_dist.evaluation.suite import Options
from ebwm_dist.evaluation.video import BATCH_SIZE, Finished, compare, energies_of, wrong_frames
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from tests.distributed import run_distributed_test
from tests.runs import train_in_turn

CPU = torch.device("cpu")
FRAMES, CLIPS = 5, {"train": 8, "val": BATCH_SIZE + 3}
CONFIG = """
model: {variant: time_embed, num_landscapes: 2, embedding_dim: 12, dim: 16, num_layers: 1, num_heads: 2}
mcmc: {num_steps: 2, step_size: 1.0, initial_state: most_recent_embedding}
optimizer: {lr: 3.0e-3, warmup_steps: 1}
training: {max_steps: 3, global_batch_size: 4, micro_batch_size: 4}
data: {sequence_length: 4, encoder: "pixels:2"}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `ebwm` and `ar`, trained on clips whose colours drift; one has a scene change."""
    folder = tmp_path_factory.mktemp("runs")
    sample_format = ClipFormat(frames=FRAMES, frame_interval=0.1, height=16, width=16, storage="jpeg")
    generator, splits = np.random.default_rng(0), {}
    (folder / "clips").mkdir()
    for split, count in CLIPS.items():
        writer = ClipWriter(folder / "clips", split, sample_format, 16)
        for number in range(count):
            first, drift = generator.integers(60, 120, 3), generator.integers(-9, 9, 3)
            colours = first + drift * np.arange(FRAMES)[:, None]
            colours[-1] += 120 * (split == "val" and number == 0)
            frames = np.broadcast_to(colours[:, None, None], (FRAMES, 16, 16, 3)).astype(np.uint8)
            writer.write([encode_jpeg(frame) for frame in frames], {"video": "a"})
        writer.close()
        splits[split] = Split(tuple(writer.shards), 1, {"videos": 1, "frames": count * FRAMES})
    Manifest(folder / "clips", sample_format, splits, ()).save()
    (folder / "tiny.yaml").write_text(CONFIG)
    overrides = [
        [f"data.path={folder / 'clips'}", f"model.kind={kind}", f"run_dir={folder / name}"]
        for kind, name in (("ebt", "ebwm"), ("ar", "ar"))
    ]
    run_distributed_test(train_in_turn, 1, folder / "tiny.yaml", overrides)
    return folder


def test_the_suite_takes_a_model_whose_candidates_are_all_the_same(runs: Path, tmp_path: Path) -> None:
    file, page = evaluate_runs(runs / "ebwm", runs / "ar", None, tmp_path, Options(batch_size=4), join())
    found = json.loads(file.read_text())
    assert [way["candidates"] for way in found["model"]["thinking"]] == [1] * 5
    assert found["model"]["by_steps"]["copy_loss"] > 0 and page.stat().st_size > 10_000


def test_summary(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(runs / "ebwm", runs / "ar")
    summary = json.loads((runs / "ebwm" / "summary.json").read_text())
    ebwm, ar = Finished.load(runs / "ebwm", CPU), Finished.load(runs / "ar", CPU)
    observed = torch.cat([x for x, _ in ebwm.batches()])
    ids = torch.cat([ids for _, ids in ebwm.batches()])
    assert len(observed) == summary["clips"] == CLIPS["val"] and summary["scene_changes"] == 1
    kept = torch.ones(CLIPS["val"], FRAMES - 1, dtype=torch.bool)
    kept[0, -1] = False
    target = observed[:, 1:]
    assert summary["copy"]["mse"] == pytest.approx((observed[:, :-1] - target)[kept].square().mean().item(), rel=1e-5)
    assert summary["copy"]["mse_minus_copy"] == [0, 0]
    twin = ar.model.predict(observed[:, :-1]).detach()
    assert summary["ar"]["mse"] == pytest.approx((twin - target)[kept].square().mean().item(), rel=1e-5)
    by_steps = summary["ebwm"]["by_steps"]
    assert list(by_steps) == ["0", "1", "2", "3", "4"] and summary["ebwm"]["trained_steps"] == 2
    before = dict(by_steps["0"])
    before.pop("energy")
    assert before == summary["copy"]  # where it starts
    *_, (energy, state) = ebwm.model.refine(
        observed[:, :-1], ebwm.model.space.start(ids, 0, 0, FRAMES - 1, observed[:, :-1]), 4, ids
    )
    assert by_steps["4"]["mse"] == pytest.approx((state - target)[kept].square().mean().item(), rel=1e-4)
    assert by_steps["4"]["energy"] == pytest.approx(energy.mean().item(), rel=1e-4)
    pixels = (ebwm.observer.decode(observed[:, :-1]).double() - ebwm.observer.decode(target))[kept].square().mean()
    assert summary["copy"]["psnr"] == pytest.approx(10 * np.log10(255**2 / pixels.item()), rel=1e-5)
    assert all(0 <= share <= 1 for share, _ in summary["energy_of_the_true_frame_is_lower"].values())
    assert (runs / "ebwm" / "video.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "copying the last frame" in printed and "scene" in printed and "twin" in printed


def test_energies_are_those_of_candidates_in_their_place(runs: Path) -> None:
    run = Finished.load(runs / "ebwm", CPU)
    assert isinstance(run.model, EnergyBasedTransformer)
    observed, _ = next(run.batches())
    true = energies_of(run.model, observed, observed[:, 2:])
    assert torch.allclose(true, run.model.energies(observed)[:, 1:], atol=1e-5)


def test_wrong_frames_never_are_the_true_ones() -> None:
    clips = torch.arange(2 * 9).view(2, 9, 1)
    wrong = wrong_frames(clips, clips.flip(0))
    assert len(wrong) == 4
    for candidates in wrong.values():
        assert candidates.shape == (2, 7, 1) and (candidates != clips[:, 2:]).all()
    distance = {name: (candidates - clips[:, 2:]).abs() for name, candidates in wrong.items()}
    assert [int(x.min()) for x in distance.values()] == [1, 2, 3, 9]


def test_runs_that_cannot_be_compared_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "ar", tmp_path / "ar")
    config = tmp_path / "ar" / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 3", "max_steps: 4"))
    with pytest.raises(UserError, match=r"ar has done 3 of 4 steps: run the command"):
        compare(runs / "ebwm", tmp_path / "ar")
