"""Scaling laws of a loss: L(x) = E + A x^-b by least squares, intervals by bootstrap, and when they say nothing.

A bootstrap draw adds to the curve, at every value of x, residuals drawn with replacement from the runs there (the
seeds), with random signs: they hold both the spread of the seeds and what the curve misses. Where there is one run
alone, the spread of the seeds elsewhere is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

DRAWS = 500
LEAST, MOST = 0.01, 5.0
"""Limits of the exponent."""
RUNGS = 4
"""Values of x that three parameters need at least."""
WIDEST = 4.0
"""Quotient of the ends of an interval of the exponent beyond which it says nothing."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ladder:
    """Runs of a model that differ in one variable and in seeds."""

    variable: str
    """What x is: data, batch, parameters, depth or flops."""
    model: str
    at: str
    """What the runs have in common."""
    points: tuple[tuple[float, tuple[float, ...]], ...]
    """Values of x, increasing, and the losses of the runs there."""


@dataclass(frozen=True)
class Fit:
    """The law of a ladder. Intervals hold 95 % of the bootstrap's draws."""

    ladder: Ladder
    exponent: float
    """b."""
    exponent_interval: tuple[float, float]
    floor: float
    """E."""
    scale: float
    """A, of x as it is."""
    slope: float
    """Of -log(L) over log(x), a straight line through all runs: the law without a floor."""
    slope_interval: tuple[float, float]
    problem: str | None
    """Why the runs do not support the exponent, or None."""
    exponents: Array = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    """Of all draws, as `slopes`."""
    slopes: Array = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def loss(self, x: float) -> float:
        """Return the law at `x`."""
        return self.floor + self.scale * x**-self.exponent

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Fit:
        """Return a fit from what study.json holds of it, without its draws."""
        points = tuple((one["x"], tuple(one["losses"])) for one in content["points"])
        return Fit(
            ladder=Ladder(content["variable"], content["model"], content["at"], points),
            exponent=_number(content["exponent"]),
            exponent_interval=_pair(content["exponent_interval"]),
            floor=_number(content["floor"]),
            scale=_number(content["scale"]),
            slope=_number(content["slope"]),
            slope_interval=_pair(content["slope_interval"]),
            problem=content["problem"],
        )

    def as_json(self) -> dict[str, Any]:
        """Return what study.json holds of it."""
        ladder = self.ladder
        return {
            "variable": ladder.variable,
            "model": ladder.model,
            "at": ladder.at,
            "points": [{"x": x, "losses": list(losses)} for x, losses in ladder.points],
            "exponent": self.exponent,
            "exponent_interval": list(self.exponent_interval),
            "floor": self.floor,
            "scale": self.scale,
            "slope": self.slope,
            "slope_interval": list(self.slope_interval),
            "supported": self.problem is None,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Ratio:
    """The exponent of an energy model over that of its twin on the same ladder; likewise the slopes."""

    ebt: Fit
    twin: Fit
    exponent: float
    exponent_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]

    @staticmethod
    def from_json(content: Mapping[str, Any], ebt: Fit, twin: Fit) -> Ratio:
        """Return a ratio from what study.json holds of it and of its fits."""
        exponents, slopes = _pair(content["exponent_interval"]), _pair(content["slope_interval"])
        return Ratio(ebt, twin, _number(content["exponent"]), exponents, _number(content["slope"]), slopes)

    @property
    def problem(self) -> str | None:
        """Why the runs do not support the ratio of exponents, or None."""
        found = [f"{fit.ladder.model}: {fit.problem}" for fit in (self.ebt, self.twin) if fit.problem is not None]
        return "; ".join(found) or None

    def as_json(self) -> dict[str, Any]:
        """Return what study.json holds of it."""
        return {
            "variable": self.ebt.ladder.variable,
            "model": self.ebt.ladder.model,
            "at": self.ebt.ladder.at,
            "exponent": self.exponent,
            "exponent_interval": list(self.exponent_interval),
            "slope": self.slope,
            "slope_interval": list(self.slope_interval),
            "supported": self.problem is None,
            "problem": self.problem,
        }


def fit(ladder: Ladder, draws: int = DRAWS) -> Fit:
    """Fit the law to a ladder of three values or more."""
    generator = np.random.default_rng(0)
    x = np.array([value for value, losses in ladder.points for _ in losses])
    loss = np.array([one for _, losses in ladder.points for one in losses])
    groups = np.array([number for number, (_, losses) in enumerate(ladder.points) for _ in losses])
    middle = float(np.exp(np.log(x).mean()))  # x is scaled by it, which keeps the parameters near 1
    best = _law(x / middle, loss)
    line = _line(x, loss)
    fits, slopes = np.empty((draws, 3)), np.empty(draws)
    curve = _curve(best, x / middle)
    straight = np.exp(line[0] - line[1] * np.log(x))
    for draw in range(draws):
        fits[draw] = _law(x / middle, curve + _residuals(loss - curve, groups, 3, generator), best)
        drawn = straight + _residuals(loss - straight, groups, 2, generator)
        slopes[draw] = _line(x, np.maximum(drawn, 1e-12))[1]
    interval = _interval(fits[:, 2])
    return Fit(
        ladder=ladder,
        exponent=float(best[2]),
        exponent_interval=interval,
        floor=float(best[0]),
        scale=float(best[1] * middle ** best[2]),
        slope=float(line[1]),
        slope_interval=_interval(slopes),
        problem=_problem(ladder, interval),
        exponents=fits[:, 2],
        slopes=slopes,
    )


