"""Held-out video is rolled out as the model predicts it frame by frame, and written as pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ebwm_dist.errors import UserError
from ebwm_dist.inference.export import export_run
from ebwm_dist.inference.video import roll_out_held_out
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.run import Run
from launchers.generate import main
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_shards import DIM, FRAMES, make_tiny_clips, make_tiny_latents, tiny_frames

ON_VIDEO = ["mcmc.initial_state=most_recent_embedding", f"data.sequence_length={FRAMES - 1}"]
ON_CLIPS = [*ON_VIDEO, "data.encoder=pixels:2", "model.embedding_dim=12"]
IN_PATCHES = [
    *("model.embedding_dim=3", "model.block_size=4", "model.block_shape=[2,2]", "model.prefix=block"),
    f"data.sequence_length={4 * (FRAMES - 1)}",
]
KINDS = ("ebt", "ar", "dit")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    main()


@pytest.mark.parametrize(("kind", "frames"), [(k, f) for k in KINDS for f in ([], IN_PATCHES)])
def test_clips_are_continued_in_pictures(
    kind: str, frames: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_tiny_clips(tmp_path / "clips", "jpeg")
    finished_run(write_config(tmp_path), clips, tmp_path / "run", [*ON_CLIPS, *frames, f"model.kind={kind}"])
    model = export_run(Run(tmp_path / "run"), tmp_path / "model")
    options: list[object] = {"ebt": ["--think-steps", 3, "--energy-tolerance", 1e-3], "dit": ["--passes", 4]}.get(
        kind, []
    )
    common = ["--checkpoint", model, "--samples", 2, "--observe", 1]
    run(monkeypatch, *common, "--json", "--out", tmp_path / "out", *options)
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 2 and all(len(record["squared_errors"]) == FRAMES - 1 for record in records)
    for record in records if kind == "ebt" else []:
        assert [len(energies) for energies in record["energies"]] == [steps + 1 for steps in record["steps"]]
    # Six held-out clips, so the first and the fourth; frames of one colour each, which 2 x 2 pixels keep.
    with Image.open(tmp_path / "out" / "sample-1.png") as strip, Image.open(tmp_path / "out" / "sample-1.gif") as gif:
        side = strip.height // 2
        assert strip.width == FRAMES * side >= FRAMES * 64 and gif.n_frames == FRAMES
        for frame in range(FRAMES):
            shown = strip.getpixel((frame * side + side // 2, side // 2))
            assert max(abs(a - int(b)) for a, b in zip(shown, tiny_frames("val")[3, frame, 0, 0], strict=True)) <= 3
        assert strip.getpixel((5, side + 5)) == strip.getpixel((5, 5))  # what was observed is the same in both rows
    run(monkeypatch, *common, *options)
    assert capsys.readouterr().out.count("squared error of each new frame") == 2


def test_latents_are_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, model = make_tiny_latents(tmp_path / "latents"), tmp_path / "run"
    finished_run(write_config(tmp_path), latents, model, [*ON_VIDEO, f"model.embedding_dim={DIM}"])
    run(monkeypatch, "--checkpoint", model, "--samples", 2, "--observe", 2, "--json")
    assert len(json.loads(capsys.readouterr().out)[0]["squared_errors"]) == 1
    with pytest.raises(UserError, match="3 observed frames: the samples have 3, so at least 1 and at most 2"):
        run(monkeypatch, "--checkpoint", model, "--observe", FRAMES)
    with pytest.raises(UserError, match="0 samples: continue at least 1"):
        run(monkeypatch, "--checkpoint", model, "--samples", 0)


def test_a_checkpoint_and_a_mixture_are_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run on clips, by the name of its checkpoint; samples of both data sets, or of other data."""
    one, other = (make_tiny_clips(tmp_path / name, "jpeg", seed) for seed, name in enumerate("ab"))
    mixture = f"data.mixture={{{one.folder}: 1, {other.folder}: 1}}"
    finished_run(write_config(tmp_path), one, tmp_path / "run", [*ON_CLIPS, mixture])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    run(monkeypatch, "--checkpoint", checkpoint, "--samples", 4, "--json")
    samples = [record["sample"] for record in json.loads(capsys.readouterr().out)]
    assert (
        sorted(sample.rpartition("/val-")[0] for sample in samples) == [str(one.folder)] * 2 + [str(other.folder)] * 2
    )
    run(monkeypatch, "--checkpoint", checkpoint, "--samples", 1, "--json", "--data", other.folder)
    (record,) = json.loads(capsys.readouterr().out)
    assert record["sample"].startswith("val-") and len(record["squared_errors"]) == FRAMES - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_roll_out_of_patches_goes_on_from_its_own_frames(kind: str, tmp_path: Path) -> None:
    """Frame by frame, from all frames so far and without a cache; the errors are those of whole frames."""
    clips = make_tiny_clips(tmp_path / "clips", "jpeg")
    finished_run(write_config(tmp_path), clips, tmp_path / "run", [*ON_CLIPS, *IN_PATCHES, f"model.kind={kind}"])
    run = Run(tmp_path / "run")
    found = roll_out_held_out(run, samples=2, observed=1, seed=5)
    assert found.truth.shape == (2, FRAMES, 4, 3) and found.predicted.shape == (2, FRAMES - 1, 4, 3)
    model, seen = run.model, found.truth[:, 0]
    for number in range(FRAMES - 1):
        if isinstance(model, DiffusionModel):
            ids = torch.tensor([mix_seed(seed, 4 * number) for seed in (5, 6)])
            positions = torch.arange(4 * number, 4 * number + 4).expand(2, 4)
            frame = model.sample(seen, ids, model.seed, start=positions)
        elif isinstance(model, EnergyBasedTransformer):
            frame = list(model.refine(seen, model.layout.most_recent(seen), 2, torch.arange(2)))[-1][1][:, -4:]
        else:
            frame = model.predict(seen)[:, -4:]
        torch.testing.assert_close(found.predicted[:, number], frame, rtol=1e-4, atol=1e-5)
        seen = torch.cat((seen, frame), 1)
    errors = (found.predicted - found.truth[:, 1:]).square().mean((2, 3))
    for record, row in zip(found.records(), errors, strict=True):
        assert record["squared_errors"] == pytest.approx(row.tolist())
        assert ("energies" in record) == (kind == "ebt")


def test_models_of_other_states_roll_out_no_frames(tmp_path: Path) -> None:
    clips = make_tiny_clips(tmp_path / "clips", "jpeg")
    halves = [*IN_PATCHES, "model.block_size=2", "model.block_shape=null", "data.sequence_length=10"]
    finished_run(write_config(tmp_path), clips, tmp_path / "run", [*ON_CLIPS, *halves])
    with pytest.raises(UserError, match="predicts no whole frames after a first one"):
        roll_out_held_out(Run(tmp_path / "run"), samples=1, observed=1)
