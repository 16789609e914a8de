"""Successive halving over losses that are made up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from ebwm_dist.experiments.halving import AllFailedError, Plan, Point, difference, search, survivors

ALPHAS, LRS = [0.1, 1.0, 10.0, 100.0], [1e-3, 1e-2, 1e-1]
PLAN = Plan(rungs=(5, 20, 80), keep=0.25, finalists=2, seeds=3, extensions=2, first_seed=7)


class Landscape:
    """Losses that fall with the steps and are lowest at a setting; some seeds prefer another."""

    def __init__(self, alpha: float, lr: float, broken: float = math.inf) -> None:
        self.alpha, self.lr, self.broken = alpha, lr, broken
        self.calls: list[tuple[list[Point], int, int]] = []

    def loss(self, point: Point, steps: int, seed: int) -> float:
        if point.lr >= self.broken:
            return math.nan
        alpha = self.alpha if point.alpha is None else point.alpha
        distance = abs(math.log10(alpha / self.alpha)) + abs(math.log10(point.lr / self.lr))
        return 1 + distance + 1 / steps + (0.01 * seed if seed > 7 else 0)

    def __call__(self, points: Sequence[Point], steps: int, seed: int) -> dict[Point, float]:
        self.calls.append((list(points), steps, seed))
        return {point: self.loss(point, steps, seed) for point in points}


def test_the_better_ones_go_on_and_the_best_get_several_seeds() -> None:
    landscape = Landscape(1.0, 1e-2)
    found = search(ALPHAS, LRS, PLAN, landscape)
    assert [(len(points), steps, seed) for points, steps, seed in landscape.calls] == [
        (12, 5, 7),
        (3, 20, 7),
        (2, 80, 7),
        (2, 80, 8),
        (2, 80, 9),
    ]
    best = Point(1.0, 1e-2)
    assert found.finalists[0] == best and best in landscape.calls[2][0] and found.edge == []
    assert found.final(best) == [landscape.loss(best, 80, seed) for seed in (7, 8, 9)]
    # 12 to step 5, of these 3 on to 20, of these 2 on to 80, and those with two more seeds.
    assert found.trained_steps == 12 * 5 + 3 * 15 + 2 * 60 + 4 * 80


def test_another_seed_can_turn_the_finalists_around() -> None:
    found = search(ALPHAS, LRS, PLAN, lambda points, steps, seed: {
        p: abs(math.log(p.alpha or 1)) + abs(math.log(p.lr / 1e-2)) + (9 if (seed, p) == (8, Point(1.0, 1e-2)) else 0)
        for p in points
    })  # fmt: skip
    assert found.finalists[1] == Point(1.0, 1e-2) and len(found.final(found.finalists[0])) == 3


def test_a_best_setting_at_the_edge_is_followed_beyond() -> None:
    # Larger alphas than the grid has are better: two steps beyond are tried, the second only as the first was better.
    landscape = Landscape(1e4, 1e-2)
    found = search(ALPHAS, LRS, PLAN, landscape)
    beyond = [points for points, steps, seed in landscape.calls[3:] if seed == 7]
    assert beyond == [[Point(1e3, 1e-2)], [Point(1e4, 1e-2)]]
    assert found.finalists == [Point(1e4, 1e-2), Point(1e3, 1e-2)] and found.edge == ["largest alpha"]
    # One step beyond is worse: the search ends, and the setting is at the edge no more.
    landscape = Landscape(100.0, 1e-2)
    found = search(ALPHAS, LRS, PLAN, landscape)
    assert [points for points, _, seed in landscape.calls[3:] if seed == 7] == [[Point(1e3, 1e-2)]]
    assert found.finalists[0] == Point(100.0, 1e-2) and found.edge == []


def test_both_edges_are_followed() -> None:
    landscape = Landscape(0.1, 1e-1)
    found = search(ALPHAS, LRS, PLAN, landscape)
    assert [points for points, _, seed in landscape.calls[3:] if seed == 7] == [[Point(0.01, 0.1)], [Point(0.1, 1.0)]]
    assert found.finalists[0] == Point(0.1, 1e-1) and found.edge == []
    found = search(ALPHAS, LRS, Plan((80,), extensions=0), landscape)
    assert found.edge == ["smallest alpha", "largest lr"]


def test_failed_settings_are_dropped() -> None:
    found = search(ALPHAS, LRS, PLAN, Landscape(1.0, 1e-1, broken=1e-1))
    assert all(point.lr == 1e-2 for point in found.finalists)
    assert found.losses[Point(1.0, 1e-1), 7] == {5: math.inf}
    with pytest.raises(AllFailedError, match="every setting has failed"):
        search(ALPHAS, LRS, PLAN, Landscape(1.0, 1e-1, broken=0))


def test_a_model_without_alpha_is_searched_by_learning_rate() -> None:
    found = search([], LRS, PLAN, Landscape(1.0, 1e-2))
    assert found.finalists[0] == Point(None, 1e-2) and {point.alpha for point, _ in found.losses} == {None}


def test_survivors() -> None:
    a, b, c, d = (Point(alpha, 1.0) for alpha in (1.0, 2.0, 3.0, 4.0))
    losses = {a: 3.0, b: 1.0, c: math.inf, d: 2.0}
    assert survivors(losses, 0.5, 1) == [b, d]
    assert survivors(losses, 0.5, 3) == [b, d, a] and survivors(losses, 1.0, 4) == [b, d, a]


def test_the_difference_is_taken_seed_by_seed() -> None:
    above, error = difference([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])
    assert above == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-12)
    assert difference([1.0, 2.0], [1.0, 4.0]) == (1.0, 1.0) and difference([1.0], [1.5]) == (0.5, math.inf)
