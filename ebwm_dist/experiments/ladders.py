"""Which runs of a study make a ladder: those that differ in one variable, and the best ones by FLOPs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ebwm_dist.experiments.fits import Ladder

RUNGS = 3
"""Values that a ladder has at least."""
VARIABLES = ("data", "batch", "parameters", "depth", "flops")


@dataclass(frozen=True)
class Measured:
    """A run that has ended: its place on the axes, what it cost, and its loss."""

    model: str
    """`ebt` or `ar`."""
    size: str
    batch: int
    steps: int
    mcmc_steps: int | None
    seed: int
    tokens: int
    parameters: int
    layers: int
    width: int
    flops: float
    loss: float
    """Of the last validation."""
    seconds: float
    """Of all training steps."""

    @property
    def label(self) -> str:
        """The model and its MCMC steps, where the study sets them."""
        if self.mcmc_steps is None:
            return self.model
        return f"{self.model}, {self.mcmc_steps} MCMC step{'s' * (self.mcmc_steps > 1)}"


class _Axis(NamedTuple):
    variable: str
    x: Callable[[Measured], float]
    common: Callable[[Measured], tuple[Any, ...]]
    """What the runs of a ladder have in common, and how it is written."""
    at: str


_AXES = (
    _Axis("data", lambda run: run.tokens, lambda run: (run.size, run.batch), "{0}, batch {1}"),
    _Axis("batch", lambda run: run.batch, lambda run: (run.size, run.steps), "{0}, {1} steps"),
    _Axis("batch", lambda run: run.batch, lambda run: (run.size, run.tokens), "{0}, {1} tokens"),
    _Axis("parameters", lambda run: run.parameters, lambda run: (run.batch, run.steps), "batch {0}, {1} steps"),
    _Axis(
        "depth",
        lambda run: run.layers,
        lambda run: (run.width, run.batch, run.steps),
        "width {0}, batch {1}, {2} steps",
    ),
)


def ladders(runs: Sequence[Measured]) -> Iterator[Ladder]:
    """Yield the ladders in runs, by variable, the energy models before the twin."""
    for axis in _AXES:
        groups: dict[tuple[Any, ...], list[Measured]] = defaultdict(list)
        for run in runs:
            if axis.variable == "parameters" and run.size.startswith("depth"):
                continue
            key = (run.label, *axis.common(run))
            groups[key].append(run)
        for (label, *common), members in groups.items():
            points = _points(members, axis.x)
            if len(points) >= RUNGS:
                yield Ladder(axis.variable, label, axis.at.format(*(_number(one) for one in common)), points)
    for label in dict.fromkeys(run.label for run in runs):
        points = frontier([run for run in runs if run.label == label])
        if len(points) >= RUNGS:
            yield Ladder("flops", label, "the best run for its FLOPs", points)


def frontier(runs: Sequence[Measured]) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """Return FLOPs and losses of the settings whose mean loss is lower than that of all others that are no dearer."""
    settings: dict[tuple[Any, ...], list[Measured]] = defaultdict(list)
    for run in runs:
        settings[(run.size, run.batch, run.steps)].append(run)
    best, kept = float("inf"), []
    for members in sorted(settings.values(), key=lambda members: (members[0].flops, _mean_loss(members))):
        if (mean := _mean_loss(members)) < best:
            best = mean
            kept.append((members[0].flops, tuple(run.loss for run in members)))
    return tuple(kept)


def _mean_loss(runs: Sequence[Measured]) -> float:
    return sum(run.loss for run in runs) / len(runs)


def _points(runs: Sequence[Measured], x: Callable[[Measured], float]) -> tuple[tuple[float, tuple[float, ...]], ...]:
    found: dict[float, list[float]] = defaultdict(list)
    for run in sorted(runs, key=x):
        found[float(x(run))].append(run.loss)
    return tuple((value, tuple(losses)) for value, losses in found.items())


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
