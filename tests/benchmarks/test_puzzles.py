"""Puzzles as blocks: what is asked for and learned, and the page that shows the stored results."""

from __future__ import annotations

import pytest
import torch

from benchmarks import puzzles as benchmark
from benchmarks.puzzles import PAD, RESULTS, SIZES, TABLE, build, cells, changed, measure, page, train
from ebwm_dist.files import read_records
from ebwm_dist.mcmc.diffusion import DiffusionModel

FOUR = SIZES[4]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "HELD_OUT", 4)


def test_page_shows_the_stored_results() -> None:
    assert TABLE.read_text() == "\n".join(page(read_records(RESULTS)))


@pytest.mark.parametrize("size", SIZES)
def test_only_blanks_are_learned_and_held_out_grids_are_never_trained(size: int) -> None:
    puzzles = SIZES[size]
    train, held_out = (puzzles.samples(40, "x", 1, 6, held_out=held_out) for held_out in (False, True))
    blank, answers = puzzles.blanks(train), train[:, puzzles.length :]
    assert blank.any(-1).all() and (train[:, : puzzles.length] == answers)[~blank].all()
    assert answers.unique().tolist() == [*range(1, size + 1)] and puzzles.blank not in answers
    targets = puzzles.targets(train)[:, puzzles.length - 1 :]
    assert torch.equal(targets != PAD, blank) and torch.equal(targets[blank], answers[blank])
    assert not {tuple(row) for row in answers.tolist()} & {tuple(row) for row in held_out[:, puzzles.length :].tolist()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ebt, bilinear", "diffusion"])
def test_every_number_of_blanks_and_steps_is_measured(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    puzzles = SIZES[size]
    monkeypatch.delitem(puzzles.__dict__, "held_out", raising=False)
    recipe = changed(name, ["model.dim=16"])
    right = measure(build(recipe, puzzles, 1, 0), recipe, puzzles)
    assert set(right) == {"1", "2", "4", "8", "16"} and str(puzzles.asked[0]) in right["1"]
    assert all(0 <= share <= 1 for of_step in right.values() for share in of_step.values())


def test_a_diffusion_model_sees_digits_and_blanks_as_numbers() -> None:
    samples = FOUR.samples(8, "x", 1, 6, held_out=False)
    found = cells(samples, FOUR, 0.5)
    assert found.shape == (8, 2 * FOUR.length, FOUR.blank) and torch.equal(found.argmax(-1) + 1, samples)
    assert found.unique().tolist() == [-0.5, 0.5] and (found[:, FOUR.length :, -1] == -0.5).all()
    recipe = changed("diffusion", ["noise.low=0.25", "model.dim=16"])
    model = build(recipe, FOUR, 1, 0)
    assert isinstance(model, DiffusionModel) and model.noise_config.low == 0.25
    assert train(model, recipe, FOUR, samples, 1) > 0
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
