"""Answers by difficulty: their measures on tables made by hand, and of small models with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.distributed import join
from ebwm_dist.evaluation.difficulty import Answers, accuracy_by_steps, best_of, example, stopping
from ebwm_dist.evaluation.evaluate import evaluate_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.evaluation.predictions import Table, tabulate, tabulate_steps
from ebwm_dist.evaluation.suite import Suite
from ebwm_dist.evaluation.uncertainty import clustered_mean_and_error, mean_and_error
from ebwm_dist.files import to_json
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.evaluation.test_suite import assert_close
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_prompts import make_tiny_prompts

DIFFICULTY = torch.tensor([[-1, 1, 1, -1, 2, -1], [3, 1, -1, -1, -1, 1]])
"""Five answers: of two tokens, of one, two that touch each other, and one at the end of a row."""
OVERRIDES = ["data.sequence_length=40", "mcmc.max_num_steps=3", "mcmc.initial_state=most_recent_token"]
SETTINGS = Options((1, 2, 5), (1, 3), (), (0.1, 0.3), max_sequences=9, batch_size=4, langevin_noise=0.5)


def table(
    correct: list[list[int]],
    energies: list[list[float]] | None = None,
    steps: Tensor | None = None,
    surprisals: list[list[float]] | None = None,
) -> Table:
    """Return a table; wrong tokens are all the same one."""
    right, mask = torch.tensor(correct, dtype=torch.float64), DIFFICULTY >= 0
    zeros = torch.zeros_like(right)
    return Table(
        target_mask=mask,
        losses=zeros,
        steps=zeros if steps is None else steps,
        nfe=zeros,
        correct=right,
        predicted=right,
        energies=None if energies is None else torch.tensor(energies, dtype=torch.float64),
        surprisals=None if surprisals is None else torch.tensor(surprisals, dtype=torch.float64),
        difficulty=DIFFICULTY.double(),
    )


RIGHT = table([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1]], [[9, 0, 2, 9, 5, 9], [1, 7, 9, 9, 9, 3]])
HALF = table([[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]], [[9, 0, 1, 9, 6, 9], [2, 7, 9, 9, 9, 4]])


def test_answers_are_right_as_a_whole() -> None:
    answers = Answers(DIFFICULTY)
    assert answers.places.tolist() == [[0, 1], [0, 4], [1, 0], [1, 1], [1, 5]]
    assert answers.lengths.tolist() == [2, 1, 1, 1, 1] and answers.difficulty.tolist() == [1, 2, 3, 1, 1]
    assert answers.right(RIGHT).tolist() == [True, False, True, False, True]
    assert answers.right(HALF).tolist() == [False, True, True, False, True]


def test_accuracy_by_difficulty_and_steps() -> None:
    found = accuracy_by_steps({1: HALF, 4: RIGHT})
    assert found["difficulties"] == [1, 2, 3] and found["answers"] == [3, 1, 1] and found["steps"] == [1, 4]
    shares = [[share for share, _ in row] for row in found["accuracy"]]
    assert shares == [[pytest.approx(1 / 3), pytest.approx(2 / 3)], [1, 0], [1, 1]]
    assert found["accuracy"][1] == [[1, math.inf], [0, math.inf]]  # of a single sequence
    assert [share for share, _ in found["accuracy_of_all"]] == [pytest.approx(0.6)] * 2
    # Energies (means over tokens) of right answers 1, 1, 3 and of wrong ones 5, 7; before: 6, 2, 4 and 0.5, 7.
    assert found["auroc"] == [pytest.approx(0.5), 1]
    assert sum(found["energies"][1]["right"]) == 3 and sum(found["energies"][1]["wrong"]) == 2
    assert accuracy_by_steps({1: table([[1] * 6] * 2, [[0.0] * 6] * 2)})["auroc"] == [None]


def test_errors_are_those_of_independent_sequences() -> None:
    values, groups = torch.tensor([1.0, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 4, 7, 7, 4])
    assert clustered_mean_and_error(values, torch.arange(6)) == pytest.approx(mean_and_error(values))
    # Three groups of two whose means are 1, 0 and 0.5.
    assert clustered_mean_and_error(values, groups) == pytest.approx((0.5, 0.5 / math.sqrt(3)))


def test_steps_until_it_stops() -> None:
    steps = torch.tensor([[9.0, 1, 3, 9, 4, 9], [6, 2, 9, 9, 9, 2]], dtype=torch.float64)
    found = stopping(table([[1] * 6] * 2, steps=steps))
    assert [mean for mean, _ in found["steps"]] == [2, 4, 6] and found["steps_of_all"][0] == pytest.approx(16 / 5)
    assert found["correlation"] == pytest.approx(1) and found["accuracy_of_all"] == [1, 0]


def test_best_of_several() -> None:
    """Energies choose the half-right candidate for the first answer and the right one elsewhere; two others agree."""
    found = best_of([HALF, RIGHT, RIGHT])
    assert found["one"][0] == pytest.approx((3 + 3 + 3) / 15)
    assert found["lowest energy"][0] == pytest.approx(2 / 5)
    assert found["majority"][0] == pytest.approx(3 / 5)


def test_surprisals_judge_beside_energies() -> None:
    """They choose the right candidate for the first two answers, where energies choose the wrong one for the second."""
    one = table(
        [[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]], [[9, 0, 1, 9, 6, 9], [2, 7, 9, 9, 9, 4]], None, [[5.0] * 6] * 2
    )
    ways = [[9.0, 2, 4, 9, 7, 9], [9, 9, 9, 9, 9, 2]]
    other = table([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1]], [[9, 0, 2, 9, 5, 9], [1, 7, 9, 9, 9, 3]], None, ways)
    found = best_of([one, other])
    assert found["lowest energy"][0] == pytest.approx(2 / 5) and found["lowest surprisal"][0] == pytest.approx(4 / 5)
    # Right answers of the second have 3, 9 and 2, wrong ones 7 and 9: of six pairs four and a half are in order.
    assert accuracy_by_steps({1: one, 4: other})["auroc_of_surprisal"] == [0.5, pytest.approx(4.5 / 6)]
    assert "auroc_of_surprisal" not in accuracy_by_steps({4: RIGHT}) and "lowest surprisal" not in best_of([RIGHT] * 2)


def test_example_is_a_right_answer_of_the_greatest_difficulty() -> None:
    found = example({0: HALF, 2: RIGHT})
    assert (found["sequence"], found["position"], found["difficulty"]) == (1, 0, 3)
    assert found["steps"] == [0, 2] and found["predicted"] == [[1], [1]] and found["energies"] == [2, 1]


@pytest.fixture(scope="module")
def models(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    words = make_tiny_prompts(folder / "words", load_tokenizer(tiny))
    for kind in ("ebt", "ar"):
        finished_run(write_config(folder), words, folder / kind, [f"model.kind={kind}", *OVERRIDES])
    evaluate_runs(folder / "ebt", folder / "ar", None, folder / "alone", SETTINGS, join())
    return folder


def evaluation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def test_one_refinement_has_every_number_of_steps(models: Path) -> None:
    """Against refinements of as many steps, and `evaluate`; what is no target is left out."""
    run = Run(models / "ebt")
    assert isinstance(run.model, EnergyBasedTransformer)
    data, world = run.validation_data(), join()

    def batches() -> Any:
        return data.batches(4, 9)

    tables = tabulate_steps(run.model, batches(), (0, 1, 3), world, data.preprocess)
    for number in (1, 3):
        found, wanted = tables[number], tabulate(run.model, batches(), Thinking(steps=number), world)
        mask = wanted.target_mask
        assert mask.any() and not mask.all() and torch.equal(found.target_mask, mask)
        wanted = tabulate(run.model, batches(), Thinking(steps=number, select="surprisal"), world)
        for name in (
            "surprisals",
            "losses",
            "energies",
            "entropies",
            "predicted",
            "correct",
            "difficulty",
            "steps",
            "nfe",
        ):
            torch.testing.assert_close(getattr(found, name)[mask], getattr(wanted, name)[mask], rtol=1e-5, atol=1e-5)
    whole = next(iter(data.batches(9, 9)))
    losses = run.model.evaluate(whole.observed, whole.sample_ids, 3, whole.targets).step_losses
    torch.testing.assert_close(tables[3].losses.sum(-1).float(), losses[2])
    observed = whole.observed[:, :-1].double()  # the state before the first step is the last observed token
    assert torch.equal(tables[0].predicted[mask], observed[mask])  # type: ignore[index]


def test_evaluation_by_difficulty(models: Path, tiny: Manifest, tmp_path: Path) -> None:
    found = evaluation(models / "alone")
    model, twin = (found[name]["by_difficulty"] for name in ("model", "baseline"))
    assert model["difficulties"] == twin["difficulties"] == [1, 2, 3] and model["answers"] == twin["answers"]
    assert model["steps"] == [1, 2, 3, 5] and twin["steps"] == [0] and "stopped" not in twin
    assert model["flops_per_prediction"] == [
        found["model"]["by_steps"]["flops_per_prediction"][i] for i in (0, 1, 2, 4)
    ]
    assert [one["prediction_tolerance"] for one in model["stopped"]] == [0.1, 0.3]
    assert model["stopped"][0]["flops_per_prediction"] <= 1.5 * model["flops_per_prediction"][-1]
    assert all(1 <= mean <= 5 for one in model["stopped"] for mean, _ in one["steps"])
    assert model["example"]["steps"] == [0, 1, 2, 3, 5]
    (best,) = model["best_of"]
    assert best["candidates"] == 3 and best["steps"] == 5 and 0 <= best["lowest surprisal"][0] <= 1
    assert len(model["auroc_of_surprisal"]) == 4
    page = (models / "alone" / "evaluation.html").read_text()
    assert "Answers by difficulty" in page and "best of 3" in page and "stop at a change of 0.3" in page
    finished_run(write_config(tmp_path), tiny, tmp_path / "text")
    evaluate_runs(tmp_path / "text", None, None, tmp_path, Options((1,), (1,), max_sequences=4), join())
    assert "by_difficulty" not in evaluation(tmp_path)["model"]


def by_difficulty(run: Path, settings: Options) -> dict[str, Any]:
    opened = Run(run)
    return Suite(opened, opened.validation_data(), settings, join(), print).by_difficulty()


def test_candidates_without_noise_are_left_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = by_difficulty(models / "ebt", Options((1,), prediction_tolerances=(), max_sequences=4))
    assert found["best_of"] == [] and found["stopped"] == []
    assert "all are the same without noise; set --langevin-noise" in capsys.readouterr().out


def measure_in_ranks(rank: int, world_size: int, folder: Path) -> None:
    for kind in ("ebt", "ar"):
        (folder / f"{kind}_{rank}.json").write_text(to_json(by_difficulty(folder / kind, SETTINGS)))


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(models: Path) -> None:
    run_distributed_test(measure_in_ranks, 2, models)
    alone = evaluation(models / "alone")
    for kind, name in (("ebt", "model"), ("ar", "baseline")):
        for rank in range(2):
            found = json.loads((models / f"{kind}_{rank}.json").read_text())
            assert_close(found, alone[name]["by_difficulty"])
