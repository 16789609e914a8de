"""Successive halving: train many settings for a little, the better ones for longer, the best to the end.

Runs go on from rung to rung, each on the schedule of the whole run, so a rung costs only the steps that it adds.
Nothing here trains: a function says what the held-out loss of a setting is after so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev


class AllFailedError(Exception):
    """Every setting has failed."""


@dataclass(frozen=True)
class Point:
    """A setting: the step size alpha, None for a model that has none, and the learning rate."""

    alpha: float | None
    lr: float


Measure = Callable[[Sequence[Point], int, int], Mapping[Point, float]]
"""Settings, steps and seed -> the held-out loss of each setting after these steps; infinite or NaN where it failed."""


@dataclass(frozen=True)
class Plan:
    """What a search does.

    `rungs` are steps of training, the last the whole run. Of the settings of a rung the share `keep`, at least
    `finalists`, goes on to the next. Where the best one lies at the edge of the grid, settings beyond are trained to
    the end, at most `extensions`. The `finalists` are then trained with `seeds` seeds in all, of which `first_seed` is
    the one of the search.
    """

    rungs: tuple[int, ...]
    keep: float = 0.25
    finalists: int = 2
    seeds: int = 3
    extensions: int = 2
    first_seed: int = 0


@dataclass
class Search:
    """What was measured, and what follows from it."""

    losses: dict[tuple[Point, int], dict[int, float]] = field(default_factory=dict)
    """Of a setting and a seed, the loss after each number of steps."""
    finalists: list[Point] = field(default_factory=list)
    """Settings that were trained with several seeds, the best by the mean of its losses first."""
    edge: list[str] = field(default_factory=list)
    """Sides of the grid that the best setting lies on, beyond which nothing was tried: `smallest alpha` and so on."""

    @property
    def trained_steps(self) -> int:
        """The optimizer steps of all runs."""
        return sum(max(losses) for losses in self.losses.values())

    def final(self, point: Point) -> list[float]:
        """Return the losses of a finalist at the end, by seed."""
        found = {seed: losses for (one, seed), losses in self.losses.items() if one == point}
        return [found[seed][max(found[seed])] for seed in sorted(found)]


def search(alphas: Sequence[float], lrs: Sequence[float], plan: Plan, measure: Measure) -> Search:
    """Search the grid of step sizes (none: the model has no alpha) and learning rates.

    Raises:
        AllFailedError: what it says.
    """
    found, end = Search(), plan.rungs[-1]

    def losses(points: Sequence[Point], steps: int, seed: int) -> dict[Point, float]:
        measured = {point: _finite(loss) for point, loss in measure(points, steps, seed).items()}
        for point in points:
            found.losses.setdefault((point, seed), {})[steps] = measured[point]
        return measured

    grid = {"alpha": sorted(alphas), "lr": sorted(lrs)}
    values: list[float | None] = [*grid["alpha"]] or [None]
    points = [Point(alpha, lr) for alpha in values for lr in grid["lr"]]
    for number, steps in enumerate(plan.rungs):
        here = losses(points, steps, plan.first_seed)
        if number < len(plan.rungs) - 1:
            points = survivors(here, plan.keep, plan.finalists)
    finished = {point: loss for point, loss in here.items() if math.isfinite(loss)}
    if not finished:
        raise AllFailedError("every setting has failed")
    for _ in range(plan.extensions):
        best = min(finished, key=lambda point: finished[point])
        beyond = [point for point in _beyond(best, grid) if point not in finished]
        if not beyond:
            break
        finished |= losses(beyond[:1], end, plan.first_seed)
        for name in grid:
            grid[name] = sorted({*grid[name], getattr(beyond[0], name)}) if grid[name] else []
    finalists = survivors(finished, 0, plan.finalists)
    for seed in range(plan.first_seed + 1, plan.first_seed + plan.seeds):
        losses(finalists, end, seed)
    found.finalists = sorted(finalists, key=lambda point: mean(found.final(point)))
    found.edge = [side for side, point in _edges(found.finalists[0], grid).items() if point not in finished]
    return found


def survivors(losses: Mapping[Point, float], keep: float, least: int) -> list[Point]:
    """Return the settings with the lowest losses: a share `keep`, at least `least`, of those that have not failed."""
    finite = [point for point in losses if math.isfinite(losses[point])]
    ranked = sorted(finite, key=lambda point: losses[point])  # stable: of equal ones the first of the grid
    return ranked[: max(least, int(len(losses) * keep))]


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return by how much `second` is above `first` in the mean over seeds, and the standard error of that.

    A seed sets weights and data alike for both, so their differences are what counts. With one seed the error is
    infinite.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return differences[0], math.inf
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def _edges(point: Point, grid: Mapping[str, Sequence[float]]) -> dict[str, Point]:
    """Return the sides of the grid that a setting lies on, each with the setting one step of the grid beyond."""
    edges = {}
    for name, values in grid.items():
        value = getattr(point, name)
        if len(values) < 2 or value is None:
            continue
        if value == values[0]:
            edges[f"smallest {name}"] = replace(point, **{name: _round(value * value / values[1])})
        if value == values[-1]:
            edges[f"largest {name}"] = replace(point, **{name: _round(value * value / values[-2])})
    return edges


def _beyond(point: Point, grid: Mapping[str, Sequence[float]]) -> list[Point]:
    return list(_edges(point, grid).values())


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
