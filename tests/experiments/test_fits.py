"""Laws that are known are found again, and runs that say nothing are told from those that do."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from ebwm_dist.experiments.fits import Ladder, fit, ratio
from ebwm_dist.experiments.ladders import Measured, frontier, ladders
from ebwm_dist.experiments.results import analyse, from_json

X = (1e4, 3e4, 1e5, 3e5, 1e6)


def ladder(
    law: Callable[[float], float], noise: float = 0.0, seeds: int = 3, x: tuple[float, ...] = X, model: str = "ebt"
) -> Ladder:
    generator = np.random.default_rng(1)
    points = tuple((value, tuple(law(value) + noise * generator.normal(size=seeds))) for value in x)
    return Ladder("data", model, "w32, batch 8", points)


def test_a_known_law_is_found_again() -> None:
    found = fit(ladder(lambda x: 2 + 30 * x**-0.4, noise=0.001), draws=200)
    assert found.exponent == pytest.approx(0.4, rel=0.02) and found.floor == pytest.approx(2, rel=0.01)
    assert found.scale == pytest.approx(30, rel=0.15) and found.loss(1e5) == pytest.approx(2.3, rel=1e-3)
    low, high = found.exponent_interval
    assert found.problem is None and low < 0.4 < high and high - low < 0.06


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 20 noisy ladders most intervals hold the exponent; with a third of the spread only some would."""
    held = 0
    for number in range(20):
        generator = np.random.default_rng(number)
        points = tuple((x, tuple(2 + 30 * x**-0.4 + 0.01 * generator.normal(size=3))) for x in X)
        low, high = fit(Ladder("data", "ebt", "", points), draws=50).exponent_interval
        held += low <= 0.4 <= high
    assert held >= 15


def test_ratio_of_exponents() -> None:
    ebt = fit(ladder(lambda x: 2 + 30 * x**-0.45, noise=0.002), draws=100)
    twin = fit(ladder(lambda x: 2 + 15 * x**-0.35, noise=0.002, model="ar"), draws=100)
    found = ratio(ebt, twin)
    low, high = found.exponent_interval
    assert found.exponent == pytest.approx(0.45 / 0.35, rel=0.05) and low < 0.45 / 0.35 < high
    assert found.problem is None and found.slope == pytest.approx(ebt.slope / twin.slope)
    none = ratio(ebt, fit(ladder(lambda x: 3.0, noise=0.01, model="ar"), draws=100))
    assert none.problem is not None and none.problem.startswith("ar: the loss does not fall")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (ladder(lambda x: 2 + 30 * x**-0.4, 0.001, x=X[:3]), "3 values of x, and E, A and b fit any three"),
        (ladder(lambda x: 2 + 30 * x**-0.4, 0.001, seeds=1), "no value of x has two seeds"),
        (ladder(lambda x: 3.0, 0.01), "the loss does not fall"),
        (ladder(lambda x: 2 + 0.01 * np.log(x), 0.001), "the loss does not fall"),
        (ladder(lambda x: 2 + 30 * x**-0.4, 0.15), "b is not determined|the runs do not bound b"),
    ],
    ids=["three values", "one seed", "flat", "rising", "noise"],
)
def test_runs_that_do_not_support_a_law(given: Ladder, problem: str) -> None:
    found = fit(given, draws=100)
    assert found.problem is not None
    assert any(found.problem.startswith(one) for one in problem.split("|")), found.problem


def measured(model: str, size: str, batch: int, steps: int, seed: int, loss: float, **more: int) -> Measured:
    width = int(size.removeprefix("depth").removeprefix("w"))
    return Measured(
        model=model,
        size=size,
        batch=batch,
        steps=steps,
        mcmc_steps=1 if model == "ebt" else None,
        seed=seed,
        tokens=batch * steps * 128,
        parameters=1000 * width,
        layers=more.get("layers", 2),
        width=width,
        flops=width * batch * steps * (3.0 if model == "ebt" else 1.0),
        loss=loss,
        seconds=1.0,
    )


def grid() -> list[Measured]:
    runs = []
    for model, b in (("ebt", 0.5), ("ar", 0.4)):
        for seed in range(2):
            noise = 1e-3 * seed
            for steps in (50, 100, 200, 400):
                runs.append(measured(model, "w32", 8, steps, seed, 2 + 10 * steps**-b + noise))
            for size in ("w16", "w64", "w128"):
                runs.append(measured(model, size, 8, 200, seed, 2 + (10 * 200**-b) * (32 / int(size[1:])) + noise))
            for batch in (2, 4):
                runs.append(measured(model, "w32", batch, 200, seed, 3.0 - 0.01 * batch))
    return runs


def test_ladders_are_runs_that_differ_in_one_variable() -> None:
    found = {(one.variable, one.model): one for one in ladders(grid())}
    kinds = {(name, model) for name in ("data", "batch", "parameters", "flops") for model in ("ebt, 1 MCMC step", "ar")}
    assert found.keys() == kinds
    data = found["data", "ar"]
    assert data.at == "w32, batch 8" and [x for x, _ in data.points] == [51200, 102400, 204800, 409600]
    assert all(len(losses) == 2 for _, losses in data.points)
    assert [x for x, _ in found["batch", "ar"].points] == [2, 4, 8] and found["batch", "ar"].at == "w32, 200 steps"
    assert [x for x, _ in found["parameters", "ar"].points] == [16000, 32000, 64000, 128000]


def test_layers_are_a_variable_of_their_own() -> None:
    """Sizes that differ in depth alone are no steps of the ladder of parameters."""
    runs = [measured("ar", "depth32", 8, 200, 0, 3.0 - layers, layers=layers) for layers in (1, 2, 3)]
    found = {one.variable: one for one in ladders(runs)}
    assert [x for x, _ in found["depth"].points] == [1, 2, 3] and "parameters" not in found


def test_the_frontier_has_no_run_that_a_cheaper_one_beats() -> None:
    runs = [measured("ar", "w32", 8, steps, 0, loss) for steps, loss in ((10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0))]
    runs.append(measured("ar", "w32", 4, 20, 0, 6.0))  # as many FLOPs as 8 x 10
    assert [losses for _, losses in frontier(runs)] == [(5.0,), (4.0,), (3.0,)]


def test_results_are_read_again_and_an_exponent_beside_its_twin() -> None:
    results = analyse("A study", "tokens", grid(), {"ar-x": "failed"}, draws=40)
    assert {one.ebt.ladder.variable for one in results.ratios} == {"data", "batch", "parameters", "flops"}
    (data,) = (one for one in results.ratios if one.ebt.ladder.variable == "data")
    assert data.exponent == pytest.approx(0.5 / 0.4, rel=0.05)
    content = results.as_json()
    assert {"runs", "fits", "ratios"} <= content.keys() and content["published_percent"]["data"] == 35.98
    again = from_json(json.loads(json.dumps(content)))
    assert again.as_json() == content
