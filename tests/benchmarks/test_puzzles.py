"""Puzzles as blocks: what is asked for and learned, and the page that shows the stored results."""

from __future__ import annotations

import pytest
import torch

from benchmarks.puzzles import BLANK, PAD, RESULTS, SIZE, TABLE, build, cells, chosen, measure, puzzles, table, train
from ebwm_dist.files import read_records


def test_page_shows_the_stored_results() -> None:
    assert TABLE.read_text() == "\n".join(table(read_records(RESULTS))) + "\n"


def test_only_blanks_are_learned_and_held_out_grids_are_never_trained() -> None:
    train, held_out = (puzzles(40, "x", 1, 6, held_out=held_out) for held_out in (False, True))
    blank = train[:, :SIZE] == BLANK
    assert blank.any(-1).all() and (train[:, :SIZE] == train[:, SIZE:])[~blank].all()
    targets = chosen(train)[:, SIZE - 1 :]
    assert torch.equal(targets != PAD, blank) and torch.equal(targets[blank], train[:, SIZE:][blank])
    assert not {tuple(row) for row in train[:, SIZE:].tolist()} & {tuple(row) for row in held_out[:, SIZE:].tolist()}


@pytest.mark.parametrize("name", ["ebt, bilinear", "diffusion"])
def test_every_number_of_blanks_and_steps_is_measured(name: str) -> None:
    right = measure(build(name, 1, 0))
    assert set(right) == {"1", "2", "4", "8", "16"} and "1" in right["1"]
    assert all(0 <= share <= 1 for of_step in right.values() for share in of_step.values())


def test_a_diffusion_model_sees_digits_and_blanks_as_numbers() -> None:
    samples = puzzles(8, "x", 1, 6, held_out=False)
    found = cells(samples)
    assert found.shape == (8, 2 * SIZE, BLANK) and torch.equal(found.argmax(-1) + 1, samples)
    assert found.unique().tolist() == [-1, 1] and (found[:, SIZE:, BLANK - 1] == -1).all()
    model = build("diffusion", 1, 0)
    assert train(model, samples, 1) > 0 and any(p.grad is not None and p.grad.any() for p in model.parameters())
