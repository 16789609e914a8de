"""Noise removed by runs on images: PSNR against its formula, the comparison with a twin, and pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ebwm_dist
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.denoising import noise_like, psnr_by_passes
from ebwm_dist.evaluation.denoising_summary import table
from ebwm_dist.evaluation.evaluate import evaluate_runs, summarise_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.inference import images
from ebwm_dist.mcmc import noise
from ebwm_dist.prepare.image_shards import Packing, pack_images
from ebwm_dist.run import Run
from launchers import generate
from tests.made_runs import finished_run

CONFIG = """
model:
  {embedding_dim: 4, block_size: 4, block_shape: [2, 2], prefix: none, dim: 16, num_layers: 1, num_heads: 2}
mcmc: {num_steps: 2, step_size: 3.0, initial_state: noised}
noise: {low: 0.1, high: 1.0, num_timesteps: 400}
training: {max_steps: 2, global_batch_size: 4, micro_batch_size: 4}
data: {sequence_length: 4, encoder: grey:4/2}
"""
CLASSES = ["model.num_classes=3", "model.prefix=token"]
ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of finished runs of both kinds, with random weights, and one that knows classes."""
    folder = tmp_path_factory.mktemp("denoising")
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    np.savez(folder / "a.npz", images=images, labels=np.arange(40) % 3)
    pack_images([folder / "a.npz"], folder / "data", Packing(holdout_fraction=0.2))
    (folder / "tiny.yaml").write_text(CONFIG)
    manifest = Manifest.load(folder / "data")
    for name, more in {"ebt": [], "dit": ["model.kind=dit"], "classes": CLASSES}.items():
        finished_run(folder / "tiny.yaml", manifest, folder / name, more)
    return folder


def test_psnr_is_that_of_the_pictures(folder: Path) -> None:
    run = Run(folder / "ebt")
    data = run.validation_data()
    batches = list(data.batches(4, data.samples))
    found = psnr_by_passes(run, data, [0.5], [2, 1], batches, ALONE)["0.5"]
    (whole,) = data.batches(data.samples, data.samples)
    states = data.preprocess(whole.observed)
    noised = states + 0.5 * noise_like(states, whole.sample_ids)
    for number, (_, state) in enumerate(run.model.refine(states[:, :0], noised, 2, whole.sample_ids)):
        wrong = (data.preprocess.decode(state).double() - whole.observed.double()).square().mean()
        assert found[str(number)] == pytest.approx(10 * math.log10(255**2 / wrong.item()), rel=1e-6)
    assert len(set(found.values())) == 3


def test_both_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(batch_size=8)
    files = summarise_runs(folder / "ebt", [folder / "dit"], None, None, options, ALONE)
    summary = json.loads((folder / "ebt" / "summary.json").read_text())
    assert [file.name for file in files] == ["summary.json", "denoising.png"] and files[1].is_file()
    assert summary["trained_noise"] == [0.1, 1.0] and summary["seconds"] > 0
    levels = ["0.325", "0.55", "0.775", "1", "1.5", "2"]
    assert list(summary["ebt"]["psnr"]) == list(summary["dit"]["psnr"]) == levels
    assert list(summary["dit"]["psnr"]["2"]) == ["0", "1", "3", "10", "30", "100", "300"]
    assert summary["ebt"]["psnr"]["2"]["0"] == summary["dit"]["psnr"]["2"]["0"]
    output = capsys.readouterr().out
    assert output.count("beyond the trained") == 3 and "23.29 dB after 3 passes" in output
    for of_model, value in (("ebt", 20.0), ("dit", 10.0)):
        for by_passes in summary[of_model]["psnr"].values():
            by_passes |= dict.fromkeys(by_passes, value)
    assert table(summary).count("at least as good as DiT 10.00 after 30 (+10.00)") == 2
    with pytest.raises(UserError, match="has model.kind = ebt, dit is compared in its place"):
        summarise_runs(folder / "ebt", [folder / "ebt"], None, None, options, ALONE)


def test_a_run_is_measured_alone(folder: Path) -> None:
    for name, passes in (("classes", {"0", "1", "2"}), ("dit", {"0", "1", "3", "10", "30", "100", "300"})):
        (file,) = evaluate_runs(folder / name, None, None, None, Options(steps=(1,), batch_size=8), ALONE)
        found = json.loads(file.read_text())["model"]
        assert set(found["psnr"]["1"]) == passes and found["parameters"] > 1000
        assert len(found["by_steps"]["loss"]) == (1 if name == "dit" else 2)


def test_an_energy_model_makes_images_level_by_level(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each refinement ends at the same image, the noise fades evenly, and in the end nothing else is there."""
    model, ids = Run(folder / "ebt").model, torch.arange(3, 5)
    image, entered = torch.randn(2, 4, 4), []

    def refine(_: torch.Tensor, state: torch.Tensor, steps: int, sample_ids: torch.Tensor) -> object:
        assert steps == 2 and sample_ids is ids
        entered.append(state)
        return iter([(None, state), (None, image)])

    monkeypatch.setattr(model, "refine", refine)
    drawn = noise.normal(7, ids, noise.INITIAL, 0, 4, 4)
    assert torch.equal(images.generate(model, torch.zeros(2, 0, 4), ids, 7, 5), image) and len(entered) == 5
    assert torch.equal(entered[0], drawn)  # of the largest level, which is 1
    for share, state in zip((0.8, 0.6, 0.4, 0.2), entered[1:], strict=True):
        torch.testing.assert_close(state, image + share * (drawn - image))


def test_new_images_are_shown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, *more: str) -> Image.Image:
        arguments = ["generate.py", "--checkpoint", str(folder / name), "--out", str(tmp_path), "--samples", "2", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        generate.main()
        with Image.open(tmp_path / "images.png") as image:
            return image.copy()

    assert made("dit", "--passes", "3").size == (2 * 64 + 2, 64)
    assert made("classes").size == (2 * 64 + 2, 4 * 64 + 6)  # a row for each class, and one for none
    first, second, third = (np.asarray(made("classes", "--class", name)) for name in ("0", "0", "2"))
    assert first.shape == (64, 130, 3) and (first == second).all() and (first != third).any()
    for arguments, message in (
        (("classes", "--class", "9"), "knows 0, 1, 2, none"),
        (("ebt", "--class", "1"), "no cl"),
        (("ebt", "--samples", "0"), "--samples 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            made(*arguments)
    with pytest.raises(UserError, match="continues none: launchers/generate.py makes new ones"):
        ebwm_dist.load(folder / "ebt").roll_out([torch.zeros(0, 4)], 1)
