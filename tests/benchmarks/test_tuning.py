"""The tables of the page on tuning hold what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import step_size, tuning
from ebwm_dist.files import read_records

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()


def test_the_page_holds_what_was_measured() -> None:
    assert "\n".join(tuning.table(read_records(tuning.RESULTS))) in PAGE, "run `python -m benchmarks.tuning`"
    assert "\n".join(step_size.table(read_records(step_size.RESULTS))) in PAGE, "run `python -m benchmarks.step_size`"


def test_a_search_is_compared_with_the_grid() -> None:
    points = [{"alpha": alpha, "lr": lr, "seed": 0} for alpha in (1.0, 3.0) for lr in (0.001, 0.01)]
    losses = [4.0, 3.0, 5.0, 2.0]
    whole = [point | {"losses": {"120": loss}} for point, loss in zip(points, losses, strict=True)]
    runs = [points[1] | {"losses": {"6": 6.0, "120": 3.0}}, points[1] | {"seed": 1, "losses": {"120": 3.1}}]
    search = {"grid": False, "rungs": [6, 120], "seeds": 2, "steps": 120, "finalists": [points[1]], "runs": runs}
    assert list(tuning.table([{"grid": True, "steps": 480, "runs": whole}, search])) == [
        "| alpha | lr 0.001 | lr 0.01 |",
        "|--:|--:|--:|",
        "| 1 | 4.000 | 3.000 |",
        "| 3 | 5.000 | **2.000** |",
        "",
        "| search | steps | of the grid's | found | held-out loss | above the grid's best | seeds |",
        "|---|--:|--:|---|--:|--:|---|",
        "| 6, 120 steps, 2 seeds | 120 | 25.0 % | alpha 1, lr 0.01 | 3.000 | 50.00 % | 3.000, 3.100 |",
    ]


def test_the_automatic_step_size_is_compared_with_the_others() -> None:
    case = next(iter(step_size.CASES))
    records = [
        {"case": case, "seed": 1, "suggested": 2.0, "alpha": alpha, "loss": 4 + math.log(alpha / 3) ** 2}
        for alpha in (2.0, 1.0, 8.0)
    ]
    row = f"| {case} | 100 | 1 | 2 | 3 | 1: 5.207, **2: 4.164**, 8: 4.962 | 0.0 % |"
    assert list(step_size.table(records))[2:] == [row]
    assert step_size.optimum({1.0: 3.0, 2.0: 4.0}) is None


def test_the_optimum_is_that_of_a_parabola() -> None:
    assert step_size.optimum({a: (math.log(a) - 0.5) ** 2 for a in (0.1, 1.0, 4.0, 9.0)}) == pytest.approx(math.e**0.5)
