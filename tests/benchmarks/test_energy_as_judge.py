"""The chains that are judged are the model's own, and the terms beside the loss are what they are said to be."""

from __future__ import annotations

import argparse
import random

import pytest
import torch

from benchmarks.energy_as_judge import Trial, parser
from benchmarks.judged_answers import CANDIDATES, Judged, aurocs, chains


@pytest.fixture(scope="module", params=["letters", "pointers"])
def trial(request: pytest.FixtureRequest) -> Trial:
    return Trial(arguments(task=request.param))


def arguments(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(parser().parse_args([])) | changes)


def test_chains_are_those_of_the_model(trial: Trial) -> None:
    """Their states and energies are what the model refines, and without noise a step goes where it leads."""
    tokens, where, *_ = trial.task.batch([random.Random(number) for number in range(3)], 4)
    observed, model = tokens[:, :-1], trial.model
    states, energies, unsure = chains(model, False, model.context_stream(observed, 0), observed, where, 3, 0.0, 0.0)
    ((_, found),) = model.refine_slices(observed, 3, torch.arange(3))
    rows = torch.arange(3)[:, None]
    for number, (energy, state) in enumerate(found):
        torch.testing.assert_close(states[number], state[rows, where])
        torch.testing.assert_close(energies[number], energy[rows, where])
        torch.testing.assert_close(unsure[number], -states[number].log_softmax(-1).amax(-1))


def test_answers_are_among_the_finished_ones(trial: Trial) -> None:
    _, _, answers, difficulties, finished = trial.task.batch([random.Random(number) for number in range(9)], 9)
    assert ((finished == answers[..., None]).sum(-1) == 1).all() and difficulties.max() > 4


def test_every_term_has_gradients(trial: Trial) -> None:
    tokens, where, answers, _, finished = trial.task.batch([random.Random(number) for number in range(8)], 4)
    trial.args = arguments(task=trial.task.name, contrast=1.0, fall=1.0, path=1.0, path_noise=9.0)
    targets = torch.zeros_like(tokens[:, 1:]).scatter(1, where, answers)
    trial.visited.clear()
    trial.model.training_step(tokens, torch.arange(8), trial.model.plan(10**6, 0), targets=targets)
    for name, value in trial.terms(tokens, where, answers, finished, 1).items():
        trial.model.zero_grad()
        value.backward(retain_graph=True)
        moved = sum(p.grad.abs().sum().item() for p in trial.model.parameters() if p.grad is not None)
        assert value.isfinite() and (moved > 0 or name == "path")  # without a right chain there is no pair


def test_the_best_of_several_chains(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise all candidates are the same chain, whatever chooses among them."""
    monkeypatch.setattr("benchmarks.judged_answers.NOISES", ((0.0, 0.0),))
    documents = trial.task.batch([random.Random(number) for number in range(3)], 4)
    found = Judged(trial.model, False, documents).figures()
    (best,) = found["best_of"]
    last = found["accuracy"][16]
    assert CANDIDATES > 1 and {best[name] for name in ("one", "any", "majority", "energy", "surprisal")} == {last}


def test_aurocs_within_a_difficulty() -> None:
    score, hops = torch.tensor([1.0, 2, 10, 20]), torch.tensor([1, 1, 2, 2])
    wrong = torch.tensor([False, True, False, True])
    assert aurocs({"score": score}, wrong, ~wrong, hops)["score"] == [0.75, 1.0]