def ratio(ebt: Fit, twin: Fit) -> Ratio:
    """Return the exponents' ratio, its interval from independent draws of both."""
    return Ratio(
        ebt,
        twin,
        ebt.exponent / twin.exponent,
        _interval(ebt.exponents / twin.exponents),
        ebt.slope / twin.slope,
        _interval(ebt.slopes / twin.slopes),
    )


def _law(x: Array, loss: Array, start: Array | None = None) -> Array:
    """Return E, A and b; the search begins at `start`, or at the best of some exponents."""
    if start is None:
        candidates = [_linear(x, loss, b) for b in np.geomspace(LEAST, MOST, 40)]
        start = min(candidates, key=lambda one: float(np.square(_curve(one, x) - loss).sum()))
    low, high = np.array([0.0, 0.0, LEAST]), np.array([np.inf, np.inf, MOST])
    margin = 1e-9
    begin = np.clip(start, low + margin, np.array([1e9, 1e9, MOST - margin]))

    def slopes(law: Array) -> Array:
        power = x ** -law[2]
        return np.stack((np.ones_like(x), power, -law[1] * power * np.log(x)), axis=1)

    found = least_squares(
        lambda law: _curve(law, x) - loss, begin, slopes, (low, high), x_scale=np.maximum(begin, 1e-3), max_nfev=100
    )
    return np.asarray(found.x)


def _linear(x: Array, loss: Array, b: float) -> Array:
    """Return E >= 0, A >= 0 and `b` that fit best with this exponent."""
    power = x**-b
    centred = power - power.mean()
    scale = max(0.0, float((centred * (loss - loss.mean())).sum() / max(float(np.square(centred).sum()), 1e-300)))
    floor = float(loss.mean() - scale * power.mean())
    if floor < 0:
        floor, scale = 0.0, max(0.0, float((power * loss).sum() / np.square(power).sum()))
    return np.array([floor, scale, b])


def _curve(law: Array, x: Array) -> Array:
    return np.asarray(law[0] + law[1] * x ** -law[2])


def _line(x: Array, loss: Array) -> Array:
    """Return intercept and slope s of log(L) = i - s log(x)."""
    slope, intercept = np.polyfit(np.log(x), np.log(loss), 1)
    return np.array([intercept, -slope])


def _residuals(residual: Array, groups: Array, parameters: int, generator: np.random.Generator) -> Array:
    """Return residuals drawn anew at every value of x, widened by the degrees of freedom that the fit has used."""
    count = len(residual)
    drawn = np.empty(count)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    seeds = [residual[own] - residual[own].mean() for own in members if len(own) > 1]
    spread = np.concatenate([one * math.sqrt(len(one) / (len(one) - 1)) for one in seeds]) if seeds else np.zeros(1)
    for own in members:
        drawn[own] = residual[generator.choice(own, len(own))] * generator.choice([-1.0, 1.0], len(own))
        if len(own) == 1:  # whose residual tells nothing of seeds: theirs is that of the others
            drawn[own] += generator.choice(spread)
    return drawn * math.sqrt(count / max(1, count - parameters))


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _problem(ladder: Ladder, interval: tuple[float, float]) -> str | None:
    """Return why a ladder does not support its exponent, or None."""
    points = ladder.points
    if len(points) < RUNGS:
        return f"{len(points)} values of x, and E, A and b fit any three"
    falls, spread = _mean(points[0][1]) - _mean(points[-1][1]), _standard_error(points)
    if spread is None:
        return "no value of x has two seeds, so nothing tells differences from noise"
    if falls <= 2 * spread:
        return f"the loss does not fall: {falls:.4f} from end to end, with a standard error of {spread:.4f}"
    low, high = interval
    if low <= LEAST * 1.01 or high >= MOST * 0.99:
        limit = LEAST if low <= LEAST * 1.01 else MOST
        return f"the runs do not bound b: its interval reaches the limit of {limit:g}"
    if high > WIDEST * low:
        return f"b is not determined: anything from {low:.2g} to {high:.2g} fits"
    return None


def _standard_error(points: Sequence[tuple[float, tuple[float, ...]]]) -> float | None:
    """Return the standard error of the difference between the ends, from the spread of seeds at all values of x."""
    squares = sum(float(np.square(np.array(losses) - _mean(losses)).sum()) for _, losses in points)
    freedom = sum(len(losses) - 1 for _, losses in points)
    if not freedom:
        return None
    return math.sqrt(squares / freedom * (1 / len(points[0][1]) + 1 / len(points[-1][1])))


def _number(value: float | None) -> float:
    """Return a number of JSON, where null stands for what it cannot hold."""
    return math.nan if value is None else value


def _pair(values: Sequence[float | None]) -> tuple[float, float]:
    low, high = values
    return _number(low), _number(high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
